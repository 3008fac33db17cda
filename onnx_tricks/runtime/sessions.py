"""ONNX Runtime sessions, from files and from models in memory.

A model in memory hands its weights over by reference: the serialised graph says "external" and
ONNX Runtime reads the (memory-mapped) arrays themselves, so that nothing is copied to disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_tricks.errors import TricksError, UsageError
from onnx_tricks.runtime.library import find_library, register

__all__ = [
    "Array",
    "Session",
    "SessionError",
    "load_runtime",
    "read_value",
    "running",
    "session_options",
]

Array = npt.NDArray[np.generic]

# ONNX Runtime copies what the serialised model holds; anything smaller may as well be copied.
_INLINE_BYTES = 1024

_BRIEF = "tensor(bfloat16)"
_NUMPY_TYPES = {
    _BRIEF: ml_dtypes.bfloat16,
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
            "Models are run in ONNX Runtime, which is not installed: pip install onnx-tricks[cpu] "
            "(or onnx-tricks[gpu]). To optimise without the proof, use --no-verify."
        ) from error
    module: ModuleType = onnxruntime
    return module


def session_options(*, optimised: bool = True, threads: int = 0) -> Any:
    """Make ONNX Runtime's options for a session with one of our models.

    Args:
        optimised: Whether ONNX Runtime may fuse and approximate, and native kernels run our
            operators where they are installed; otherwise it only folds constants.
        threads: Number of threads of one operator; 0 lets ONNX Runtime choose.

    Returns:
        An `onnxruntime.SessionOptions`.

    Raises:
        UsageError: ONNX Runtime is not installed.
    """
    runtime = load_runtime()
    options = runtime.SessionOptions()
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimised else levels.ORT_ENABLE_BASIC
    )
    if not optimised:
        # It belongs to the basic level too, and mixes types where a norm holds casts.
        options.add_session_config_entry(
            "optimization.disable_specified_optimizers",
            "LayerNormFusionL1",
        )
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if optimised and find_library() is not None:
        register(options)
    return options


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Report what goes wrong in ONNX Runtime within the context as a `SessionError`."""
    try:
        yield
    except TricksError:
        raise
    except Exception as error:
        raise SessionError(_first_line(error)) from error


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
        options = session_options(optimised=optimised, threads=threads)
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
        with running():
            self._session = runtime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
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
        brief = _BRIEF in (*self.inputs.values(), *self.outputs.values())
        with running():
            values = self._run_bound(cast) if brief else self._session.run(None, cast)
        return dict(zip(self.outputs, values, strict=True))

    def _run_bound(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Run with bfloat16 among inputs or outputs, which the runtime knows no NumPy type for."""
        runtime = load_runtime()
        held = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        values = {
            name: runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(
                array.view(np.uint16), ir.DataType.BFLOAT16.value
            )
            if self.inputs[name] == _BRIEF
            else runtime.OrtValue.ortvalue_from_numpy(array)
            for name, array in held.items()
        }
        results = self._session.run_with_ort_values(list(self.outputs), values)
        return [read_value(one) for one in results]


def read_value(value: Any) -> Array:
    """Read a tensor of the runtime's that lies in the memory of the CPU; bfloat16 as float32."""
    if value.data_type() != _BRIEF:
        array: Array = value.numpy()
        return array
    size = math.prod(value.shape())
    if not size:
        return np.zeros(value.shape(), dtype=np.float32)
    memory = (ctypes.c_uint16 * size).from_address(value.data_ptr())
    numbers = np.frombuffer(memory, dtype=ml_dtypes.bfloat16).astype(np.float32)
    return numbers.reshape(value.shape())


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
        if not value.uses() and not value.is_graph_output():
            continue  # the runtime drops it before it looks for its numbers
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
