"""What is known of a value before a model runs, seen from its token ids."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, stored_tensor
from onnx_tricks.graph.shapes import dtype_of, shape_of
from onnx_tricks.patterns.layout import Layout, axis_of
from onnx_tricks.patterns.lengths import Sizes

__all__ = ["Constant", "Ids", "Row", "State", "constant_layout", "output_type"]

_PREDICATES = frozenset(
    "And Equal Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Not Or Xor".split()
)


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant, or a number that follows from static lengths; its layout where it is known."""

    layout: Layout | None


@dataclasses.dataclass(frozen=True)
class Ids:
    """The token ids themselves, in some arrangement."""

    layout: Layout


@dataclasses.dataclass(frozen=True)
class Row:
    """A function of the token id.

    Attributes:
        layout: Its axes.
        dtype: Its element type.
        key: Equal for equal computations, and larger than those of what it is computed from.
    """

    layout: Layout
    dtype: ir.DataType
    key: int

    @property
    def width(self) -> int:
        """How many numbers it holds for one token."""
        return math.prod(one for axis in self.layout for one in axis if isinstance(one, int))

    @property
    def nbytes(self) -> int:
        """Bytes of these numbers."""
        return -(-self.width * self.dtype.bitwidth // 8)


State = Constant | Ids | Row | Sizes


def constant_layout(value: ir.Value) -> Layout | None:
    """The layout of a constant; None where its shape is not known."""
    tensor = stored_tensor(value)
    shape = shape_of(value) if tensor is None else tensor.shape
    if shape is not None and not all(isinstance(one, int) for one in shape):
        shape = None
    if shape is None:
        array = evaluate(value)
        dims = None if array is None else array.shape
    else:
        dims = tuple(shape.numpy())
    return None if dims is None else tuple(axis_of(int(one)) for one in dims)


def output_type(node: ir.Node, index: int, states: Sequence[State | None]) -> ir.DataType | None:
    """The type of an output; where no inference knows the operator, that of the row it reads."""
    known = dtype_of(node.outputs[index])
    if known is not None:
        return known
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in _PREDICATES:
        return ir.DataType.BOOL
    if node.op_type in ("ArgMax", "ArgMin") or (node.op_type == "TopK" and index == 1):
        return ir.DataType.INT64
    source = node.inputs[{"DequantizeLinear": 1, "Where": 1, "OneHot": 2}.get(node.op_type, 0)]
    state = states[list(node.inputs).index(source)]
    if isinstance(state, Row):
        return state.dtype
    return None if source is None else dtype_of(source)
