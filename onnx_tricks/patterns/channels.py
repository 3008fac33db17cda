"""Where the channels of a value lie while operators move them about."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.patterns.layout import Length

__all__ = ["Channels", "Moved", "Obstacle"]


@dataclasses.dataclass(frozen=True)
class Channels:
    """The channels that a value holds.

    Attributes:
        axis: Where they lie, counted from the end.
        pieces: Which channels lie there, in their order: all of them, those that a Split left,
            or several copies side by side.
        scale: The number by which every channel was multiplied on the way.
        uneven: What keeps rows from being scaled alike, so that a constant added to each channel is
            no longer the same in every row; empty when nothing does.
        heads: Whether the axis is that of heads into which the channels were cut, so that each of
            its places holds as many different channels as there are heads.
        assumed: Whether the axis has as many places as there are channels only if the model runs
            at all: what reads it must say so.
        inner: How many numbers of one channel follow each other along the axis, which others
            share, while a map is taken apart; None where the axis holds nothing but channels.
    """

    axis: int
    pieces: tuple[range, ...]
    scale: float = 1.0
    uneven: str = ""
    heads: bool = False
    assumed: bool = False
    inner: Length | None = None

    @classmethod
    def all(cls, axis: int, width: int) -> Channels:
        """All channels, on one axis."""
        return cls(axis, (range(width),))

    @property
    def width(self) -> int:
        """Number of places on the axis."""
        return sum(map(len, self.pieces))

    @property
    def order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Which channel lies at each place, [width]."""
        return np.asarray([one for piece in self.pieces for one in piece], dtype=np.int64)

    @property
    def regular(self) -> bool:
        """Whether places are channels of one row in their order, as far as is known for sure."""
        return len(self.pieces) == 1 and not self.assumed and self.inner is None

    def is_row(self, width: int) -> bool:
        """Whether these are all channels of a row, for sure."""
        return self.regular and not self.heads and self.pieces == (range(width),)

    def cut(self, places: slice) -> tuple[range, ...]:
        """The pieces that lie at some places."""
        chosen, before = [], 0
        step = places.step or 1
        first, last, _ = places.indices(self.width)
        for piece in self.pieces:
            inside = range(first, last, step)
            start = next((one for one in inside if one >= before), last) - before
            chosen.append(piece[max(start, 0) : max(last - before, 0) : step])
            before += len(piece)
        return tuple(one for one in chosen if one)


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """A reader through which channels cannot be followed: the node (if any) and what it does."""

    node: ir.Node | None
    reason: str

    def __str__(self) -> str:
        if self.node is None:
            return self.reason
        return f"{self.node.op_type} {self.node.name or self.node.outputs[0].name!r} {self.reason}"


Moved = list[tuple[ir.Value, Channels]]
"""Values that hold channels after an operator, and where."""
