"""Positions and token types: what is added to the rows of tokens, and not made from them."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.region import Region, is_lookup, reads_shape
from onnx_tricks.patterns.states import Row

__all__ = ["find_added_rows"]

_PICKS = ("GatherND", "Slice")
_JOINING = frozenset(
    ("Add", "Concat", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Sum")
)


def find_added_rows(node: ir.Node, region: Region) -> str | None:
    """What a node adds to rows of a region that is not made from them; None where it does not.

    Args:
        node: A node that reads rows of the region and computes none.
        region: The region.

    Returns:
        The name of the table that the added rows come from, or of the rows.
    """
    if node.op_type not in _JOINING:
        return None
    for value in node.inputs[:2]:  # further ones of a norm that adds are its parameters
        if value is None or isinstance(region.states.get(value), Row):
            continue
        found, table = _origin(value, region)
        if found and (table is not None or node.op_type != "Concat"):
            return value.name if table is None else table
    return None


def _origin(value: ir.Value, region: Region) -> tuple[bool, str | None]:
    """Whether a value is made without rows of the region, and the nearest table it is made from.

    What attention makes of the rows holds rotated or biased positions, but is not positions.
    """
    table = value.name if is_constant(value) else None
    pending, seen = [value], {value}
    while pending:
        maker = pending.pop(0).producer()
        if maker is None or reads_shape(maker):
            continue
        source = maker.inputs[0] if maker.inputs else None
        picked = maker.op_type in _PICKS and source is not None and (rank_of(source) or 0) > 1
        if table is None and source is not None and is_constant(source):
            table = source.name if picked or is_lookup(maker) else None
        for operand in maker.inputs:
            if operand is None or operand in seen:
                continue
            if isinstance(region.states.get(operand), Row):
                return False, None
            seen.add(operand)
            pending.append(operand)
    return True, table
