"""Which values of a graph depend on which others."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["computed_from", "is_computed_from", "sources_of"]


def computed_from(
    sources: Iterable[ir.Value], *, shapes: bool = False, ends: Iterable[ir.Value] = ()
) -> set[ir.Value]:
    """The values that cannot be computed without some others, those included.

    Args:
        sources: The others.
        shapes: Whether to count what needs no more than their shapes, too.
        ends: Values behind which nothing is looked for.
    """
    found, last = set(sources), set(ends)
    pending = list(found - last)
    while pending:
        for node in pending.pop().consumers():
            if shapes or node.op_type != "Shape":
                new = {output for output in node.outputs if output not in found}
                pending += new - last
                found |= new
    return found


def is_computed_from(value: ir.Value, source: ir.Value) -> bool:
    """Whether a value depends on the numbers, and not the shape alone, of another."""
    return source in sources_of(value)


def sources_of(value: ir.Value) -> set[ir.Value]:
    """Everything whose numbers a value depends on."""
    pending, seen = [value], {value}
    while pending:
        node = pending.pop().producer()
        if node is not None and node.op_type != "Shape":
            pending += [v for v in node.inputs if v is not None and v not in seen]
            seen.update(v for v in node.inputs if v is not None)
    return seen
