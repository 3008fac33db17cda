"""What the numbers in a graph suggest for the sizes that its inputs leave open."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

__all__ = ["Image", "find_image", "lengths"]

# Sides (height = width, pixels) that exports and models are often made for.
_USUAL_SIDES = (64, 224, 32, 128, 256, 384, 96, 192, 336, 448, 512, 518, 640, 768, 800, 1024)
_STRIDES = (1, 2, 4, 8, 16, 32)  # of a whole encoder: side of the image by side of a map in it
_SIDES = range(8, 1025)
_LONGEST = 4096  # of a series
_MOST_LENGTHS = 64
_FARTHEST = 64  # nodes between an image and its first convolution
_LISTED = 64  # elements of a constant that is looked at element by element


@dataclasses.dataclass(frozen=True)
class Image:
    """What an input that is a batch of images may look like.

    Attributes:
        channels: Their number.
        sizes: Height and width in pixels, the most likely ones first.
    """

    channels: int
    sizes: tuple[tuple[int, int], ...]


def find_image(value: ir.Value) -> Image | None:
    """Work out what images an input takes.

    Args:
        value: An input of a graph, [batch, channels, height, width].

    Returns:
        None where it is no floating input of four axes, leaves none of them open but the batch, or
        fixes a side and no convolution reads it.
    """
    shape = value.shape
    if shape is None or len(shape) != 4 or value.dtype is None:
        return None
    if not value.dtype.is_floating_point() or all(isinstance(dim, int) for dim in shape[1:]):
        return None
    weight, strides = _first_convolution(value)
    if not weight and any(isinstance(dim, int) for dim in shape[2:]):
        return None
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    sides = itertools.chain(_USUAL_SIDES, _mapped(graph))
    squares = [(side, side) for side in sides]
    if not weight:
        return Image(3, tuple(dict.fromkeys(squares)))
    # A table with a batch axis is never the weight of a linear layer; the others are guesses.
    likely, rest = (_tabled(graph, rank, weight, strides) for rank in (3, 2))
    return Image(weight[1], tuple(dict.fromkeys([*likely, *squares, *rest])))


def lengths(graph: ir.Graph) -> tuple[int, ...]:
    """List the lengths of a series that the constants of a graph may have been made for.

    The longest come first: of a series that is too short, a model may make something all the same.
    """
    found = {n for tensor in _tensors(graph) for n in _integers(tensor)}
    return tuple(sorted((n for n in found if 1 < n <= _LONGEST), reverse=True)[:_MOST_LENGTHS])


def _tabled(
    graph: ir.Graph, rank: int, weight: tuple[int, ...], strides: list[int]
) -> Iterator[tuple[int, int]]:
    """Yield the sizes whose patches are as many as the rows of a position table."""
    for tokens in (_square, _oblong):
        for shape in _shapes(graph):
            if len(shape) != rank or shape[-1] != weight[0] or math.prod(shape[:-2]) != 1:
                continue
            for extra in (0, 1, 2):  # class and distillation tokens
                for patches in tokens(shape[-2] - extra):
                    rows, columns = (
                        (n - 1) * stride + kernel
                        for n, stride, kernel in zip(patches, strides, weight[2:], strict=True)
                    )
                    yield rows, columns


def _square(count: int) -> Iterator[tuple[int, int]]:
    side = math.isqrt(max(count, 0))
    if side > 1 and side * side == count:
        yield side, side


def _oblong(count: int) -> Iterator[tuple[int, int]]:
    """Yield rectangles of so many patches, those first that come closest to a square."""
    for rows in range(math.isqrt(max(count, 0)), 1, -1):
        if count % rows == 0 and rows * rows < count:
            yield rows, count // rows
            yield count // rows, rows


def _mapped(graph: ir.Graph) -> Iterator[int]:
    """Yield the sides of images whose maps have as many pixels as a constant has rows."""
    squares = {n for shape in _shapes(graph) for n in shape if n == math.isqrt(n) ** 2}
    for side in sorted(math.isqrt(n) for n in squares):
        yield from (side * stride for stride in _STRIDES if side * stride in _SIDES)


def _first_convolution(value: ir.Value) -> tuple[tuple[int, ...], list[int]]:
    """Find the convolution that reads an image: shape of its weight and its strides."""
    pending, seen = [value], 0
    while pending and seen < _FARTHEST:
        for node, index in pending.pop(0).uses():
            seen += 1
            weight = node.inputs[1] if node.op_type == "Conv" and index == 0 else None
            if weight is not None and weight.shape is not None and len(weight.shape) == 4:
                strides = node.attributes.get("strides")
                return (
                    tuple(int(n) for n in weight.shape.numpy()),
                    [1, 1] if strides is None else list(strides.as_ints()),
                )
            if node.op_type != "Shape":
                pending += node.outputs
    return (), []


def _tensors(graph: ir.Graph) -> Iterator[ir.TensorProtocol]:
    for value in graph.initializers.values():
        if value.const_value is not None:
            yield value.const_value
    for node in graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            yield node.attributes["value"].value


def _shapes(graph: ir.Graph) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in tensor.shape.numpy()) for tensor in _tensors(graph)]


def _integers(tensor: ir.TensorProtocol) -> set[int]:
    """The sizes of a constant; and of one of integers those it lists, or as many as it counts."""
    found = {int(n) for n in tensor.shape.numpy()}
    if tensor.dtype == ir.DataType.INT64 and 0 < tensor.size <= _LISTED:
        found |= {int(n) for n in np.ravel(tensor.numpy())}
    elif tensor.dtype == ir.DataType.INT64 and tensor.size:
        found.add(int(np.max(tensor.numpy())) + 1)
    return found
