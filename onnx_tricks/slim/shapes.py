"""Shapes without the values: graphs read the shape of what is no longer computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnx_tricks.graph.traverse import inner_graphs
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.slim.dimensions import Dimensions, Length
from onnx_tricks.slim.states import builder_before

__all__ = ["free_shapes"]


def free_shapes(
    model: ir.Model,
    known: Mapping[ir.Value, Sequence[Length]],
    run: DryRun,
    *,
    going: bool = True,
) -> None:
    """Let no value be computed only because something reads its shape.

    Args:
        model: The model.
        known: The shapes of some inputs, which nothing is to read off them.
        run: A dry run of the model, for ranks.
        going: Whether those inputs are to go.
    """
    for graph in model.graphs():
        needed = _needed(graph)
        shapes = Dimensions(needed, known, run, going=going)
        for node in list(graph):
            value = node.inputs[0] if node.inputs else None
            if node.op_type != "Shape" or node.domain or value is None:
                continue
            if node.outputs[0].is_graph_output():
                continue
            if value in known or (value.producer() is not None and value.producer() not in needed):
                _free(model, node, shapes)


def _needed(graph: ir.Graph) -> set[ir.Node]:
    """The nodes of a graph whose results are needed for more than their shape."""
    pending = list(graph.outputs)
    for node in graph.all_nodes():
        if node.graph is not graph:
            pending += [value for value in node.inputs if value is not None]
    found: set[ir.Node] = set()
    while pending:
        maker = pending.pop().producer()
        if maker is None or maker in found or maker.graph is not graph:
            continue
        found.add(maker)
        if maker.op_type != "Shape":
            pending += [value for value in maker.inputs if value is not None]
        for inner in inner_graphs(maker):
            pending += [v for n in inner.all_nodes() for v in n.inputs if v is not None]
            pending.extend(inner.outputs)
    return found


def _free(model: ir.Model, node: ir.Node, shapes: Dimensions) -> None:
    """Give the readers of a Shape node what it would have given."""
    value = node.inputs[0]
    assert value is not None
    build = builder_before(model, node, node.name or "Shape")
    dims = shapes.at(build).of(value)
    if dims is None:
        return
    start, end = node.attributes.get_int("start", 0), node.attributes.get("end")
    dims = dims[start : None if end is None else end.as_int()]
    node.outputs[0].replace_all_uses_with(shapes.tensor(dims))
