"""Key/value caches: what is appended to a past, and where the result leaves the graph."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.patterns.axes import Axes
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.patterns.pasts import VIEWS, is_lone, past_behind

__all__ = ["STACKED", "Cache", "axes_behind", "leaving"]

STACKED = (
    "it keeps keys and values in one tensor: export the decoder with a past of keys and one of "
    "values for each layer, as Optimum does"
)
"""Why a cache that holds both is left alone."""

_MAX_NODES = 30


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


def leaving(run: DryRun, value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """A view of a value by which it leaves its graph, and the output of the main graph it is."""
    pending = [value]
    for _ in range(_MAX_NODES):
        if not pending:
            return None
        value = pending.pop(0)
        if value.is_graph_output():
            outer = _outer(run, value)
            if outer is not None:
                return value, outer
        pending += [
            reader.outputs[0]
            for reader in value.consumers()
            if reader.domain == ""
            and (reader.op_type in VIEWS or is_lone(reader))
            and reader.inputs[0] is value
        ]
    return None


def _outer(run: DryRun, value: ir.Value) -> ir.Value | None:
    """The output of the main graph that an output of any graph becomes, or is a view of."""
    graph = value.graph
    if graph not in run.parents:
        return value
    assert isinstance(graph, ir.Graph)
    place = next(i for i, output in enumerate(graph.outputs) if output is value)
    found = leaving(run, run.parents[graph].outputs[place])
    return None if found is None else found[1]
