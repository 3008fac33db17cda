"""The lengths of axes as products of numbers and symbols, so that two can be told to be equal.

Shape inference knows an axis as a number or not at all. Here the axis of a map that was flattened
is `H * W`, whatever H and W are, through everything exporters do to get there and back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, stored_tensor
from onnx_tricks.graph.shapes import dim, dtype_of, shape_of
from onnx_tricks.patterns.layout import Length
from onnx_tricks.patterns.lengths import Sizes, follow_sizes
from onnx_tricks.patterns.shape_rules import Lengths, PartlyKnown, lengths_after, product

__all__ = ["Extents"]

_FRACTION, _SIGNED = "~", "?"  # how symbols begin that may be no whole, or no positive numbers
_ROUNDINGS = frozenset(("Ceil", "Floor", "Round"))
_OPERATIONS = frozenset(("Add", "Div", "Max", "Min", "Mod", "Mul", "Sub"))
_INTEGERS = frozenset((ir.DataType.INT64, ir.DataType.INT32))
_LONGEST = 16  # entries of a tensor that shapes are worked out with
_SKIP_SUM = 3  # the output of a norm operator with a residual connection that is the sum


class Extents:
    """The lengths of the axes of values, worked out where they are asked for.

    Lengths that are equal here are so for all inputs of a model, none of which is empty.
    """

    def __init__(self) -> None:
        self._shapes: dict[ir.Value, Lengths | None] = {}
        self._numbers: dict[ir.Value, Sizes] = {}
        self._learned: dict[tuple[ir.Value, int], int] = {}

    def learn(self, value: ir.Value, axis: int, length: int) -> None:
        """Take note of the length of an axis (counted from the end), however that is known."""
        self._learned[value, axis] = length
        found = self._shapes.get(value)
        if found is not None and -axis <= len(found):
            self._shapes[value] = _with(found, axis, Length(length))

    def shape(self, value: ir.Value | None) -> Lengths | None:
        """The length of every axis of a value; None where their number is unknown."""
        if value is None:
            return None
        pending = [value]
        while pending:
            node = pending[-1].producer()
            missing = [v for v in node.inputs if v is not None] if node is not None else []
            missing = [v for v in missing if v not in self._shapes]
            if missing and pending[-1] not in self._shapes:
                pending += missing
                continue
            one = pending.pop()
            if one not in self._shapes:
                self._shapes[one] = self._lengths(one, node)
                numbers = self._entries(one, node)
                if numbers is not None:
                    self._numbers[one] = numbers
        return self._shapes[value]

    def number(self, value: ir.Value | None, axis: int) -> int | None:
        """The length of one axis, counted from the end, where it is a number."""
        if value is None:
            return None
        known = self._learned.get((value, axis), dim(value, axis))
        if known is not None:
            return known
        found = self.shape(value)
        if found is None or -axis > len(found) or found[axis].symbols:
            return None
        return found[axis].factor

    def integers(self, value: ir.Value | None) -> list[int] | None:
        """The entries of a vector of integers, where constants and lengths decide them."""
        array = evaluate(value)
        if array is not None:
            return [int(one) for one in array.reshape(-1)] if array.dtype.kind == "i" else None
        if value is None or self.shape(value) is None:
            return None
        sizes = self._numbers.get(value)
        numbers = sizes.numbers if sizes is not None else None
        return None if numbers is None else [int(one) for one in numbers.reshape(-1)]

    def _lengths(self, value: ir.Value, node: ir.Node | None) -> Lengths | None:
        stated = shape_of(value)
        made: PartlyKnown | None = None
        if node is not None and stored_tensor(value) is None and _is_covered(node, value):
            inputs = [None if one is None else self._shapes[one] for one in node.inputs]
            numbers = [None if one is None else self._numbers.get(one) for one in node.inputs]
            made = lengths_after(node, inputs, [_sound(one) for one in numbers])
            if made is not None and node.op_type == "Split":
                made = self._part(made, node, value)
        if made is None:
            if stated is None:
                return None
            made = (None,) * len(stated)
        found = []
        for axis, one in zip(range(-len(made), 0), made, strict=True):
            known = self._learned.get((value, axis), dim(value, axis))
            unnamed = Length(1, (f"{value.name}.{id(value)}[{axis}]",))
            found.append(one or unnamed if known is None else Length(known))
        return tuple(found)

    def _part(self, made: PartlyKnown, node: ir.Node, part: ir.Value) -> PartlyKnown:
        """The lengths of one output of a Split, from those of its input."""
        axis = node.attributes.get_int("axis", 0) % len(made)
        sizes = node.attributes.get_ints("split")
        if sizes is None and len(node.inputs) > 1:
            array = evaluate(node.inputs[1])
            sizes = None if array is None else array.reshape(-1).tolist()
        place = part.index()
        known = Length(int(sizes[place])) if sizes is not None and place is not None else None
        return (*made[:axis], known, *made[axis + 1 :])

    def _entries(self, value: ir.Value, node: ir.Node | None) -> Sizes | None:
        """The entries of a tensor that shapes are worked out with."""
        array = _small(value, self._shapes[value])
        if array is not None:
            return Sizes(tuple(Length(int(one)) for one in array.reshape(-1)), array.ndim == 0)
        if node is None or node.domain != "" or not node.inputs or node.inputs[0] is None:
            return None
        if node.op_type == "Shape":
            found = self._shapes[node.inputs[0]]
            start, end = (node.attributes.get_int(name) for name in ("start", "end"))
            return None if found is None else Sizes(found[start:end])
        inputs = [None if one is None else self._numbers.get(one) for one in node.inputs]
        if inputs[0] is None:
            return None
        fractions = dtype_of(value) is None or dtype_of(value) not in _INTEGERS
        if node.op_type == "Cast" or node.op_type in _ROUNDINGS:
            return _rounded(node, inputs[0], fractions=fractions)
        found_sizes = follow_sizes(node, inputs)
        if node.op_type in _OPERATIONS and len(inputs) == 2 and inputs[1] is not None:
            return _combined(node, inputs[0], inputs[1], found_sizes, fractions=fractions)
        return found_sizes


def _is_covered(node: ir.Node, value: ir.Value) -> bool:
    """Whether the rules for shapes are about this output of a node."""
    summed = node.op_type.startswith("Skip") and value.index() == _SKIP_SUM
    return value.index() == 0 or node.op_type == "Split" or summed


def _small(value: ir.Value, lengths: Lengths | None) -> np.ndarray[Any, np.dtype[Any]] | None:
    """A constant of a few whole numbers, also as a floating type has them."""
    if lengths is None or len(lengths) > 1 or any(one.symbols for one in lengths):
        return None
    array = evaluate(value) if product(lengths).factor <= _LONGEST else None
    if array is None or array.dtype.kind not in "if":
        return None
    whole = np.all(np.isfinite(array)) and np.all(array == np.floor(array))
    return array if whole else None


def _with(lengths: Lengths, axis: int, length: Length) -> Lengths:
    axis %= len(lengths)
    return (*lengths[:axis], length, *lengths[axis + 1 :])


def _sound(sizes: Sizes | None) -> Sizes | None:
    """Entries as lengths: 0 and -1, whole positive products, and None for anything else."""
    if sizes is None:
        return None
    return Sizes(
        tuple(one if one is not None and _is_length(one) else None for one in sizes.entries),
        sizes.scalar,
    )


def _is_length(one: Length) -> bool:
    if not one.symbols:
        return True
    return one.factor > 0 and not any(s.startswith((_FRACTION, _SIGNED)) for s in one.symbols)


def _rounded(node: ir.Node, sizes: Sizes, *, fractions: bool) -> Sizes:
    """Lengths after a Cast or a rounding: the same, where they are whole numbers."""

    def apply(one: Length | None) -> Length | None:
        if one is None or (node.op_type == "Cast" and fractions):
            return one
        if not any(symbol.startswith(_FRACTION) for symbol in one.symbols):
            return one
        sign = _SIGNED if _may_be_negative(one) else ""
        return Length(1, (f"{sign}{node.op_type}({_text(one)})",))

    return Sizes(tuple(apply(one) for one in sizes.entries), sizes.scalar)


def _combined(
    node: ir.Node, left: Sizes, right: Sizes, known: Sizes | None, *, fractions: bool
) -> Sizes | None:
    """What an element-wise operation makes of lengths, named where it is no product."""
    count = max(len(left.entries), len(right.entries))
    if count > min(len(left.entries), len(right.entries)) > 1:
        return None
    found = known.entries if known is not None else (None,) * count
    pairs = zip(
        found,
        left.entries * (count // len(left.entries)),
        right.entries * (count // len(right.entries)),
        strict=True,
    )
    return Sizes(
        tuple(
            one if one is not None else _named(node.op_type, a, b, fractions=fractions)
            for one, a, b in pairs
        ),
        left.scalar and right.scalar,
    )


def _named(
    op_type: str, left: Length | None, right: Length | None, *, fractions: bool
) -> Length | None:
    if left is None or right is None:
        return None
    if op_type == "Div" and not fractions and not left.symbols and not right.symbols:
        return Length(left.factor // right.factor) if min(left.factor, right.factor) > 0 else None
    texts = [_text(left), _text(right)]
    if op_type in ("Add", "Max", "Min", "Mul"):
        texts.sort()
    parts = [left, right]
    sign = ""
    if op_type in ("Sub", "Mod") or any(_may_be_negative(one) for one in parts):
        sign = _SIGNED
    inexact = any(s.startswith(_FRACTION) for one in parts for s in one.symbols)
    if fractions and (op_type == "Div" or inexact):
        sign = _FRACTION + sign
    return Length(1, (f"{sign}{op_type}({', '.join(texts)})",))


def _may_be_negative(one: Length) -> bool:
    return one.factor <= 0 or any(_SIGNED in symbol for symbol in one.symbols)


def _text(one: Length) -> str:
    return "*".join((str(one.factor), *one.symbols))
