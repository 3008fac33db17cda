"""Which axes of a value run over tokens, and which over the numbers of one token.

An axis is a product of factors in row-major order: numbers, and symbols for the axes of the token
ids. `[batch * tokens, width]` is `((B, T), (width,))`, and a reshape regroups factors, so that
tokens stay apart from each other through any flattening that exporters write.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = [
    "Axis",
    "Layout",
    "Length",
    "axis_of",
    "broadcast",
    "inner_size",
    "length_of",
    "regroup",
    "replaced",
    "symbols",
]

Axis = tuple[int | str, ...]
Layout = tuple[Axis, ...]


class Length(NamedTuple):
    """A length: a number times symbols, which are sorted."""

    factor: int = 1
    symbols: tuple[str, ...] = ()

    def times(self, other: Length) -> Length:
        """The product."""
        return Length(self.factor * other.factor, tuple(sorted(self.symbols + other.symbols)))

    def over(self, other: Length) -> Length | None:
        """The quotient, or None where it is not known to be whole."""
        left = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in left:
                return None
            left.remove(symbol)
        if other.factor == 0 or self.factor % other.factor:
            return None
        return Length(self.factor // other.factor, tuple(left))


def length_of(axis: Axis) -> Length:
    """The length of an axis."""
    named = tuple(sorted(factor for factor in axis if isinstance(factor, str)))
    return Length(math.prod(factor for factor in axis if isinstance(factor, int)), named)


def axis_of(length: int | Length) -> Axis:
    """An axis of some length."""
    number, named = (length, ()) if isinstance(length, int) else length
    return named if number == 1 else (*named, number)


def replaced(layout: Layout, place: int, axis: Axis) -> Layout:
    """The layout with one axis replaced."""
    return (*layout[:place], axis, *layout[place + 1 :])


def inner_size(axis: Axis) -> int | None:
    """The length of an axis that runs over numbers of one token; None for any other."""
    length = length_of(axis)
    return None if length.symbols else length.factor


def symbols(layout: Layout) -> list[str]:
    """The symbols of a layout, in row-major order."""
    return [factor for axis in layout for factor in axis if isinstance(factor, str)]


def broadcast(layouts: Sequence[Layout]) -> Layout | None:
    """The layout of an element-wise operator's result, or None where rows of tokens would mix.

    Axes are aligned from the end. They have to be equal, or of length one: an axis over tokens
    beside one of as many numbers is a function of the position.
    """
    rank = max(map(len, layouts), default=0)
    result: list[Axis] = []
    for place in range(-rank, 0):
        found = {layout[place] for layout in layouts if len(layout) >= -place} - {()}
        if len(found) > 1:
            return None
        result.append(found.pop() if found else ())
    return tuple(result)


def regroup(
    layout: Layout, wanted: Sequence[Length | None], fixed: Mapping[str, int]
) -> Layout | None:
    """The layout after a reshape.

    Args:
        layout: The layout before it.
        wanted: The new lengths; one may be unknown (None).
        fixed: Lengths of symbols, where the model fixes them.

    Returns:
        The new layout, or None where it cannot be told.
    """
    lengths = _completed(layout, wanted)
    if lengths is None:
        return None
    left = _merged([factor for axis in layout for factor in axis])
    result: list[Axis] = []
    for place, length in enumerate(lengths, 1):
        taken = _take(left, length, fixed)
        if taken is None:
            return None
        later = {symbol for one in lengths[place:] for symbol in one.symbols}
        # An axis of length one may stand anywhere, but for one that is asked for by its name.
        while left and fixed.get(str(left[0])) == 1 and left[0] not in later:
            taken.append(left.pop(0))
        result.append(tuple(_merged(taken)))
    return None if left else tuple(result)


def _completed(layout: Layout, wanted: Sequence[Length | None]) -> list[Length] | None:
    """The wanted lengths, the unknown one among them worked out from the others."""
    unknown = wanted.count(None)
    if unknown > 1:
        return None
    total, known = Length(), Length()
    for axis in layout:
        total = total.times(length_of(axis))
    for length in wanted:
        known = known.times(length or Length())
    rest = total.over(known) if unknown else Length()
    if rest is None:
        return None
    return [rest if length is None else length for length in wanted]


def _take(
    left: list[int | str], length: Length, fixed: Mapping[str, int]
) -> list[int | str] | None:
    """Take the factors of one axis off the front of a list."""
    taken: list[int | str] = []
    number, named = length.factor, list(length.symbols)
    while number != 1 or named:
        if not left or number < 1:
            return None
        factor = left.pop(0)
        if isinstance(factor, str):
            if factor in named:
                named.remove(factor)
            elif number % fixed.get(factor, number + 1) == 0:
                number //= fixed[factor]
            else:
                return None
        elif number % factor == 0:
            number //= factor
        elif factor % number == 0 and not named:
            left.insert(0, factor // number)
            factor, number = number, 1
        else:
            return None
        taken.append(factor)
    return taken


def _merged(factors: Sequence[int | str]) -> list[int | str]:
    """Factors with neighbouring numbers multiplied and ones left out."""
    result: list[int | str] = []
    for factor in factors:
        if factor == 1:
            continue
        if result and isinstance(factor, int) and isinstance(result[-1], int):
            result[-1] *= factor
        else:
            result.append(factor)
    return result
