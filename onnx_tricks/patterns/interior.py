"""The nodes between two values, and whether anything outside reads what they pass on."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant

__all__ = ["interior", "leads_only_to", "leak"]


def interior(output: ir.Value, source: ir.Value) -> set[ir.Node]:
    """The nodes that make one value of another, without those that make constants of theirs."""
    found: set[ir.Node] = set()
    pending = [output]
    while pending:
        value = pending.pop()
        node = value.producer()
        if value is source or node is None or node in found or is_constant(value):
            continue
        found.add(node)
        pending += [operand for operand in node.inputs if operand is not None]
    return found


def leak(nodes: set[ir.Node], output: ir.Value) -> ir.Value | None:
    """A value other than the output that nodes pass on to anything but themselves, if any."""
    for node in nodes:
        for value in node.outputs:
            outside = value.is_graph_output() or any(
                reader not in nodes for reader in value.consumers()
            )
            if outside and value is not output and not is_constant(value):
                return value
    return None


def leads_only_to(value: ir.Value, ends: set[ir.Value]) -> bool:
    """Whether nothing is made of a value but what some others are made of."""
    pending, seen = [value], {value, *ends}
    while pending:
        one = pending.pop()
        if one.is_graph_output():
            return False
        for node in one.consumers():
            pending += [output for output in node.outputs if output not in seen]
            seen.update(node.outputs)
    return True
