"""Integers by which a caller tells a decoder where in the context its new tokens are."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant

__all__ = ["INTEGERS", "places_tokens"]

INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
"""The types of token ids and positions."""

_CARRIERS = frozenset("Cast Identity Reshape Squeeze Unsqueeze".split())


def places_tokens(value: ir.Value, inputs: Iterable[ir.Value]) -> bool:
    """Whether a graph input is where the new tokens begin, or where each of them is.

    Those with a batch, [B, T], are told from token ids by their name alone, and not here.

    Args:
        value: The input, a number or [T].
        inputs: All inputs, the first axes of which tell how the batch is called.
    """
    shape = value.shape
    if shape is None or len(shape) > 1 or value.dtype not in INTEGERS:
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
            elif _counts_from(node, index) or (several and _looks_up(node, index)):
                return True
    return False


def _counts_from(node: ir.Node, index: int) -> bool:
    """Whether a number begins a range, is added to one, or begins a slice of a table."""
    if node.op_type == "Add":
        source = node.inputs[1 - index]
        while source is not None and (maker := source.producer()) is not None:
            if maker.op_type not in _CARRIERS:
                return maker.op_type == "Range"
            source = maker.inputs[0]
        return False
    if node.op_type == "Slice":
        return index == 1 and _is_table(node)
    return node.op_type == "Range" and index == 0


def _looks_up(node: ir.Node, index: int) -> bool:
    return node.op_type in ("Gather", "GatherND") and index == 1 and _is_table(node)


def _is_table(node: ir.Node) -> bool:
    return node.inputs[0] is not None and is_constant(node.inputs[0])
