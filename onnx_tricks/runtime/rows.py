"""Choosing rows of tensors where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_tricks.runtime.sessions import load_runtime, session_options

__all__ = ["RowPicker"]

_OPSET = 13


class RowPicker:
    """Chooses rows, or what lies along another axis, of tensors on their device, of any type.

    Args:
        provider: The execution provider that runs it.
        device: Kind and number of the device.
    """

    def __init__(self, provider: str, device: tuple[str, int]) -> None:
        self._provider, self._device = provider, device
        self._sessions: dict[tuple[int, int], Any] = {}

    def __call__(self, value: Any, rows: npt.NDArray[np.int64], axis: int = 0) -> Any:
        """Return `value[rows]`.

        Args:
            value: An `OrtValue`, [B, ...].
            rows: Indices along the axis, [B'].
            axis: Which axis.
        """
        session = self._session(value.element_type(), axis)
        binding = session.io_binding()
        binding.bind_ortvalue_input("value", value)
        binding.bind_cpu_input("rows", rows)
        binding.bind_output("chosen", *self._device)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    def _session(self, element_type: int, axis: int) -> Any:
        key = element_type, axis
        if key not in self._sessions:
            self._sessions[key] = load_runtime().InferenceSession(
                ir.to_proto(_gather(ir.DataType(element_type), axis)).SerializeToString(),
                session_options(),
                providers=[self._provider],
            )
        return self._sessions[key]


def _gather(dtype: ir.DataType, axis: int) -> ir.Model:
    value = ir.Value(name="value", type=ir.TensorType(dtype))
    rows = ir.Value(name="rows", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["rows"]))
    node = ir.node("Gather", [value, rows], {"axis": axis})
    chosen = node.outputs[0]
    chosen.name, chosen.type = "chosen", value.type
    graph = ir.Graph([value, rows], [chosen], nodes=[node], name="rows", opset_imports={"": _OPSET})
    return ir.Model(graph, ir_version=8)
