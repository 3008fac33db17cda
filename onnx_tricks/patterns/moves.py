"""Operators that move rows about, or scale their channels, and leave each row together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, scalar
from onnx_tricks.graph.shapes import dim, rank_of, shape_of
from onnx_tricks.patterns.channels import Channels, Moved, Obstacle
from onnx_tricks.patterns.entries import entry, repeats
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.quantised import QUANTISED_PRODUCTS
from onnx_tricks.patterns.reshapes import reshaped
from onnx_tricks.patterns.shape_rules import axes_of
from onnx_tricks.patterns.statistic import is_row_statistic
from onnx_tricks.patterns.strided import picked_whole

__all__ = ["follow"]

_QUANTISED = QUANTISED_PRODUCTS | frozenset(
    "DynamicQuantizeLinear GatherBlockQuantized QAttention QMoE QuantizeLinear".split()
)


def follow(
    node: ir.Node, index: int, channels: Channels, extents: Extents
) -> Moved | Obstacle | None:
    """Follow channels through one reader.

    Args:
        node: The reader.
        index: Which of its inputs holds the channels.
        channels: Where they lie in it.
        extents: The lengths of axes, which it may take its shape from.

    Returns:
        The outputs that hold them now; an obstacle; or None when the node moves nothing and has to
        be looked at as a linear layer.
    """
    if node.op_type in _QUANTISED:
        return Obstacle(
            node,
            "multiplies it with quantised weights, whose scales do not run along the input axis: "
            "optimise the model before quantising it",
        )
    if node.domain != "" or node.op_type not in _MOVERS:
        return None
    if index != 0 and node.op_type not in ("Mul", "Where"):
        return Obstacle(node, "uses it as more than data")
    if channels.inner is not None and node.op_type not in _REARRANGING:
        whole = picked_whole(node, channels)
        return whole or Obstacle(node, "reads rows and channels that lie on one axis")
    return _MOVERS[node.op_type](node, index, channels, extents)


def _same(node: ir.Node, _: int, channels: Channels, __: Extents) -> Moved | Obstacle:
    return [(node.outputs[0], channels)]


def _cast(node: ir.Node, index: int, channels: Channels, extents: Extents) -> Moved | Obstacle:
    if not ir.DataType(node.attributes["to"].as_int()).is_floating_point():
        return Obstacle(node, "rounds it to whole numbers")
    return _same(node, index, channels, extents)


def _dropout(node: ir.Node, index: int, channels: Channels, extents: Extents) -> Moved | Obstacle:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is not None and evaluate(training) is None:
        return Obstacle(node, "may be in training mode")
    return _same(node, index, channels, extents)


def _reshape(node: ir.Node, _: int, channels: Channels, extents: Extents) -> Moved | Obstacle:
    return reshaped(node, channels, extents)


def _transpose(node: ir.Node, _: int, channels: Channels, __: Extents) -> Moved | Obstacle:
    perm = node.attributes.get_ints("perm")
    rank = len(perm) if perm is not None else rank_of(node.outputs[0])
    if rank is None:
        return Obstacle(node, "reverses an unknown number of axes")
    if channels.axis < -rank:
        return Obstacle(node, "has fewer axes")
    order = list(perm) if perm is not None else list(range(rank))[::-1]
    axis = order.index(channels.axis % rank) - rank
    return [(node.outputs[0], dataclasses.replace(channels, axis=axis))]


def _squeeze(node: ir.Node, _: int, channels: Channels, __: Extents) -> Moved | Obstacle:
    source, output = node.inputs[0], node.outputs[0]
    axes = axes_of(node, 1)
    before = rank_of(source) if source is not None else None
    if axes is None or before is None:
        return Obstacle(node, "changes its axes in a way that cannot be told")
    if node.op_type == "Unsqueeze":
        after = before + len(axes)
        kept = [i for i in range(after) if i not in {axis % after for axis in axes}]
        position = kept[channels.axis % before]
    else:
        after = before - len(axes)
        gone = {axis % before for axis in axes}
        if channels.axis % before in gone:
            return Obstacle(node, "removes its channel axis")
        position = [i for i in range(before) if i not in gone].index(channels.axis % before)
    return [(output, dataclasses.replace(channels, axis=position - after))]


def _split(node: ir.Node, _: int, channels: Channels, extents: Extents) -> Moved | Obstacle:
    source = node.inputs[0]
    along = _along(node.attributes.get_int("axis", 0), source, channels)
    if along is None:
        return Obstacle(node, "splits it along an axis that cannot be told")
    if not along:
        return [(output, channels) for output in node.outputs]
    if "split" in node.attributes:
        sizes = list(node.attributes["split"].as_ints())
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        sizes = extents.integers(node.inputs[1]) or []
    else:
        part = -(-channels.width // len(node.outputs))
        sizes = [part] * (len(node.outputs) - 1)
        sizes.append(channels.width - sum(sizes))
    if sum(sizes) != channels.width or len(sizes) != len(node.outputs):
        return Obstacle(node, "splits its channels in a way that cannot be told")
    moved, start = [], 0
    for output, size in zip(node.outputs, sizes, strict=True):
        pieces = channels.cut(slice(start, start + size))
        moved.append((output, dataclasses.replace(channels, pieces=pieces)))
        start += size
    return moved


def _slice(node: ir.Node, _: int, channels: Channels, extents: Extents) -> Moved | Obstacle:
    axes = axes_of(node, 3)
    if axes is None:
        starts = extents.integers(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = None if starts is None else list(range(len(starts)))
    flags = [_along(axis, node.inputs[0], channels) for axis in axes] if axes is not None else []
    if axes is None or None in flags:
        return Obstacle(node, "cuts it in a way that cannot be told")
    if True not in flags:
        return [(node.outputs[0], channels)]
    ends = [extents.integers(one) for one in (*node.inputs[1:3], *node.inputs[4:])]
    place = flags.index(True)
    cut = [one[place] for one in ends if one is not None]
    if len(cut) < max(len(ends), 2) or any(step < 1 for step in cut[2:]) or channels.assumed:
        return Obstacle(node, "cuts through its channels in a way that cannot be told")
    pieces = channels.cut(slice(*cut))
    return [(node.outputs[0], dataclasses.replace(channels, pieces=pieces))]


def _gather(node: ir.Node, _: int, channels: Channels, __: Extents) -> Moved | Obstacle:
    source, index = node.inputs[0], node.inputs[1]
    axis = node.attributes.get_int("axis", 0)
    along = _along(axis, source, channels)
    rank = rank_of(source) if source is not None else None
    if along is None or along:
        return Obstacle(node, "picks single channels, or from an axis that cannot be told")
    place = axis if axis < 0 else axis - (rank or 0)
    if place < channels.axis:
        return [(node.outputs[0], channels)]
    added = rank_of(index) if index is not None else None
    if added is None:
        return Obstacle(node, "picks by an index of unknown rank")
    return [(node.outputs[0], dataclasses.replace(channels, axis=channels.axis - added + 1))]


def _gather_nd(node: ir.Node, _: int, channels: Channels, __: Extents) -> Moved | Obstacle:
    source, index = node.inputs[0], node.inputs[1]
    rank = rank_of(source) if source is not None else None
    depth = dim(index, -1) if index is not None else None
    if rank is None or depth is None:
        return Obstacle(node, "picks by an index of unknown shape")
    if channels.axis + rank < depth + node.attributes.get_int("batch_dims", 0):
        return Obstacle(node, "picks single channels")
    return [(node.outputs[0], channels)]


def _gather_elements(
    node: ir.Node, _: int, channels: Channels, extents: Extents
) -> Moved | Obstacle:
    # Whole rows, if the index says the same for all channels of a row.
    along = _along(node.attributes.get_int("axis", 0), node.inputs[0], channels)
    repeated = repeats(node.inputs[1], channels.axis, extents)
    if along is not False or repeated != channels.width:
        return Obstacle(node, "picks single channels, or may do so")
    return [(node.outputs[0], channels)]


def _tile(node: ir.Node, _: int, channels: Channels, extents: Extents) -> Moved | Obstacle:
    if entry(node.inputs[1], channels.axis, extents) != 1:
        return Obstacle(node, "may repeat its channels")
    return [(node.outputs[0], channels)]


def _expand(node: ir.Node, index: int, channels: Channels, extents: Extents) -> Moved | Obstacle:
    if channels.width == 1:
        return Obstacle(node, "may repeat its only channel")
    return _same(node, index, channels, extents)


def _pad(node: ir.Node, _: int, channels: Channels, extents: Extents) -> Moved | Obstacle:
    source = node.inputs[0]
    rank = rank_of(source) if source is not None else None
    fill = scalar(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
    fill = node.attributes.get_float("value", fill)
    constant = node.attributes.get_string("mode", "constant") == "constant" and fill == 0.0
    if rank is None or not constant or len(node.inputs) > 3:
        return Obstacle(node, "pads it in a way that cannot be told")
    places = (channels.axis - rank, channels.axis)
    if "pads" in node.attributes:
        pads = node.attributes.get_ints("pads") or ()
        added: list[int | None] = [pads[place] for place in places]
    else:
        added = [entry(node.inputs[1], place, extents) for place in places]
    if any(one != 0 for one in added):
        return Obstacle(node, "adds channels, or may do so")
    return [(node.outputs[0], dataclasses.replace(channels, uneven="Pad adds rows of zeros"))]


def _resize(node: ir.Node, _: int, channels: Channels, extents: Extents) -> Moved | Obstacle:
    inputs = [*node.inputs, None, None]
    scales, sizes = inputs[1:3] if len(node.inputs) == _RESIZE_BY_SCALES else inputs[2:4]
    factors = evaluate(scales)
    if "axes" in node.attributes:
        along = [_along(axis, node.inputs[0], channels) for axis in axes_of(node, 0) or ()]
        kept = not any(one is not False for one in along)
    elif factors is not None and factors.size:
        kept = bool(factors[channels.axis] == 1)
    else:
        kept = entry(sizes, channels.axis, extents) == channels.width
    crops = node.attributes.get_string("coordinate_transformation_mode") == "tf_crop_and_resize"
    if not kept or crops:
        return Obstacle(node, "changes the number of its channels, or may do so")
    if node.attributes.get_string("mode", "nearest") == "nearest":
        return [(node.outputs[0], channels)]
    return [(node.outputs[0], dataclasses.replace(channels, uneven="Resize mixes rows"))]


def _multiply(node: ir.Node, index: int, channels: Channels, _: Extents) -> Moved | Obstacle:
    other = node.inputs[1 - index]
    if other is None or other is node.inputs[index]:
        return Obstacle(node, "is not linear in it")
    number = scalar(other)
    output = node.outputs[0]
    if number is not None and number != 0 and (shape_of(other) is None or rank_of(other) in (0, 1)):
        factor = number if node.op_type == "Mul" else 1 / number
        return [(output, dataclasses.replace(channels, scale=channels.scale * factor))]
    if evaluate(other) is None and is_row_statistic(other, channels.axis):
        return [(output, dataclasses.replace(channels, uneven=f"{node.op_type} scales each row"))]
    return Obstacle(node, "multiplies it with something that is not a constant weight")


def _negate(node: ir.Node, _: int, channels: Channels, __: Extents) -> Moved | Obstacle:
    return [(node.outputs[0], dataclasses.replace(channels, scale=-channels.scale))]


def _where(node: ir.Node, index: int, channels: Channels, _: Extents) -> Moved | Obstacle:
    condition, other = node.inputs[0], node.inputs[3 - index] if index in (1, 2) else None
    if index == 0 or condition is None or scalar(other) != 0.0:
        return Obstacle(node, "is not linear in it")
    if not is_row_statistic(condition, channels.axis):
        return Obstacle(node, "masks single channels")
    return [(node.outputs[0], dataclasses.replace(channels, uneven="Where sets rows to zero"))]


def _along(axis: int, source: ir.Value | None, channels: Channels) -> bool | None:
    """Whether an axis of a node is the channel axis; None when it cannot be told."""
    if axis < 0:
        return axis == channels.axis
    rank = rank_of(source) if source is not None else None
    return None if rank is None else axis - rank == channels.axis


_RESIZE_BY_SCALES = 2  # inputs of the first version, which knew no sizes
_REARRANGING = frozenset(("Cast", "Flatten", "Identity", "Reshape", "Transpose"))
_MOVERS: dict[str, Callable[[ir.Node, int, Channels, Extents], Moved | Obstacle]] = {
    "Cast": _cast,
    "Div": _multiply,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": _same,
    "Mul": _multiply,
    "Neg": _negate,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _squeeze,
    "Where": _where,
}
