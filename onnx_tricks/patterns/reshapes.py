"""Channels through a reshape: in row-major order, one of them lies every so many numbers."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.patterns.channels import Channels, Moved, Obstacle
from onnx_tricks.patterns.entries import entry
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.layout import Length
from onnx_tricks.patterns.shape_rules import Lengths, product

__all__ = ["reshaped"]

_ONE = Length()


def reshaped(node: ir.Node, channels: Channels, extents: Extents) -> Moved | Obstacle:
    """Follow channels through a Reshape or Flatten.

    Args:
        node: The reader.
        channels: Where C channels lie in its first input.
        extents: The lengths of axes.

    Returns:
        Where they lie in its output: on an axis of C; on one of several times C, as copies side by
        side; on one of a part of C, as heads; or on one that they share with others, while a map is
        taken apart.
    """
    output = node.outputs[0]
    width = extents.number(output, -1)
    if width is None and node.op_type == "Reshape":
        width = entry(node.inputs[1], -1, extents)
    known = channels.inner is None and not channels.assumed
    if known and extents.number(node.inputs[0], channels.axis) != channels.width:
        found = None
    elif known and channels.axis == -1 and width == channels.width:
        found = channels  # its rows are only numbered differently
    else:
        found = _placed(node, channels, extents)
    if found is None:
        return Obstacle(node, "does not keep its channels on one axis, or not visibly so")
    return [(output, found)]


def _placed(node: ir.Node, channels: Channels, extents: Extents) -> Channels | None:
    before, after = extents.shape(node.inputs[0]), extents.shape(node.outputs[0])
    if before is None or after is None or -channels.axis > len(before):
        return None
    count = Length(channels.width)
    if channels.inner is None:
        before = (*before[: channels.axis], count, *before[channels.axis :][1:])
    if channels.assumed and product(before) != product(after):
        return None
    behind = product(before[channels.axis :][1:])
    stride = behind.times(channels.inner or _ONE)
    rows = None if channels.inner else product(before[: channels.axis])
    channels = dataclasses.replace(channels, assumed=False, inner=None)
    # In row-major order a channel lies every so many numbers, or there are as many rows before.
    places = range(-len(after), 0)
    same_stride = [one for one in places if product(after[one:][1:]) == stride]
    same_rows = [one for one in places if product(after[:one]) == rows]
    for place in (*same_stride, *same_rows):
        if after[place] == count:
            return dataclasses.replace(channels, axis=place)
    if not channels.heads:
        cut = (_copied_or_cut(channels, place, after[place]) for place in same_stride)
        found = next((one for one in cut if one is not None), None)
        found = found or _shared(channels, stride, after)
        if found is not None:
            return found
    for place in (*same_stride, *same_rows):
        if after[place].symbols:
            return dataclasses.replace(channels, axis=place, assumed=True)
    return None


def _copied_or_cut(channels: Channels, axis: int, length: Length) -> Channels | None:
    """Channels of several rows side by side, or heads of some channels each."""
    if length.symbols or length == _ONE:
        return None
    times, rest = divmod(length.factor, channels.width)
    if rest == 0:
        return dataclasses.replace(channels, axis=axis, pieces=channels.pieces * times)
    if channels.width % length.factor == 0 and len(channels.pieces) == 1:
        one_head = (range(length.factor),)
        return dataclasses.replace(channels, axis=axis, pieces=one_head, heads=True)
    return None


def _shared(channels: Channels, stride: Length, after: Lengths) -> Channels | None:
    """Channels on an axis on which others alternate with them."""
    for place in range(-len(after), 0):
        inner = stride.over(product(after[place:][1:]))
        block = None if inner is None else inner.times(Length(channels.width))
        if block is not None and after[place].over(block) is not None:
            return dataclasses.replace(channels, axis=place, inner=inner)
    return None
