"""Statistics of a row: the mean square, the mean and other values that all channels share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import scalar
from onnx_tricks.graph.shapes import dim, rank_of
from onnx_tricks.patterns.product import skip_casts
from onnx_tricks.patterns.shape_rules import axes_of

__all__ = [
    "MeanSquare",
    "centred",
    "is_row_statistic",
    "mean_of",
    "mean_square",
    "measured_values",
    "reduced_axes",
]

_REDUCTIONS = frozenset(
    "GlobalAveragePool ReduceMean ReduceSum ReduceSumSquare ReduceL1 ReduceL2 ReduceMax "
    "ReduceMin".split()
)
_ELEMENTWISE = frozenset(
    "Abs Add Cast Clip Div Expand Identity Max Min Mul Neg Pow Reciprocal Sqrt Sub".split()
)
_MAX_DEPTH = 10


@dataclasses.dataclass(frozen=True)
class MeanSquare:
    """`mean(source^2) + epsilon` over one axis; or a variance, with the squared mean taken off.

    Attributes:
        source: The value that is squared, before casts.
        epsilon: The constant added, 0.0 if none.
        variance: Whether the statistic is `mean(source^2) - mean(source)^2`.
    """

    source: ir.Value
    epsilon: float
    variance: bool = False


def reduced_axes(source: ir.Value, axes: Sequence[int] | None) -> tuple[int, ...] | None:
    """Axes counted from the end, sorted; None when the rank is needed and unknown."""
    if axes is None:
        return None
    if all(axis < 0 for axis in axes):
        return tuple(sorted(axes))
    rank = rank_of(source)
    return None if rank is None else tuple(sorted(axis % rank - rank for axis in axes))


def is_row_statistic(value: ir.Value, axis: int, depth: int = 0) -> bool:
    """Whether a value is the same for every channel: it has length 1 along their axis, or had."""
    if scalar(value) is not None:
        return True
    rank = rank_of(value)
    if rank is not None and (rank < -axis or dim(value, axis) == 1):
        return True
    node = value.producer()
    if node is None or node.domain != "" or depth > _MAX_DEPTH:
        return False
    if node.op_type in _REDUCTIONS:
        axes = _axes_of(node)
        return axes is not None and axis in axes
    if node.op_type == "Expand" and scalar(node.inputs[0]) is not None:
        return False  # a value filled with one number, as queries of a detector are at first
    return node.op_type in _ELEMENTWISE and all(
        is_row_statistic(operand, axis, depth + 1) for operand in _operands(node)
    )


def measured_values(value: ir.Value, depth: int = 0) -> set[ir.Value]:
    """What the reductions in a statistic run over: a value, or its squares; before casts."""
    node = value.producer()
    if node is None or node.domain != "" or depth > _MAX_DEPTH:
        return set()
    operands = _operands(node)
    if node.op_type in _REDUCTIONS:
        base = _square_root(operands[0])
        return {skip_casts(operands[0])} if base is None else {base}
    if node.op_type not in _ELEMENTWISE:
        return set()
    return set().union(*(measured_values(operand, depth + 1) for operand in operands))


def _operands(node: ir.Node) -> list[ir.Value]:
    """What a node computes with; the shape that an Expand spreads it over is none of it."""
    given = node.inputs[:1] if node.op_type == "Expand" else node.inputs
    return [operand for operand in given if operand is not None]


def mean_square(value: ir.Value, axis: int) -> MeanSquare | None:
    """Read a value as the mean of squares over `axis`, plus a constant."""
    value = skip_casts(value)
    epsilon = 0.0
    node = _node(value, "Add")
    if node is not None:
        numbers = [(scalar(operand), operand) for operand in node.inputs if operand is not None]
        known = [number for number, _ in numbers if number is not None]
        rest = [operand for number, operand in numbers if number is None]
        if len(known) != 1 or len(rest) != 1:
            return None
        epsilon, value = known[0], skip_casts(rest[0])
    floored = _node(value, "Max")  # below 0 a variance is by rounding alone
    if floored is not None and len(floored.inputs) == 2 and floored.inputs[0] is not None:
        if scalar(floored.inputs[1]) != 0:
            return None
        value = skip_casts(floored.inputs[0])
    variance = _node(value, "Sub")
    if variance is not None:
        squares, mean = variance.inputs
        source = _mean_of_squares(squares, axis)
        inner = _square_root(mean)
        if source is None or inner is None or mean_of(inner, axis) is not source:
            return None
        return MeanSquare(source, epsilon, variance=True)
    source = _mean_of_squares(value, axis)
    return None if source is None else MeanSquare(source, epsilon)


def centred(value: ir.Value, axis: int) -> ir.Value | None:
    """The x of `x - mean(x)` over `axis`, before casts; None for anything else."""
    node = _node(skip_casts(value), "Sub")
    if node is None or node.inputs[0] is None:
        return None
    source = skip_casts(node.inputs[0])
    return source if mean_of(node.inputs[1], axis) is source else None


def _mean_of_squares(value: ir.Value | None, axis: int) -> ir.Value | None:
    mean = mean_of(value, axis)
    if mean is not None:
        return _square_root(mean)
    if value is None:
        return None
    total = _sum_over_width(skip_casts(value), axis)
    if total is None:
        return None
    node = total.producer()
    assert node is not None
    operand = node.inputs[0]
    if operand is None or not _reduces(node, axis):
        return None
    return skip_casts(operand) if node.op_type == "ReduceSumSquare" else _square_root(operand)


def _sum_over_width(value: ir.Value, axis: int) -> ir.Value | None:
    """The sum S of `S / D` or `S * (1 / D)`, D being the length of the axis it runs over."""
    node = _node(value, "Div", "Mul")
    if node is None:
        return None
    for total, factor in (tuple(node.inputs), tuple(reversed(node.inputs))):
        number = scalar(factor)
        reduction = _node(skip_casts(total), "ReduceSum", "ReduceSumSquare") if total else None
        if number is None or reduction is None or reduction.inputs[0] is None:
            continue
        width = dim(reduction.inputs[0], axis)
        wanted = None if width is None else (width if node.op_type == "Div" else 1 / width)
        if wanted is not None and np.isclose(number, wanted, rtol=1e-6):
            return reduction.outputs[0]
    return None


def mean_of(value: ir.Value | None, axis: int) -> ir.Value | None:
    """The x of a mean over exactly `axis` that keeps the axis, before casts."""
    node = None
    if value is not None:
        node = _node(skip_casts(value), "ReduceMean", "GlobalAveragePool")
    if node is None or node.inputs[0] is None or not _reduces(node, axis):
        return None
    return skip_casts(node.inputs[0])


def _reduces(node: ir.Node, axis: int) -> bool:
    return _axes_of(node) == (axis,)


def _axes_of(node: ir.Node) -> tuple[int, ...] | None:
    """The axes of a reduction that keeps them, counted from the end."""
    if node.op_type == "GlobalAveragePool":  # on [B, T, D] the mean of a row, as tf2onnx has it
        rank = rank_of(node.outputs[0])
        return None if rank is None else tuple(range(2 - rank, 0))
    if node.attributes.get_int("keepdims", 1) == 0 or node.inputs[0] is None:
        return None
    return reduced_axes(node.inputs[0], axes_of(node, 1))


def _square_root(value: ir.Value | None) -> ir.Value | None:
    """The x of `x * x` or `x ** 2`, before casts."""
    node = _node(skip_casts(value), "Mul", "Pow") if value is not None else None
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    base = skip_casts(node.inputs[0])
    if node.op_type == "Pow":
        return base if scalar(node.inputs[1]) == 2 else None
    return base if skip_casts(node.inputs[1]) is base else None


def _node(value: ir.Value, *op_types: str) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None
