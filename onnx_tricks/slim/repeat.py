"""Nodes repeated on another value than the one that they were written for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.shapes import dtype_of
from onnx_tricks.graph.traverse import inner_graphs
from onnx_tricks.slim.dependence import computed_from

__all__ = ["repeat_on", "rounds_between"]

_HALF = frozenset((ir.DataType.FLOAT16, ir.DataType.BFLOAT16))


def repeat_on(
    build: Builder,
    values: Iterable[ir.Value],
    source: ir.Value,
    new: ir.Value,
    *,
    wide: bool = False,
) -> list[ir.Value]:
    """Repeat the nodes between a value and what is computed from it, on another value.

    Args:
        build: Makes the nodes.
        values: What is computed.
        source: What it is computed from, integers where `wide`; anything else that enters is
            shared.
        new: Takes the place of `source`.
        wide: Whether what is in half precision is computed in float32 instead.

    Returns:
        The counterparts of `values`.
    """
    dependent = computed_from([source], shapes=True)
    known: dict[ir.Value, ir.Value] = {source: new}

    def counterpart(value: ir.Value) -> ir.Value:
        if value not in known:
            node = value.producer()
            half = wide and dtype_of(value) in _HALF
            if node is None or value not in dependent:
                known[value] = build.Cast(value, to=ir.DataType.FLOAT) if half else value
                return known[value]
            inputs = [None if v is None else counterpart(v) for v in node.inputs]
            if half and node.op_type == "Cast":
                known[value] = build.Cast(inputs[0], to=ir.DataType.FLOAT)
                return known[value]
            attributes = list(node.attributes.values())
            outputs = build.node(node.domain, node.op_type, inputs, attributes, len(node.outputs))
            known.update(zip(node.outputs, outputs, strict=True))
            if half and not any(v is not None and dtype_of(v) in _HALF for v in node.inputs):
                known[value] = build.Cast(known[value], to=ir.DataType.FLOAT)
        return known[value]

    return [counterpart(value) for value in values]


def rounds_between(values: Iterable[ir.Value], source: ir.Value) -> bool:
    """Whether anything is computed in half precision between integers and what follows from them.

    Args:
        values: What follows.
        source: The integers.
    """
    nodes = list(_between(values, source))
    shared = [v for node in nodes for v in node.inputs if v is not None]
    inner = any(inner_graphs(node) for node in nodes)
    if inner or any(dtype_of(one) is None for one in shared):
        return False  # it cannot be repeated in another type
    return any(dtype_of(one) in _HALF for one in shared)


def _between(values: Iterable[ir.Value], source: ir.Value) -> Iterator[ir.Node]:
    dependent, pending, seen = computed_from([source], shapes=True), list(values), set[ir.Node]()
    while pending:
        value = pending.pop()
        node = value.producer()
        if value is source or value not in dependent or node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending += [one for one in node.inputs if one is not None]
