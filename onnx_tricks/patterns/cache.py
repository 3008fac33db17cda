"""Key/value caches: what is appended to a past, and where the result leaves the graph."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.graph.pasts import past_behind
from onnx_tricks.patterns.axes import Axes

__all__ = ["STACKED", "Cache", "axes_behind"]

STACKED = (
    "it keeps keys and values in one tensor: export the decoder with a past of keys and one of "
    "values for each layer, as Optimum does"
)
"""Why a cache that holds both is left alone."""


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys or values that are kept from step to step.

    Attributes:
        past: The graph input that holds those of earlier steps; None where the graph only makes
            the first ones.
        new: Those of the tokens of this step; None where it adds none, as to a cache of encoder
            states.
        present: Both together, as they are kept.
        output: The graph output they leave by; None where none is theirs alone.
        node: What joins them: a Concat, or the fused attention operator; None where nothing does.
        axes: What the axes of `present` run over.
        past_axes: What those of `past` run over; None where that cannot be told.
    """

    past: ir.Value | None
    new: ir.Value | None
    present: ir.Value
    output: ir.Value | None
    node: ir.Node | None
    axes: Axes
    past_axes: Axes | None = None


def axes_behind(view: ir.Value | None, axes: Axes) -> Axes | None:
    """What the axes of the input that a value is a view of run over; None where it cannot be told.

    Args:
        view: The value.
        axes: What its axes run over.
    """
    past = past_behind(view)
    if past is None or len(past.axes) != len(axes):
        return None
    letters = dict(zip(past.axes, axes, strict=True))
    return tuple(letters.get(axis, "") for axis in range(past.rank))
