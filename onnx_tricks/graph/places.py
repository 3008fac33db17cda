"""Integers by which a caller tells a decoder where in the context its new tokens are."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["places_tokens"]

_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
_CARRIERS = frozenset("Cast Identity Reshape Squeeze Unsqueeze".split())
# A first position is added to a range, or begins one, or a slice of a table.
_FIRST = frozenset((("Add", 0), ("Add", 1), ("Range", 0), ("Slice", 1)))


def places_tokens(value: ir.Value, inputs: Iterable[ir.Value]) -> bool:
    """Whether a graph input is where the new tokens begin, or where each of them is.

    Those with a batch, [B, T], are told from token ids by their name alone, and not here.

    Args:
        value: The input, a number or [T].
        inputs: All inputs, the first axes of which tell how the batch is called.
    """
    shape = value.shape
    if shape is None or len(shape) > 1 or value.dtype not in _INTEGERS:
        return False
    several = len(shape) == 1 and shape[0] != 1
    rows = {one.shape[0] for one in inputs if one.shape is not None and len(one.shape) > 1}
    if several and shape[0] in rows:
        return False
    pending = [value]
    while pending:
        for node, index in pending.pop().uses():
            if node.op_type in _CARRIERS:
                pending += node.outputs
            elif (node.op_type, index) in _FIRST or (several and "Gather" in node.op_type):
                return True
    return False
