"""All of a model's graphs: the main one, those of its functions, and the subgraphs in either."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["bodies", "initializers", "inner_graphs"]


def bodies(model: ir.Model) -> list[ir.Graph | ir.Function]:
    """The main graph and the functions; `all_nodes` of each reaches its subgraphs."""
    return [model.graph, *model.functions.values()]


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers of all graphs, at every depth."""
    yield from model.graph.initializers.values()
    for body in bodies(model):
        for graph in body.subgraphs():
            yield from graph.initializers.values()


def inner_graphs(node: ir.Node) -> list[ir.Graph]:
    """The subgraphs that a node holds, as branches or as a body."""
    return [
        attribute.as_graph()
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref()
    ]
