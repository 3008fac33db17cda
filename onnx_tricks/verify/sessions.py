"""ONNX Runtime sessions for verification, from files and from models in memory.

A model in memory hands its weights over by reference: the serialised graph says "external" and
ONNX Runtime reads the (memory-mapped) arrays themselves, so that nothing is copied to disk.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_tricks.errors import TricksError, UsageError

__all__ = ["Array", "Session", "SessionError", "load_runtime"]

Array = npt.NDArray[np.generic]

# ONNX Runtime copies what the serialised model holds; anything smaller may as well be copied.
_INLINE_BYTES = 1024

_NUMPY_TYPES = {
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
}


class SessionError(TricksError):
    """ONNX Runtime refused to open a model or failed while running it."""


def load_runtime() -> ModuleType:
    """Import onnxruntime.

    Raises:
        UsageError: Neither onnxruntime nor onnxruntime-gpu is installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            "Verification runs the models in ONNX Runtime, which is not installed: "
            "pip install onnx-tricks[cpu] (or onnx-tricks[gpu]), or use --no-verify."
        ) from error
    module: ModuleType = onnxruntime
    return module


class Session:
    """One model opened in ONNX Runtime's CPU provider.

    Args:
        source: An .onnx file, or a model in memory (not changed, and needed no longer).
        optimised: Whether ONNX Runtime may fuse and approximate. On for models in their own type,
            as users run them; otherwise it only folds constants.
        threads: Number of threads of one operator; 0 lets ONNX Runtime choose.

    Raises:
        SessionError: ONNX Runtime refuses the model.
        UsageError: ONNX Runtime is not installed.
    """

    def __init__(
        self, source: Path | ir.Model, *, optimised: bool = True, threads: int = 0
    ) -> None:
        runtime = load_runtime()
        options = runtime.SessionOptions()
        levels = runtime.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimised else levels.ORT_ENABLE_BASIC
        )
        options.log_severity_level = 4
        options.intra_op_num_threads = threads
        model: str | bytes
        if isinstance(source, ir.Model):
            model, weights = _serialise(source)
            self._weights = [
                runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(_bits(array), dtype)
                for array, dtype in weights.values()
            ]
            options.add_external_initializers(list(weights), self._weights)
        else:
            model = str(source)
        try:
            self._session = runtime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise SessionError(_first_line(error)) from error
        self.inputs: dict[str, str] = {i.name: i.type for i in self._session.get_inputs()}
        self.outputs: dict[str, str] = {o.name: o.type for o in self._session.get_outputs()}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model once.

        Args:
            feeds: One array per input; cast to the type the model declares.

        Returns:
            One array per output, by name.

        Raises:
            SessionError: ONNX Runtime fails.
        """
        cast: dict[str, Array] = {}
        for name, kind in self.inputs.items():
            if name not in feeds or kind not in _NUMPY_TYPES:
                raise SessionError(f"no value for input {name} of type {kind}")
            cast[name] = np.asarray(feeds[name], dtype=_NUMPY_TYPES[kind])
        try:
            values = self._session.run(None, cast)
        except Exception as error:
            raise SessionError(_first_line(error)) from error
        return dict(zip(self.outputs, values, strict=True))


def _first_line(error: Exception) -> str:
    """Take the message out of one of the runtime's, which wraps it in codes and traces."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)


def _bits(array: Array) -> Array:
    """View a type that NumPy does not know (bfloat16) as integers, as the runtime takes it."""
    return array.view(np.uint16) if array.dtype.kind == "V" else array


def _serialise(model: ir.Model) -> tuple[bytes, dict[str, tuple[Array, int]]]:
    """Serialise a model without its larger weights, and return those with their ONNX types."""
    weights: dict[str, tuple[Array, int]] = {}
    stand_ins: list[tuple[ir.Value, ir.TensorProtocol]] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _INLINE_BYTES or tensor.dtype not in _SHARED:
            continue
        # The runtime reads the buffer as it lies in memory.
        array = np.require(tensor.numpy(), requirements=["C", "ALIGNED"])
        weights[name] = array, int(tensor.dtype)
        stand_ins.append((value, tensor))
        value.const_value = ir.ExternalTensor(
            "weights", 0, tensor.nbytes, tensor.dtype, shape=_static(tensor), name=name
        )
    try:
        return ir.to_proto(model).SerializeToString(), weights
    finally:
        for value, tensor in stand_ins:
            value.const_value = tensor


def _static(tensor: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(tensor.shape.numpy())


# Types whose arrays NumPy and ONNX Runtime lay out alike; the others are serialised.
_SHARED = frozenset(
    {
        ir.DataType.BFLOAT16,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.INT8,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.UINT8,
    }
)
