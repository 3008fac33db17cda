"""Norms whose scale was multiplied out: `x * s + (bias - mean(x) * s)`, as TensorFlow writes them.

There, batch normalisation and LayerNorm share one form, in which the gain is a part of the scale s
and nothing subtracts the mean from x.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.patterns.product import Factor, factors, skip_casts
from onnx_tricks.patterns.statistic import mean_of, measured_values

__all__ = ["Difference", "scaled_difference"]

_MAX_DEPTH = 4
_Term = tuple[int, ir.Value]


@dataclasses.dataclass(frozen=True)
class Difference:
    """`(source - mean(source)) * scale + constants`.

    Attributes:
        source: The value whose mean over `axis` is taken off, before casts.
        scale: The factors that both products share.
        constants: What is added: signs and values.
    """

    source: ir.Value
    scale: tuple[Factor, ...]
    constants: tuple[_Term, ...]


def scaled_difference(node: ir.Node, axis: int) -> Difference | None:
    """Read an Add or Sub as the node where both products meet.

    Args:
        node: Any node.
        axis: The axis of the mean, counted from the end.
    """
    if node.domain != "" or node.op_type not in ("Add", "Sub") or None in node.inputs:
        return None
    signs = (1, -1 if node.op_type == "Sub" else 1)
    sides = [
        list(_terms(value, sign, 0))
        for value, sign in zip(node.inputs, signs, strict=True)
        if value is not None
    ]
    products = [[term for term in side if not is_constant(term[1])] for side in sides]
    if [len(side) for side in products] != [1, 1]:
        return None
    (first, left), (second, right) = (_product(side[0]) for side in products)
    if first == second:
        return None
    plus, minus = (left, right) if first > 0 else (right, left)
    shared = plus & minus
    (values, means) = (list((one - shared).elements()) for one in (plus, minus))
    if [one.exponent for one in (*values, *means)] != [1, 1]:
        return None
    source = skip_casts(values[0].value)
    if mean_of(means[0].value, axis) is not source:
        return None
    constants = tuple(term for side in sides for term in side if is_constant(term[1]))
    return Difference(source, tuple(shared.elements()), constants)


def _terms(value: ir.Value, sign: int, depth: int) -> Iterator[_Term]:
    """The terms of a sum, and their signs."""
    node = None if is_constant(value) else skip_casts(value).producer()
    if node is None or node.domain != "" or depth > _MAX_DEPTH or None in node.inputs:
        yield sign, value
    elif node.op_type in ("Add", "Sub", "Neg"):
        for place, operand in enumerate(node.inputs):
            flips = node.op_type == "Neg" or (node.op_type == "Sub" and place == 1)
            assert operand is not None
            yield from _terms(operand, -sign if flips else sign, depth + 1)
    else:
        yield sign, value


def _product(term: _Term) -> tuple[int, Counter[Factor]]:
    """The sign and the factors of a term."""
    sign, value = term
    found: list[Factor] = []
    # What a statistic measures is the norm's input, and left whole.
    measured = set().union(*(measured_values(one.value) for one in factors(value)))
    for factor in factors(value, whole=measured):
        node = factor.value.producer()
        if node is not None and node.op_type == "Neg" and node.domain == "" and node.inputs[0]:
            sign, factor = -sign, Factor(skip_casts(node.inputs[0]), factor.exponent)
        found.append(factor)
    return sign, Counter(found)
