"""A chain of multiplications read as one product, however an exporter nested it.

`g * (x * (1 / sqrt(v)))`, `x / sqrt(v) * g` and `(g * x) * v ** -0.5` are the same product of
powers: `g^1 * x^1 * v^-1/2`. Recognisers look at the factors and need not know the nesting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from fractions import Fraction

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant, scalar

__all__ = ["Factor", "factors", "skip_casts"]

_MAX_DEPTH = 12


@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a product: a value to some power."""

    value: ir.Value
    exponent: Fraction

    @property
    def constant(self) -> bool:
        """Whether the factor is known before the model runs."""
        return is_constant(self.value)


def factors(value: ir.Value, whole: Collection[ir.Value] = ()) -> list[Factor]:
    """Split a value into the factors whose product it is.

    Looks through Mul, Div, Reciprocal, Sqrt, Pow with a constant exponent, casts and Identity.
    Powers of a sum, a mean or an input are left whole; constants are never split.

    Args:
        value: The product.
        whole: Values that are left whole too.
    """
    found: list[Factor] = []
    _split(value, Fraction(1), found, whole, 0)
    return found


def skip_casts(value: ir.Value) -> ir.Value:
    """Walk up through Cast (between floating types) and Identity."""
    while (node := _op(value, "Cast", "Identity")) is not None:
        source = node.inputs[0]
        if source is None or (node.op_type == "Cast" and not _floating_cast(node)):
            break
        value = source
    return value


def _split(
    value: ir.Value,
    exponent: Fraction,
    found: list[Factor],
    whole: Collection[ir.Value],
    depth: int,
) -> None:
    constant = is_constant(value)
    value = value if constant else skip_casts(value)
    node = value.producer()
    if constant or value in whole or node is None or node.domain != "" or depth > _MAX_DEPTH:
        found.append(Factor(value, exponent))
        return
    operands = [operand for operand in node.inputs if operand is not None]
    if node.op_type in ("Mul", "Div") and len(operands) == 2:
        # A square of anything but a whole number would lose the sign of x.
        if operands[0] is operands[1] or exponent.denominator != 1:
            found.append(Factor(value, exponent))
            return
        _split(operands[0], exponent, found, whole, depth + 1)
        _split(
            operands[1], exponent if node.op_type == "Mul" else -exponent, found, whole, depth + 1
        )
    elif node.op_type == "Reciprocal":
        _split(operands[0], -exponent, found, whole, depth + 1)
    elif node.op_type == "Sqrt":
        _split(operands[0], exponent / 2, found, whole, depth + 1)
    elif node.op_type == "Pow" and (power := _power(operands)) is not None:
        _split(operands[0], exponent * power, found, whole, depth + 1)
    else:
        found.append(Factor(value, exponent))


def _power(operands: list[ir.Value]) -> Fraction | None:
    """The exponents that a reciprocal root is spelled with; a square is left whole."""
    number = scalar(operands[1]) if len(operands) == 2 else None
    return Fraction(number) if number in (-1.0, -0.5, 0.5) else None


def _op(value: ir.Value, *op_types: str) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def _floating_cast(node: ir.Node) -> bool:
    return ir.DataType(node.attributes["to"].as_int()).is_floating_point()
