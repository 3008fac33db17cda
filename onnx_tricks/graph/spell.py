"""How norms are written, so that ONNX Runtime runs them as one kernel.

Measured with ONNX Runtime 1.31 (benchmarks/norm_spellings.py): the operators of opset 17
(LayerNormalization) and 23 (RMSNormalization) are kernels of their own. In older opsets its session
fuses `x / Sqrt(ReduceMean(Pow(x, 2)) + eps) * scale`, and the LayerNorm like it, only with the
scale (and for LayerNorm the bias) present, and not when the square is a Mul or the root a
Reciprocal. A shared vector of ones keeps the kernel where the gain is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.edit import insert, shared_constant, shared_vector
from onnx_tricks.graph.shapes import dtype_of

__all__ = ["write_centred", "write_norm", "write_product"]

_HALF = frozenset((ir.DataType.FLOAT16, ir.DataType.BFLOAT16))
_FUSED_SINCE = {"rms": 23, "layer": 17}
_STASH_DOUBLE = 11


def write_norm(
    model: ir.Model,
    before: ir.Node,
    kind: str,
    source: ir.Value,
    *,
    width: int,
    epsilon: float,
    dtype: ir.DataType,
    gain: ir.Value | None = None,
    bias: ir.Value | None = None,
    name: str,
) -> ir.Value:
    """Write an RMSNorm or LayerNorm over the last axis.

    Args:
        model: The model; its opset decides the spelling.
        before: The node in front of which the norm is placed.
        kind: "rms" or "layer".
        source: [..., D], of any floating type.
        width: D.
        epsilon: Added to the mean square.
        dtype: Type of the result. Where it is a half type, the norm is computed in float32.
        gain: A constant [D] of `dtype` to multiply with, or None.
        bias: A constant [D] of `dtype` to add, or None.
        name: Stem of the names of the nodes.

    Returns:
        The normalised value, [..., D] of `dtype`.
    """
    writer = _Writer(model, before, name)
    given = dtype_of(source) or dtype
    opset = model.opset_imports.get("", 1)
    # Kernels hold epsilon in float32, too coarse beside float64: the operators stay bare.
    coarse = dtype == ir.DataType.DOUBLE and float(np.float32(epsilon)) != epsilon
    if opset >= _FUSED_SINCE[kind] and not coarse:
        # They compute half types in float32 by themselves.
        inner = max(given, dtype, key=lambda one: one.itemsize)
        early = inner == dtype
        scale = gain if early and gain is not None else shared_vector(model, 1.0, width, inner)
        inside = [bias] if early and kind == "layer" and bias is not None else []
        attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", epsilon)]
        if inner == ir.DataType.DOUBLE and kind == "rms":
            attributes.append(ir.AttrInt64("stash_type", _STASH_DOUBLE))
        op_type = "RMSNormalization" if kind == "rms" else "LayerNormalization"
        output = insert(
            before,
            op_type,
            [writer.cast(source, given, inner), scale, *inside],
            name=name,
            model=model,
            dtype=inner,
            attributes=attributes,
        )
        output = writer.cast(output, inner, dtype)
        if not early:
            output = writer.times(output, gain, dtype)
        return output if inside else writer.plus(output, bias, dtype)
    inner = max(given, dtype, key=lambda one: one.itemsize)
    inner = ir.DataType.FLOAT if inner in _HALF else inner
    value = writer.cast(source, given, inner)
    if kind == "layer":
        value = writer.op("Sub", [value, writer.mean(value, inner, opset)], inner)
    square = writer.op("Pow", [value, writer.number("exponent", 2.0, inner)], inner)
    mean = writer.mean(square, inner, opset)
    shifted = writer.op("Add", [mean, writer.number("epsilon", epsilon, inner)], inner)
    root = writer.op("Sqrt", [shifted], inner)
    value = writer.cast(writer.op("Div", [value, root], inner), inner, dtype)
    if coarse:
        return writer.plus(writer.times(value, gain, dtype), bias, dtype)
    if gain is None:
        gain = shared_vector(model, 1.0, width, dtype)
    value = writer.times(value, gain, dtype)
    if kind == "layer" and bias is None:
        bias = shared_vector(model, 0.0, width, dtype)
    return writer.plus(value, bias, dtype)


def write_centred(
    model: ir.Model, before: ir.Node, source: ir.Value, *, axis: int, dtype: ir.DataType, name: str
) -> ir.Value:
    """Write `source - mean(source)` over one axis.

    Args:
        model: The model; its opset decides the spelling.
        before: The node in front of which it is placed.
        source: The value.
        axis: The axis, counted from the end.
        dtype: Type of the value and of the result.
        name: Stem of the names of the nodes.
    """
    writer = _Writer(model, before, name)
    mean = writer.mean(source, dtype, model.opset_imports.get("", 1), axis)
    return writer.op("Sub", [source, mean], dtype)


def write_product(
    model: ir.Model,
    before: ir.Node,
    powers: Sequence[tuple[ir.Value, Fraction]],
    *,
    dtype: ir.DataType,
    bias: ir.Value | None = None,
    name: str,
) -> ir.Value:
    """Write a product of powers, the first of which has exponent one.

    Args:
        model: The model.
        before: The node in front of which the product is placed.
        powers: Values of any floating type, and their exponents.
        dtype: Type of the result; the product is computed in the widest type of its factors.
        bias: A constant of `dtype` to add, or None.
        name: Stem of the names of the nodes.
    """
    writer = _Writer(model, before, name)
    types = [dtype_of(value) or dtype for value, _ in powers]
    inner = max(types, key=lambda one: one.itemsize)
    total = None
    for (value, exponent), given in zip(powers, types, strict=True):
        value = writer.cast(value, given, inner)
        if abs(exponent) == Fraction(1, 2):
            value = writer.op("Sqrt", [value], inner)
        elif abs(exponent) != 1:
            power = writer.number("exponent", float(abs(exponent)), inner)
            value = writer.op("Pow", [value, power], inner)
        op_type = "Mul" if exponent > 0 else "Div"
        total = value if total is None else writer.op(op_type, [total, value], inner)
    assert total is not None
    return writer.plus(writer.cast(total, inner, dtype), bias, dtype)


class _Writer:
    """Inserts nodes in front of one node, with names of one stem."""

    def __init__(self, model: ir.Model, before: ir.Node, stem: str) -> None:
        self.model, self.before, self.stem = model, before, stem

    def op(
        self,
        op_type: str,
        inputs: list[ir.Value],
        dtype: ir.DataType,
        attributes: tuple[ir.Attr, ...] = (),
    ) -> ir.Value:
        return insert(
            self.before,
            op_type,
            inputs,
            name=f"{self.stem}/{op_type}",
            model=self.model,
            dtype=dtype,
            attributes=attributes,
        )

    def cast(self, value: ir.Value, given: ir.DataType, wanted: ir.DataType) -> ir.Value:
        if given == wanted:
            return value
        return self.op("Cast", [value], wanted, (ir.AttrInt64("to", wanted),))

    def times(self, value: ir.Value, gain: ir.Value | None, dtype: ir.DataType) -> ir.Value:
        return value if gain is None else self.op("Mul", [value, gain], dtype)

    def plus(self, value: ir.Value, bias: ir.Value | None, dtype: ir.DataType) -> ir.Value:
        return value if bias is None else self.op("Add", [value, bias], dtype)

    def mean(self, value: ir.Value, dtype: ir.DataType, opset: int, axis: int = -1) -> ir.Value:
        keep = ir.AttrInt64("keepdims", 1)
        if opset < 18:
            return self.op("ReduceMean", [value], dtype, (ir.AttrInt64s("axes", [axis]), keep))
        label = "last_axis" if axis == -1 else f"axis{axis}"
        axes = shared_constant(self.model, label, np.asarray([axis], dtype=np.int64))
        return self.op("ReduceMean", [value, axes], dtype, (keep,))

    def number(self, word: str, number: float, dtype: ir.DataType) -> ir.Value:
        array = np.asarray(number, dtype=dtype.numpy())
        return shared_constant(self.model, f"{word}.{array[()]!s}.{dtype.name.lower()}", array)
