"""Products of two activations, each side as rows to be multiplied."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.heads import Operand

__all__ = ["Product", "find_product"]


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of two activations.

    Attributes:
        node: The MatMul or Einsum.
        left: Its rows, [..., T, X] when unpacked.
        right: Its columns, [..., S, X] when unpacked: X is summed over.
        scale: A number by which the operator multiplies the product.
    """

    node: ir.Node
    left: Operand
    right: Operand
    scale: float = 1.0


def find_product(node: ir.Node | None) -> Product | None:
    """Read a node as the product of two activations."""
    if node is None or any(is_constant(operand) for operand in node.inputs):
        return None
    if node.op_type in ("MatMul", "FusedMatMul") and len(node.inputs) == 2:
        left, right = node.inputs
        assert left is not None
        assert right is not None
        flags = [_is_set(node, name) for name in ("transA", "transB")]
        if _is_set(node, "transBatchA") or _is_set(node, "transBatchB"):
            return None
        scale = node.attributes.get_float("alpha", 1.0) if node.op_type == "FusedMatMul" else 1.0
        return Product(
            node,
            Operand(left, _turned if flags[0] else _straight),
            Operand(right, _straight if flags[1] else _turned),
            scale,
        )
    if node.op_type == "Einsum":
        return _einsum(node)
    return None


def _einsum(node: ir.Node) -> Product | None:
    left, _, right = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or "." in left or any(len(set(one)) != len(one) for one in (*terms, right)):
        return None
    summed = [one for one in terms[0] if one in terms[1] and one not in right]
    shared = [one for one in terms[0] if one in terms[1] and one in right]
    own = [
        [one for one in term if one in right and one not in other]
        for term, other in (terms, terms[::-1])
    ]
    if len(summed) != 1 or any(len(one) != 1 for one in own):
        return None
    if right[-2:] != own[0][0] + own[1][0]:
        return None
    batch = [one for one in right if one in shared]
    operands = []
    for value, term, free in zip(node.inputs, terms, own, strict=True):
        assert value is not None
        order = [term.index(one) for one in (*batch, free[0], summed[0])]
        operands.append(Operand(value, _transposed(order)))
    return Product(node, operands[0], operands[1])


def _transposed(order: list[int]) -> Callable[[Array], Array]:
    return lambda array: np.transpose(array, order)


def _straight(array: Array) -> Array:
    return array


def _turned(array: Array) -> Array:
    return np.swapaxes(array, -1, -2)


def _is_set(node: ir.Node, name: str) -> bool:
    return node.attributes.get_int(name, 0) != 0
