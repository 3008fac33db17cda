"""Key/value caches: what is appended to a past, and where the result leaves the graph."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.patterns.axes import Axes
from onnx_tricks.patterns.dry_run import DryRun

__all__ = ["STACKED", "Cache", "appended", "input_behind", "is_lone", "leaving"]

STACKED = (
    "it keeps keys and values in one tensor: export the decoder with a past of keys and one of "
    "values for each layer, as Optimum does"
)
"""Why a cache that holds both is left alone."""

_VIEWS = frozenset("Cast Identity Reshape Squeeze Transpose Unsqueeze".split())
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
        axes: What the axes of `past` and `present` run over.
    """

    past: ir.Value | None
    new: ir.Value | None
    present: ir.Value
    output: ir.Value | None
    node: ir.Node | None
    axes: Axes


def appended(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The graph input and what a Concat appends to it; None for any other node."""
    if node.op_type != "Concat" or node.domain != "" or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    source = input_behind(past)
    if source is None or new is None or input_behind(new) is not None:
        return None
    return source, new


def is_lone(node: ir.Node) -> bool:
    """Whether a node joins one value with nothing, as tracers write a cache that is empty."""
    return node.op_type == "Concat" and node.domain == "" and len(node.inputs) == 1


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
            and (reader.op_type in _VIEWS or is_lone(reader))
            and reader.inputs[0] is value
        ]
    return None


def input_behind(value: ir.Value | None) -> ir.Value | None:
    """The graph input that a value is a view of."""
    for _ in range(_MAX_NODES):
        if value is None or value.is_graph_input():
            break
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type not in {*_VIEWS, "Gather", "Split"} and not is_lone(node):
            return None
        value = node.inputs[0]
    return value


def _outer(run: DryRun, value: ir.Value) -> ir.Value | None:
    """The output of the main graph that an output of any graph becomes."""
    while (graph := value.graph) in run.parents:
        assert isinstance(graph, ir.Graph)
        place = next(i for i, output in enumerate(graph.outputs) if output is value)
        value = run.parents[graph].outputs[place]
        if not value.is_graph_output():
            return None
    return value
