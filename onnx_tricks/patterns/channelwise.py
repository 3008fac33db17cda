"""Operators that are linear in each channel on its own: they mix or scale rows, never channels.

A factor on a channel goes through them, though rows do not stay as they are.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.graph.constants import scalar
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.channels import Channels, Moved
from onnx_tricks.patterns.shape_rules import axes_of
from onnx_tricks.patterns.statistic import reduced_axes

__all__ = ["channelwise", "pooled"]


def channelwise(node: ir.Node, index: int, channels: Channels) -> Moved | None:
    """Follow channels through an operator that is linear in each of them.

    Args:
        node: The reader.
        index: Which of its inputs holds the channels; no other may depend on them.
        channels: Where they lie in it.

    Returns:
        Its output; None where the node is anything else, or mixes channels.
    """
    rule = _RULES.get(node.op_type) if node.domain == "" and channels.inner is None else None
    found = None if rule is None else rule(node, index, channels)
    return None if found is None else [(node.outputs[0], found)]


def pooled(node: ir.Node, index: int, channels: Channels) -> Moved | None:
    """Follow channels through an operator that sums or averages rows, all channels alike.

    Args:
        node: The reader.
        index: Which of its inputs holds the channels.
        channels: Where they lie in it.
    """
    return channelwise(node, index, channels) if node.op_type in _POOLS else None


def _uneven(node: ir.Node, channels: Channels, axis: int | None, does: str) -> Channels | None:
    if axis is None:
        return None
    return dataclasses.replace(channels, axis=axis, uneven=f"{node.op_type} {does}")


def _reduce(node: ir.Node, _: int, channels: Channels) -> Channels | None:
    source = node.inputs[0]
    axes = reduced_axes(source, axes_of(node, 1)) if source is not None else None
    if not axes or channels.axis in axes:
        return None
    gone = 0 if node.attributes.get_int("keepdims", 1) else sum(a > channels.axis for a in axes)
    moved = dataclasses.replace(channels, axis=channels.axis + gone)
    return moved if node.op_type == "ReduceMean" else _uneven(node, moved, moved.axis, "adds rows")


def _pool(node: ir.Node, _: int, channels: Channels) -> Channels | None:
    rank = rank_of(node.inputs[0]) if node.inputs[0] is not None else None
    if rank is None or channels.axis != 1 - rank:
        return None
    whole = node.op_type == "GlobalAveragePool"
    return channels if whole else _uneven(node, channels, channels.axis, "may average padding too")


def _scale(node: ir.Node, index: int, channels: Channels) -> Channels | None:
    _, other = _both(node, index)
    if other is None or scalar(other) is not None:
        return None
    if node.op_type == "Div" and index != 0:
        return None
    return _uneven(node, channels, channels.axis, "scales each row")


def _matmul(node: ir.Node, index: int, channels: Channels) -> Channels | None:
    """A product along another axis than that of the channels."""
    own, other = (None if one is None else rank_of(one) for one in _both(node, index))
    summed = -1 if index == 0 else -2
    if own is None or own < 2 or other is None or channels.axis == summed:
        return None
    # A vector on the right takes the last axis away; one on the left the last but one.
    gone = 0 if other > 1 else int(channels.axis < summed)
    return _uneven(node, channels, channels.axis + gone, "mixes rows")


def _cumulate(node: ir.Node, index: int, channels: Channels) -> Channels | None:
    source, along = node.inputs[0], scalar(node.inputs[1])
    axes = reduced_axes(source, [int(along)]) if source is not None and along is not None else None
    if index != 0 or axes is None or channels.axis in axes:
        return None
    return _uneven(node, channels, channels.axis, "adds rows")


def _einsum(node: ir.Node, index: int, channels: Channels) -> Channels | None:
    left, _, right = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    terms = left.split(",")
    if not right or index >= len(terms):
        return None
    own = terms[index].rpartition("...")[2]
    if len(own) < -channels.axis:
        return None
    label = own[channels.axis]
    apart = all(label not in term for place, term in enumerate(terms) if place != index)
    if not apart or terms[index].count(label) != 1 or right.count(label) != 1:
        return None
    behind = right[right.index(label) :]
    return None if "..." in behind else _uneven(node, channels, -len(behind), "mixes rows")


def _both(node: ir.Node, index: int) -> tuple[ir.Value | None, ir.Value | None]:
    return node.inputs[index], node.inputs[1 - index]


_POOLS = frozenset(("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum"))
_RULES = {
    "AveragePool": _pool,
    "CumSum": _cumulate,
    "Div": _scale,
    "Einsum": _einsum,
    "GlobalAveragePool": _pool,
    "MatMul": _matmul,
    "Mul": _scale,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
}
