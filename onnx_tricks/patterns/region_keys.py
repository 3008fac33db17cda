"""Which computations of a region are equal, however often the graph holds them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import onnx_ir as ir

from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.patterns.lengths import Sizes
from onnx_tricks.patterns.states import Row, State

__all__ = ["Keys"]

_SMALL = 1024  # bytes; constants that are compared by what is in them


class Keys:
    """Numbers of rows, equal for equal computations."""

    def __init__(self, states: Mapping[ir.Value, State]) -> None:
        """Prepare for values of which this is known, now or later."""
        self._states = states
        self._numbers: dict[Hashable, int] = {}

    def number(self, *computation: Hashable) -> int:
        """The number of a computation."""
        return self._numbers.setdefault(computation, len(self._numbers))

    def of_node(self, node: ir.Node) -> tuple[Hashable, ...]:
        """Equal for nodes that compute the same from the same inputs."""
        attributes = tuple(sorted(_attribute(one) for one in node.attributes.values()))
        return node.domain, node.op_type, attributes, tuple(self.of(one) for one in node.inputs)

    def of(self, value: ir.Value | None) -> Hashable:
        """Equal for values that are the same row, or the same constant."""
        state = None if value is None else self._states.get(value)
        if value is None or isinstance(state, Sizes):
            return state
        if isinstance(state, Row):
            return state.key
        tensor = stored_tensor(value)
        if tensor is not None:
            if tensor.nbytes <= _SMALL and tensor.dtype != ir.DataType.STRING:
                return (tensor.dtype, tuple(tensor.shape.numpy()), tensor.numpy().tobytes())
            return id(tensor)
        node = value.producer()
        return id(value) if node is None else (*self.of_node(node), node.outputs.index(value))


def _attribute(attribute: ir.Attr) -> tuple[str, str]:
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return attribute.name, f"{tensor.dtype} {tensor.shape} {tensor.tobytes().hex()}"
    return attribute.name, f"{attribute.type} {value!r}"
