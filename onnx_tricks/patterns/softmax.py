"""What happens to attention weights between the softmax and the product with the values."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.names import described
from onnx_tricks.patterns.contraction import Product, find_product

__all__ = ["Weights", "follow_weights"]

_VIEWS = frozenset("Reshape Squeeze Unsqueeze".split())
_SAME = frozenset("Cast Dropout Identity".split())
_MAX_NODES = 30


@dataclasses.dataclass(frozen=True)
class Weights:
    """The attention weights, behind the softmax.

    Attributes:
        softmax: The softmax.
        value: The weights that the values are multiplied with.
        safe: Whether rows in which everything is masked are zeros, and do not sum to one.
        product: The product with the values.
    """

    softmax: ir.Node
    value: ir.Value
    safe: bool
    product: Product


def follow_weights(softmax: ir.Node) -> Weights | str | None:
    """Go on from a softmax to the product with the values; None where there is none."""
    value, safe = softmax.outputs[0], False
    passed: list[ir.Value] = []
    for _ in range(_MAX_NODES):
        passed.append(value)
        readers = [
            reader for reader in value.consumers() if reader.op_type not in ("Shape", "IsNaN")
        ]
        product = next(
            (
                found
                for reader in readers
                if reader.inputs[0] is value and (found := find_product(reader))
            ),
            None,
        )
        if product is not None:
            return Weights(softmax, value, safe, product)
        following = [reader for reader in readers if reader.op_type not in ("Where", "ReduceSum")]
        selected = [reader for reader in readers if reader.op_type == "Where"]
        if selected:
            if not _is_safe(selected[0], passed, softmax):
                return f"{described(selected[0])} replaces attention weights"
            value, safe = selected[0].outputs[0], True
        elif len(following) == 1 and following[0].op_type in {*_SAME, *_VIEWS}:
            value = following[0].outputs[0]
        elif len(following) == 1 and following[0].op_type == "Slice":
            return f"{described(following[0])} cuts attention weights, as sinks of attention need"
        elif len(following) == 1 and following[0].op_type in ("Mul", "Einsum"):
            return (
                f"{described(following[0])} does more than multiply attention weights with values"
            )
        else:
            return None
    return None


def _is_safe(where: ir.Node, weights: list[ir.Value], softmax: ir.Node) -> bool:
    """Whether a Where puts zeros into rows in which everything is masked, and nothing else.

    Args:
        where: The node.
        weights: The attention weights on their way to it: perhaps cast.
        softmax: The softmax.
    """
    condition, first, second = where.inputs
    if condition is None or second is not weights[-1] or not _is_zero(first):
        return False
    node = condition.producer()
    if node is None:
        return False
    if node.op_type == "IsNaN":
        return node.inputs[0] in weights
    return _all_masked(condition, softmax.inputs[0])


def _is_zero(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    if node is not None and node.op_type in ("Expand", "Cast"):
        return _is_zero(node.inputs[0])
    if node is not None and node.op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        return fill is None or not np.any(fill.as_tensor().numpy())
    constant = evaluate(value)
    return constant is not None and not np.any(constant)


def _all_masked(condition: ir.Value, scores: ir.Value | None) -> bool:
    """Whether a condition says that every score of a row is minus infinity."""
    seen = set()
    pending = [condition]
    reduced = False
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == "Equal":
            return reduced and scores in node.inputs
        if node.op_type == "IsInf":
            return reduced and node.inputs[0] is scores
        reduced = reduced or node.op_type.startswith("Reduce")
        allowed = ("Not", "Cast", "ReduceMax", "ReduceMin", "ReduceSum", "Expand", "Squeeze")
        if node.op_type not in (*allowed, "Unsqueeze", "ReduceProd"):
            return False
        pending += [one for one in node.inputs[:1] if one is not None]
    return False
