"""Single entries of the small integer tensors that graphs work shapes out with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_whole_shape
from onnx_tricks.graph.shapes import dim, rank_of, shape_of
from onnx_tricks.patterns.extents import Extents

__all__ = ["entry", "repeats"]

_Places = np.ndarray[Any, np.dtype[Any]]
_ANY_LENGTH = 1 << 16
_REPEAT = frozenset(("Cast", "Expand", "Identity", "Tile"))
_KEEP_ORDER = frozenset(("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"))


def entry(tensor: ir.Value | None, place: int, extents: Extents) -> int | None:
    """One entry of a tensor of integers, as far as it can be told.

    Args:
        tensor: The tensor.
        place: Which of its entries, counted from the end in row-major order (-1 is the last).
        extents: The lengths of axes.
    """
    array = evaluate(tensor)
    if array is not None:
        fits = array.dtype.kind == "i" and -place <= array.size
        return int(array.reshape(-1)[place]) if fits else None
    node = tensor.producer() if tensor is not None else None
    if node is None or node.domain != "" or node.inputs[0] is None:
        return None
    if node.op_type == "Shape":
        axis = place if is_whole_shape(node) else _axis_of(node, place)
        return None if axis is None else extents.number(node.inputs[0], axis)
    if node.op_type in _KEEP_ORDER:
        return entry(node.inputs[0], place, extents)
    if node.op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        return 0 if fill is None else int(fill.as_tensor().numpy().reshape(()))
    if node.op_type == "Concat" and rank_of(node.outputs[0]) == 1:
        for piece in reversed(node.inputs):
            length = dim(piece, 0) if piece is not None else None
            if length is None or -place <= length:
                return entry(piece, place, extents) if length is not None else None
            place += length
    if node.op_type in _PICKS:
        before = _place_before(node, place)
        return None if before is None else entry(node.inputs[0], before, extents)
    return None


def repeats(tensor: ir.Value | None, axis: int, extents: Extents) -> int | None:
    """The length of an axis along which all entries of a tensor are the same; None where not so.

    Args:
        tensor: The tensor.
        axis: The axis, counted from the end.
        extents: The lengths of axes.
    """
    if tensor is None:
        return None
    array = evaluate(tensor)
    if array is not None:
        same = array.ndim >= -axis and np.all(array == array.take([0], axis))
        return array.shape[axis] if same else None
    if dim(tensor, axis) == 1:
        return 1
    node = tensor.producer()
    if node is None or node.domain != "" or node.op_type not in _REPEAT:
        return None
    before = repeats(node.inputs[0], axis, extents)
    if before is None or node.op_type in _KEEP_ORDER:
        return before
    times = entry(node.inputs[1], axis, extents)
    if times is None:
        return None
    return before * times if node.op_type == "Tile" else max(before, times)


def _axis_of(node: ir.Node, place: int) -> int | None:
    """The axis, from the end, whose length a Shape of some axes gives in this place."""
    rank = rank_of(node.inputs[0]) if node.inputs[0] is not None else None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end")
    axes = None if rank is None else range(-rank, 0)[start:end]
    return axes[place] if axes is not None and -place <= len(axes) else None


def _place_before(node: ir.Node, place: int) -> int | None:
    """Where an entry of what a node picks or turns stood in its first input, from the end."""
    source = node.inputs[0]
    shape = shape_of(source) if source is not None else None
    lengths = [_ANY_LENGTH]
    if shape is not None and all(isinstance(one, int) for one in shape):
        lengths = list(shape.numpy())
    size = math.prod(lengths)
    places = np.arange(-size, 0).reshape(lengths)
    rest = [evaluate(one) for one in node.inputs[1:]]
    numbers = [one for one in rest if one is not None]
    if len(numbers) < len(rest) or size > _ANY_LENGTH:
        return None
    if size == _ANY_LENGTH and (not numbers or numbers[0].size != 1 or numbers[0].item() >= 0):
        return None  # places counted from the front, of a tensor whose length is unknown
    picked = _PICKS[node.op_type](node, places, numbers)
    return int(picked.reshape(-1)[place]) if picked is not None and -place <= picked.size else None


def _transposed(node: ir.Node, places: _Places, _: list[_Places]) -> _Places | None:
    return np.transpose(places, node.attributes.get_ints("perm"))


def _gathered(node: ir.Node, places: _Places, numbers: list[_Places]) -> _Places | None:
    axis = node.attributes.get_int("axis", 0)
    length = places.shape[axis]
    if numbers[0].dtype.kind != "i" or np.any((numbers[0] < -length) | (numbers[0] >= length)):
        return None
    return np.take(places, numbers[0], axis)


def _sliced(_: ir.Node, places: _Places, numbers: list[_Places]) -> _Places | None:
    if len(numbers) < 2:
        return None
    starts, ends, *rest = (one.reshape(-1).tolist() for one in numbers)
    axes = rest[0] if rest else range(len(starts))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = [slice(None)] * places.ndim
        chosen[axis] = slice(start, end, step)
        places = places[tuple(chosen)]
    return places


_PICKS: dict[str, Callable[[ir.Node, _Places, list[_Places]], _Places | None]] = {
    "Gather": _gathered,
    "Slice": _sliced,
    "Transpose": _transposed,
}
