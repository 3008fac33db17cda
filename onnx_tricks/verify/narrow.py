"""The original with caches of a narrower type: what a candidate with such caches is held to."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.edit import fresh_name
from onnx_tricks.graph.interface import Interface, read_interface

__all__ = ["narrow_caches", "narrower"]


def narrower(original: Interface, candidate: Interface) -> ir.DataType | None:
    """The type of a candidate's caches, where it is narrower than that of the original's."""
    ours, theirs = (
        {v.dtype for v in one.role("cache") if v.dtype.is_floating_point()}
        for one in (original, candidate)
    )
    if len(ours) != 1 or len(theirs) != 1:
        return None
    (wide,), (narrow,) = ours, theirs
    return narrow if narrow.itemsize < wide.itemsize else None


def narrow_caches(model: ir.Model, dtype: ir.DataType) -> None:
    """Round everything that a model caches to a type, in place; its interface stays."""
    presents = read_interface(model).presents
    for graph in model.graphs():
        for value in list(graph.outputs):
            if value.name in presents.values() and value.producer() is not None:
                _round(model, value, dtype)
    for value in list(model.graph.inputs):
        if value.name in presents:
            _round(model, value, dtype)


def _round(model: ir.Model, value: ir.Value, dtype: ir.DataType) -> None:
    """Let the readers of a value read it as it comes out of a cache."""
    for graph in {node.graph for node in value.consumers()}:
        if not isinstance(graph, ir.Graph):
            continue
        readers = [(node, index) for node, index in value.uses() if node.graph is graph]
        first = next(node for node in graph if node in {reader for reader, _ in readers})

        def place(node: ir.Node, graph: ir.Graph = graph, first: ir.Node = first) -> None:
            graph.insert_before(first, node)

        build = Builder(place, lambda op: fresh_name(model, f"{value.name}/{op}"))
        assert value.dtype is not None
        rounded = build.Cast(build.Cast(value, to=dtype), to=value.dtype)
        for node, index in readers:
            if node.op_type != "If":
                node.replace_input_with(index, rounded)
