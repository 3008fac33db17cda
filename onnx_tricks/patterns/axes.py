"""What the axes of a value run over, read off from where its numbers came from."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from onnx_tricks.patterns.arithmetic import Array

__all__ = ["Axes", "complete", "read_axes"]

Axes = tuple[str, ...]
"""By axis the letters of what it runs over, slowest first, as in ``("b", "h", "s", "k")`` or
``("bh", "s", "k")``: b batch, h heads, s tokens of the sequence, k channels of a head. An axis of
length one has no letter where nothing tells what it stands for."""


def read_axes(coordinates: Mapping[str, Array]) -> Axes:
    """Read the axes of a value.

    Args:
        coordinates: By letter an array of the value's shape: which batch, head, ... each of its
            numbers belongs to.
    """
    (rank,) = {array.ndim for array in coordinates.values()}
    return tuple(_letters(coordinates, axis) for axis in range(rank))


def complete(axes: Axes, sequence: int | None = None) -> Axes:
    """Name the axes of length one: what is missing of b, h, s, k, in this order.

    Args:
        axes: The axes.
        sequence: The axis of the sequence, where it is known.
    """
    found = list(axes)
    if sequence is not None and not found[sequence] and "s" not in "".join(found):
        found[sequence] = "s"
    missing = [letter for letter in "bhsk" if letter not in "".join(found)]
    empty = [place for place, letters in enumerate(found) if not letters]
    if len(missing) == len(empty):
        for place, letter in zip(empty, missing, strict=True):
            found[place] = letter
    return tuple(found)


def _letters(coordinates: Mapping[str, Array], axis: int) -> str:
    changes = {}
    for letter, array in coordinates.items():
        front = (slice(None),) * axis
        differs = array[(*front, slice(1, None))] != array[(*front, slice(None, -1))]
        others = tuple(place for place in range(array.ndim) if place != axis)
        steps = int(np.count_nonzero(np.any(differs, axis=others)))
        if steps:
            changes[letter] = steps
    return "".join(sorted(changes, key=lambda letter: changes[letter]))
