"""Learned positions and token types: rows of a second table, added to those of the tokens."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.region import Region, is_lookup
from onnx_tricks.patterns.states import Row

__all__ = ["find_added_table"]

_FAR = 30  # nodes between the table and the sum
_JOINING = frozenset(("Add", "Concat", "SkipLayerNormalization", "Sum"))


def find_added_table(node: ir.Node, region: Region) -> str | None:
    """The name of a constant whose rows a node adds to those of a region; None where it does not.

    Args:
        node: A node that reads rows of the region and computes none.
        region: The region.
    """
    if node.op_type not in _JOINING:
        return None
    pending, seen = list(node.inputs), {node}
    while pending and len(seen) < _FAR:
        value = pending.pop(0)
        maker = value.producer() if value is not None else None
        if value is None or maker is None or maker in seen:
            continue
        if isinstance(region.states.get(value), Row):
            continue
        seen.add(maker)
        source = maker.inputs[0] if maker.inputs else None
        sliced = maker.op_type == "Slice" and source is not None and (rank_of(source) or 0) > 1
        if source is not None and is_constant(source) and (sliced or is_lookup(maker)):
            return source.name
        pending += maker.inputs
    return None
