"""Operators that move rows about, or scale them whole, and leave each row's channels together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_whole_shape, scalar
from onnx_tricks.graph.shapes import dim, rank_of, shape_of
from onnx_tricks.patterns.statistic import is_row_statistic

__all__ = ["Channels", "Obstacle", "follow"]


@dataclasses.dataclass(frozen=True)
class Channels:
    """The channels that a value holds.

    Attributes:
        axis: Where they lie, counted from the end.
        start: First channel (a Split may have cut some off).
        stop: One past the last channel.
        scale: The number by which every channel was multiplied on the way.
        uneven: What keeps rows from being scaled alike, so that a constant added to each channel is
            no longer the same in every row; empty when nothing does.
    """

    axis: int
    start: int
    stop: int
    scale: float = 1.0
    uneven: str = ""

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """A reader through which channels cannot be followed: the node (if any) and what it does."""

    node: ir.Node | None
    reason: str

    def __str__(self) -> str:
        if self.node is None:
            return self.reason
        return f"{self.node.op_type} {self.node.name or self.node.outputs[0].name!r} {self.reason}"


_Moved = list[tuple[ir.Value, Channels]]
_ANY_LENGTH = 1 << 16
_Known = tuple[ir.Value | None, Channels]
"""A value whose channels are known, whatever shape inference makes of it."""
_QUANTISED = (
    "DynamicQuantizeLinear DynamicQuantizeMatMul GatherBlockQuantized MatMulBnb4 MatMulInteger "
    "MatMulIntegerToFloat MatMulNBits QAttention QLinearMatMul QMoE QOrderedMatMul QuantizeLinear"
).split()


def follow(node: ir.Node, index: int, channels: Channels) -> _Moved | Obstacle | None:
    """Follow channels through one reader.

    Args:
        node: The reader.
        index: Which of its inputs holds the channels.
        channels: Where they lie in it.

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
    mover = _MOVERS.get(node.op_type) if node.domain == "" else None
    if mover is None:
        return None
    if index != 0 and node.op_type not in ("Mul", "Where"):
        return Obstacle(node, "uses it as more than data")
    return mover(node, index, channels)


def _same(node: ir.Node, _: int, channels: Channels) -> _Moved | Obstacle:
    return [(node.outputs[0], channels)]


def _cast(node: ir.Node, index: int, channels: Channels) -> _Moved | Obstacle:
    if not ir.DataType(node.attributes["to"].as_int()).is_floating_point():
        return Obstacle(node, "rounds it to whole numbers")
    return _same(node, index, channels)


def _dropout(node: ir.Node, index: int, channels: Channels) -> _Moved | Obstacle:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is not None and evaluate(training) is None:
        return Obstacle(node, "may be in training mode")
    return _same(node, index, channels)


def _reshape(node: ir.Node, _: int, channels: Channels) -> _Moved | Obstacle:
    output = node.outputs[0]
    length = dim(output, -1)
    if length is None and node.op_type == "Reshape":
        length = _entry(node.inputs[1], -1, (node.inputs[0], channels))
    if channels.axis != -1 or length != channels.width:
        return Obstacle(node, "does not keep its channels on one axis, or not visibly so")
    return [(output, channels)]


def _entry(vector: ir.Value | None, place: int, known: _Known) -> int | None:
    """One entry, counted from the end, of a vector of integers, as far as it can be told."""
    array = evaluate(vector)
    if array is not None:
        fits = array.ndim <= 1 and array.dtype.kind == "i" and -place <= array.size
        return int(array.reshape(-1)[place]) if fits else None
    node = vector.producer() if vector is not None else None
    if node is None or node.domain != "" or node.inputs[0] is None:
        return None
    if node.op_type == "Shape" and is_whole_shape(node):
        value, channels = known
        if node.inputs[0] is value and place == channels.axis:
            return channels.width
        return dim(node.inputs[0], place)
    if node.op_type in ("Cast", "Identity"):
        return _entry(node.inputs[0], place, known)
    if node.op_type in ("Squeeze", "Unsqueeze"):
        # Between a number and a vector of one entry.
        return _entry(node.inputs[0], place, known) if place == -1 else None
    if node.op_type in ("Gather", "Slice"):
        return _picked_entry(node, place, known)
    if node.op_type == "Concat":
        for piece in reversed(node.inputs):
            length = dim(piece, 0) if piece is not None else None
            if length is None or -place <= length:
                return _entry(piece, place, known) if length is not None else None
            place += length
    return None


def _picked_entry(node: ir.Node, place: int, known: _Known) -> int | None:
    """An entry of a Gather or Slice of a vector."""
    source, *rest = node.inputs
    numbers = [evaluate(operand) for operand in rest]
    if source is None or any(array is None or array.size != 1 for array in numbers):
        return None
    values = [int(array.reshape(())) for array in numbers if array is not None]
    length = dim(source, 0)
    if length is None:
        # Counting from the end, any length will do.
        length = _ANY_LENGTH if values and values[0] < 0 else 0
    if node.op_type == "Gather":
        picked = range(length)[values[0] % (length or 1) :][:1]
    else:
        start, stop, _, step = [*values, *(0, 0, 0, 1)[len(values) :]]
        picked = range(length)[start : stop : step or 1]
    return _entry(source, picked[place] - length, known) if -place <= len(picked) else None


def _transpose(node: ir.Node, _: int, channels: Channels) -> _Moved | Obstacle:
    perm = node.attributes.get_ints("perm")
    rank = len(perm) if perm is not None else rank_of(node.outputs[0])
    if rank is None:
        return Obstacle(node, "reverses an unknown number of axes")
    order = list(perm) if perm is not None else list(range(rank))[::-1]
    axis = order.index(channels.axis % rank) - rank
    return [(node.outputs[0], dataclasses.replace(channels, axis=axis))]


def _axes(node: ir.Node, position: int) -> Sequence[int] | None:
    if "axes" in node.attributes:
        return node.attributes["axes"].as_ints()
    array = evaluate(node.inputs[position]) if len(node.inputs) > position else None
    return None if array is None else [int(axis) for axis in array.reshape(-1)]


def _squeeze(node: ir.Node, _: int, channels: Channels) -> _Moved | Obstacle:
    source, output = node.inputs[0], node.outputs[0]
    axes = _axes(node, 1)
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


def _split(node: ir.Node, _: int, channels: Channels) -> _Moved | Obstacle:
    source = node.inputs[0]
    along = _along(node.attributes.get_int("axis", 0), source, channels)
    if along is None:
        return Obstacle(node, "splits it along an axis that cannot be told")
    if not along:
        return [(output, channels) for output in node.outputs]
    if "split" in node.attributes:
        sizes = list(node.attributes["split"].as_ints())
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        array = evaluate(node.inputs[1])
        sizes = [] if array is None else [int(size) for size in array]
    else:
        part = -(-channels.width // len(node.outputs))
        sizes = [part] * (len(node.outputs) - 1)
        sizes.append(channels.width - sum(sizes))
    if sum(sizes) != channels.width or len(sizes) != len(node.outputs):
        return Obstacle(node, "splits its channels in a way that cannot be told")
    moved, start = [], channels.start
    for output, size in zip(node.outputs, sizes, strict=True):
        moved.append((output, dataclasses.replace(channels, start=start, stop=start + size)))
        start += size
    return moved


def _slice(node: ir.Node, _: int, channels: Channels) -> _Moved | Obstacle:
    axes = _axes(node, 3)
    if axes is None:
        starts = evaluate(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = None if starts is None else range(starts.size)
    flags = (
        [_along(axis, node.inputs[0], channels) for axis in axes] if axes is not None else [None]
    )
    if any(flag is None or flag for flag in flags):
        return Obstacle(node, "cuts it in a way that cannot be told, or through its channels")
    return [(node.outputs[0], channels)]


def _gather(node: ir.Node, _: int, channels: Channels) -> _Moved | Obstacle:
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


def _gather_nd(node: ir.Node, _: int, channels: Channels) -> _Moved | Obstacle:
    source, index = node.inputs[0], node.inputs[1]
    rank = rank_of(source) if source is not None else None
    depth = dim(index, -1) if index is not None else None
    if rank is None or depth is None:
        return Obstacle(node, "picks by an index of unknown shape")
    if channels.axis + rank < depth + node.attributes.get_int("batch_dims", 0):
        return Obstacle(node, "picks single channels")
    return [(node.outputs[0], channels)]


def _tile(node: ir.Node, index: int, channels: Channels) -> _Moved | Obstacle:
    if _entry(node.inputs[1], channels.axis, (node.inputs[0], channels)) != 1:
        return Obstacle(node, "may repeat its channels")
    return _same(node, index, channels)


def _expand(node: ir.Node, index: int, channels: Channels) -> _Moved | Obstacle:
    if channels.width == 1:
        return Obstacle(node, "may repeat its only channel")
    return _same(node, index, channels)


def _pad(node: ir.Node, _: int, channels: Channels) -> _Moved | Obstacle:
    source = node.inputs[0]
    pads = (
        node.attributes.get_ints("pads")
        if "pads" in node.attributes
        else evaluate(node.inputs[1] if len(node.inputs) > 1 else None)
    )
    rank = rank_of(source) if source is not None else None
    fill = scalar(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
    fill = node.attributes.get_float("value", fill)
    constant = node.attributes.get_string("mode", "constant") == "constant" and fill == 0.0
    if pads is None or rank is None or len(pads) != 2 * rank or not constant:
        return Obstacle(node, "pads it in a way that cannot be told")
    place = channels.axis % rank
    if pads[place] or pads[place + rank]:
        return Obstacle(node, "adds channels")
    return [(node.outputs[0], dataclasses.replace(channels, uneven="Pad adds rows of zeros"))]


def _multiply(node: ir.Node, index: int, channels: Channels) -> _Moved | Obstacle | None:
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


def _negate(node: ir.Node, _: int, channels: Channels) -> _Moved | Obstacle:
    return [(node.outputs[0], dataclasses.replace(channels, scale=-channels.scale))]


def _where(node: ir.Node, index: int, channels: Channels) -> _Moved | Obstacle:
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


_MOVERS: dict[str, Callable[[ir.Node, int, Channels], _Moved | Obstacle | None]] = {
    "Cast": _cast,
    "Div": _multiply,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Identity": _same,
    "Mul": _multiply,
    "Neg": _negate,
    "Pad": _pad,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _squeeze,
    "Where": _where,
}
