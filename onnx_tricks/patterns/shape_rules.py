"""The lengths that operators give the axes of their results, from those of what they read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.patterns.layout import Length
from onnx_tricks.patterns.lengths import Sizes
from onnx_tricks.patterns.sizing import BROADCAST, LIKE_FIRST, REDUCTIONS

__all__ = ["Lengths", "PartlyKnown", "axes_of", "lengths_after", "product"]

Lengths = tuple[Length, ...]
PartlyKnown = tuple[Length | None, ...]
"""Lengths, None for those that cannot be told."""

_Shapes = Sequence[Lengths | None]
_Numbers = Sequence[Sizes | None]
_ONE = Length()


def lengths_after(node: ir.Node, shapes: _Shapes, numbers: _Numbers) -> PartlyKnown | None:
    """The shape of a node's first output; for a Split that of its input.

    Args:
        node: The node.
        shapes: By input its shape; None where it is absent or unknown.
        numbers: By input its entries, where it is a tensor that shapes are worked out with.
    """
    if not shapes or shapes[0] is None:
        return None
    if node.op_type in LIKE_FIRST:
        return shapes[0]
    if node.domain != "":
        return None
    if node.op_type in BROADCAST:
        known = [one for one, v in zip(shapes, node.inputs, strict=True) if v is not None]
        return _widest(known)
    if node.op_type in REDUCTIONS:
        return _reduced(node, shapes[0])
    rule = _RULES.get(node.op_type)
    try:
        return None if rule is None else rule(node, shapes[0], shapes, numbers)
    except (IndexError, StopIteration, ValueError):  # a node that cannot run
        return None


def product(lengths: Iterable[Length]) -> Length:
    """The product of lengths."""
    return functools.reduce(Length.times, lengths, _ONE)


def axes_of(node: ir.Node, position: int) -> list[int] | None:
    """The axes that a node names in an attribute or a constant input; None where it names none."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    array = evaluate(node.inputs[position]) if len(node.inputs) > position else None
    if array is None or array.dtype.kind != "i":
        return None
    return [int(axis) for axis in array.reshape(-1)]


def _widest(shapes: Iterable[Lengths | PartlyKnown | None]) -> PartlyKnown | None:
    known = [one for one in shapes if one is not None]
    if len(known) < len(list(shapes)) or not known:
        return None
    return tuple(
        _larger([one[place] for one in known if len(one) >= -place])
        for place in range(-max(map(len, known)), 0)
    )


def _larger(lengths: Sequence[Length | None]) -> Length | None:
    found = set(lengths) - {_ONE}
    fixed = [one for one in found if one is not None and not one.symbols]
    if len(fixed) == 1:
        return fixed[0]  # what is equal to a symbol here, or there is one of
    return _ONE if not found else found.pop() if len(found) == 1 else None


def _reduced(node: ir.Node, source: Lengths) -> PartlyKnown | None:
    axes = axes_of(node, 1)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        return None
    if not axes and node.attributes.get_int("noop_with_empty_axes", 0) != 0:
        return source
    gone = {axis % len(source) for axis in axes} if axes else set(range(len(source)))
    if node.attributes.get_int("keepdims", 1):
        return tuple(_ONE if i in gone else one for i, one in enumerate(source))
    return tuple(one for i, one in enumerate(source) if i not in gone)


def _matmul(_: ir.Node, left: Lengths, shapes: _Shapes, __: _Numbers) -> PartlyKnown | None:
    right = shapes[1]
    if right is None or len(left) < 2 or len(right) < 2:
        return None
    batch = _widest([left[:-2], right[:-2]]) if max(len(left), len(right)) > 2 else ()
    return None if batch is None else (*batch, left[-2], right[-1])


def _gemm(node: ir.Node, left: Lengths, shapes: _Shapes, _: _Numbers) -> PartlyKnown | None:
    right = shapes[1]
    if right is None:
        return None
    rows = left[1 if node.attributes.get_int("transA", 0) else 0]
    return rows, right[0 if node.attributes.get_int("transB", 0) else 1]


def _conv(node: ir.Node, source: Lengths, shapes: _Shapes, __: _Numbers) -> PartlyKnown | None:
    kernel = shapes[1]
    if kernel is None or any(one.symbols for one in kernel):
        return None
    return (source[0], kernel[0], *_slid(node, source[2:], [one.factor for one in kernel[2:]]))


def _pool(node: ir.Node, source: Lengths, _: _Shapes, __: _Numbers) -> PartlyKnown | None:
    if node.op_type.startswith("Global"):
        return (*source[:2], *(_ONE,) * (len(source) - 2))
    return (*source[:2], *_slid(node, source[2:], node.attributes["kernel_shape"].as_ints()))


def _slid(node: ir.Node, sides: Lengths, kernel: Sequence[int]) -> PartlyKnown:
    """The sides of a map after a window has slid over it; None where they are other ones."""
    count = len(sides)
    ones, zeros = (1,) * count, (0,) * (2 * count)
    strides = node.attributes.get_ints("strides", ones)
    dilations = node.attributes.get_ints("dilations", ones)
    pads = node.attributes.get_ints("pads", zeros)
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    added = [pads[axis] + pads[axis + count] for axis in range(count)]
    return tuple(
        side
        if stride == 1
        and (auto.startswith("SAME") or (auto == "NOTSET" and more == dilation * (length - 1)))
        else None
        for side, stride, more, dilation, length in zip(
            sides, strides, added, dilations, kernel, strict=True
        )
    )


def _transpose(node: ir.Node, source: Lengths, _: _Shapes, __: _Numbers) -> PartlyKnown | None:
    perm = node.attributes.get_ints("perm")
    return source[::-1] if perm is None else tuple(source[axis] for axis in perm)


def _reshape(node: ir.Node, source: Lengths, _: _Shapes, numbers: _Numbers) -> PartlyKnown | None:
    target = numbers[1]
    if target is None:
        return None
    wanted: list[Length | None] = []
    for place, one in enumerate(target.entries):
        copied = one == Length(0) and not node.attributes.get_int("allowzero", 0)
        if copied and place >= len(source):
            return None
        asked = one if one is not None and one.factor > 0 else None
        wanted.append(source[place] if copied else asked)
    if wanted.count(None) == 1:  # -1, or what cannot be told: the number of elements tells
        rest = product(source).over(product(one for one in wanted if one is not None))
        wanted[wanted.index(None)] = rest
    return tuple(wanted)


def _flatten(node: ir.Node, source: Lengths, _: _Shapes, __: _Numbers) -> PartlyKnown | None:
    axis = node.attributes.get_int("axis", 1)
    return product(source[:axis]), product(source[axis:])


def _unsqueeze(node: ir.Node, source: Lengths, _: _Shapes, __: _Numbers) -> PartlyKnown | None:
    axes = axes_of(node, 1)
    if axes is None:
        return None
    rank, rest = len(source) + len(axes), iter(source)
    places = {axis % rank for axis in axes}
    return tuple(_ONE if place in places else next(rest) for place in range(rank))


def _squeeze(node: ir.Node, source: Lengths, _: _Shapes, __: _Numbers) -> PartlyKnown | None:
    axes = axes_of(node, 1)
    if axes is None:
        return None
    gone = {axis % len(source) for axis in axes}
    return tuple(one for place, one in enumerate(source) if place not in gone)


def _slice(node: ir.Node, source: Lengths, _: _Shapes, numbers: _Numbers) -> PartlyKnown | None:
    axes = axes_of(node, 3)
    if axes is None:
        return None
    given = [None if one is None else one.numbers for one in (*numbers[1:3], *numbers[4:])]
    lengths: list[Length | None] = list(source)
    for place, axis in enumerate(axes):
        length, ends = source[axis], [int(one[place]) for one in given if one is not None]
        known = not length.symbols and len(ends) == len(given) > 1
        lengths[axis] = Length(len(range(length.factor)[slice(*ends)])) if known else None
    return tuple(lengths)


def _gather(node: ir.Node, source: Lengths, shapes: _Shapes, _: _Numbers) -> PartlyKnown | None:
    index, axis = shapes[1], node.attributes.get_int("axis", 0) % len(source)
    return None if index is None else (*source[:axis], *index, *source[axis + 1 :])


def _split(_: ir.Node, source: Lengths, __: _Shapes, ___: _Numbers) -> PartlyKnown | None:
    return source


def _concat(node: ir.Node, _: Lengths, shapes: _Shapes, __: _Numbers) -> PartlyKnown | None:
    known = [one for one in shapes if one is not None]
    if len(known) < len(shapes):
        return None
    axis = node.attributes["axis"].as_int() % len(known[0])
    joined = [one[axis] for one in known]
    fixed = all(not one.symbols for one in joined)
    total = Length(sum(one.factor for one in joined)) if fixed else None
    # Along every other axis all are as long: any of them tells.
    return (*known[-1][:axis], total, *known[-1][axis + 1 :])


def _expand(_: ir.Node, source: Lengths, __: _Shapes, numbers: _Numbers) -> PartlyKnown | None:
    if numbers[1] is None:
        return None
    asked = (one if one is not None and one.factor > 0 else None for one in numbers[1].entries)
    return _widest([source, tuple(asked)])


def _filled(_: ir.Node, __: Lengths, ___: _Shapes, numbers: _Numbers) -> PartlyKnown | None:
    return None if numbers[0] is None else numbers[0].entries


def _range(_: ir.Node, __: Lengths, ___: _Shapes, numbers: _Numbers) -> PartlyKnown | None:
    start, limit, step = (None if one is None else one.entries[0] for one in numbers)
    counted = (start, step) == (Length(0), _ONE)
    return (limit if counted and limit is not None and limit.factor > 0 else None,)


def _tile(_: ir.Node, source: Lengths, __: _Shapes, numbers: _Numbers) -> PartlyKnown | None:
    if numbers[1] is None:
        return None
    times = zip(source, numbers[1].entries, strict=True)
    return tuple(None if many is None else one.times(many) for one, many in times)


_RULES: dict[str, Callable[[ir.Node, Lengths, _Shapes, _Numbers], PartlyKnown | None]] = {
    "AveragePool": _pool,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    "Conv": _conv,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": _pool,
    "GlobalMaxPool": _pool,
    "MatMul": _matmul,
    "MaxPool": _pool,
    "Range": _range,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
