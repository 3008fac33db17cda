"""Products with quantised weights, behind whatever stands in the way of a recogniser."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.graph.names import described

__all__ = ["QUANTISED", "QUANTISED_PRODUCTS", "quantised_behind"]

QUANTISED = "the weights of {} are quantised: run onnx-tricks first, and quantise what it writes"
"""Why a product with quantised weights is left alone."""

QUANTISED_PRODUCTS = frozenset(
    "DynamicQuantizeMatMul MatMulBnb4 MatMulFpQ4 MatMulInteger MatMulIntegerToFloat MatMulNBits "
    "QGemm QLinearMatMul QOrderedMatMul".split()
)
"""Operators that multiply with quantised weights."""

_LAYERS = frozenset(("FusedMatMul", "Gemm", "MatMul"))
_MAX_NODES = 200  # among them all that angles of a rotation come from


def quantised_behind(value: ir.Value) -> str:
    """Say which product with quantised weights a value comes from; empty where from none.

    Args:
        value: Heads, somewhere on their way from a projection. The search goes back from here and
            past no other product.
    """
    pending, seen = [value], {value}
    for _ in range(_MAX_NODES):
        if not pending:
            break
        node = pending.pop(0).producer()
        if node is None:
            continue
        if node.op_type in QUANTISED_PRODUCTS or _is_dequantised(node):
            return QUANTISED.format(described(node))
        if node.op_type not in {*_LAYERS, "Shape"}:
            found = [one for one in node.inputs if one is not None and one not in seen]
            seen.update(found)
            pending += found
    return ""


def _is_dequantised(node: ir.Node) -> bool:
    """Whether a layer's weight is dequantised before it is read."""
    weight = node.inputs[1] if node.op_type in _LAYERS and len(node.inputs) > 1 else None
    while weight is not None and (maker := weight.producer()) is not None:
        if maker.op_type == "DequantizeLinear":
            return True
        if maker.op_type not in ("Cast", "Transpose") or maker.inputs[0] is None:
            break
        weight = maker.inputs[0]
    return False
