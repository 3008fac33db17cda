"""Norms with their gain and bias, in every spelling that exporters use.

A norm here is `gain * n(x) + bias`, with `n(x)` an RMSNorm, a LayerNorm, a tanh (DyT) or any other
value divided by a statistic of its own row. One operator or ten nodes, both give the same view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_constant, scalar
from onnx_tricks.graph.shapes import dim, dtype_of
from onnx_tricks.patterns.difference import scaled_difference
from onnx_tricks.patterns.interior import interior
from onnx_tricks.patterns.product import Factor, factors, skip_casts
from onnx_tricks.patterns.statistic import (
    centred,
    is_row_statistic,
    mean_square,
    measured_values,
    reduced_axes,
)

__all__ = ["FUSED_NORMS", "FusedNorm", "Kind", "Norm", "OpaqueNorm", "find_norms", "norm_entries"]

Kind = Literal["rms", "layer", "tanh", "other"]
_Array = np.ndarray[Any, np.dtype[Any]]
_Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class FusedNorm:
    """Which norm an operator computes, and which of its inputs are gain and bias."""

    kind: Kind
    gain: int
    bias: int | None = None


_MICROSOFT = "com.microsoft"
FUSED_NORMS: dict[tuple[str, str], FusedNorm] = {
    ("", "LayerNormalization"): FusedNorm("layer", 1, 2),
    ("", "RMSNormalization"): FusedNorm("rms", 1),
    ("", "SimplifiedLayerNormalization"): FusedNorm("rms", 1),
    (_MICROSOFT, "LayerNormalization"): FusedNorm("layer", 1, 2),
    (_MICROSOFT, "SimplifiedLayerNormalization"): FusedNorm("rms", 1),
    (_MICROSOFT, "SkipLayerNormalization"): FusedNorm("layer", 2, 3),
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): FusedNorm("rms", 2),
}


@dataclasses.dataclass(frozen=True)
class Norm:
    """One norm: `output = gain * n(source) + bias`.

    Attributes:
        kind: What `n` is. "other" is any value times statistics of its own rows.
        node: The node that makes `output`; the one a refusal names.
        output: The norm with gain and bias applied.
        dtype: Element type of `output`.
        source: What enters the norm, before casts to its compute type.
        axis: The channel axis, counted from the end.
        gain: [D] float64.
        bias: [D] float64, or None where the norm has none.
        epsilon: What is added to the mean square (rms and layer).
        fused: The operator's layout when the norm is one node, else None.
        core: The factors whose product is `n(source)`, for a decomposed norm.
        entries: The uses by which the norm reads its source: nodes, and which of their inputs.
    """

    kind: Kind
    node: ir.Node
    output: ir.Value
    dtype: ir.DataType
    source: ir.Value
    axis: int
    gain: _Vector
    bias: _Vector | None
    epsilon: float = 0.0
    fused: FusedNorm | None = None
    core: tuple[Factor, ...] = ()
    entries: tuple[tuple[ir.Node, int], ...] = ()

    @property
    def read(self) -> ir.Value:
        """What enters the norm now: a rewrite before it may have put a node behind `source`."""
        node, index = self.entries[0]
        value = node.inputs[index]
        assert value is not None
        return value

    @property
    def width(self) -> int:
        """D, the number of channels."""
        return int(self.gain.size)

    @property
    def plain(self) -> bool:
        """Whether gain and bias change nothing: all ones, all zeros."""
        return bool(np.all(self.gain == 1)) and not self.biased

    @property
    def biased(self) -> bool:
        """Whether the bias is there and not all zeros."""
        return self.bias is not None and bool(np.any(self.bias))


@dataclasses.dataclass(frozen=True)
class OpaqueNorm:
    """A norm whose gain or bias is not a known vector."""

    node: ir.Node
    reason: str


def find_norms(model: ir.Model) -> Iterator[Norm | OpaqueNorm]:
    """Yield every norm of a model in execution order, inner graphs included."""
    outputs: set[ir.Value] = set()
    whole = {node: norm for node in model.graph.all_nodes() if (norm := _multiplied_out(node))}
    parts = {part for norm in whole.values() for part in interior(norm.output, norm.source)}
    for node in model.graph.all_nodes():
        found: Norm | OpaqueNorm | None = None
        if (node.domain, node.op_type) in FUSED_NORMS:
            found = _fused(node)
        elif node in whole:
            found = whole[node]
        elif node.domain == "" and node.op_type in ("Mul", "Div") and node not in parts:
            # A norm times a number is a reader of the norm, not one more norm.
            operands = [v for v in node.inputs if v is not None]
            if not any(skip_casts(v) in outputs for v in operands) or not any(
                map(scalar, operands)
            ):
                found = _decomposed(node)
        if found is not None:
            if isinstance(found, Norm):
                outputs.add(found.output)
                found = dataclasses.replace(found, entries=norm_entries(found))
            yield found


def norm_entries(norm: Norm) -> tuple[tuple[ir.Node, int], ...]:
    """The uses by which a norm reads its source: nodes, and which of their inputs it is."""
    if norm.node.op_type == "SkipLayerNormalization":
        return (norm.node, 0), (norm.node, 1)
    if norm.fused is not None:
        return ((norm.node, 0),)
    inside = interior(norm.output, norm.source)
    return tuple((node, index) for node, index in norm.source.uses() if node in inside)


def _fused(node: ir.Node) -> Norm | OpaqueNorm:
    layout = FUSED_NORMS[node.domain, node.op_type]
    gain_value, bias_value = _input(node, layout.gain), _input(node, layout.bias)
    gain, bias = evaluate(gain_value), evaluate(bias_value)
    source = node.inputs[0]
    if source is None or gain_value is None or gain is None:
        return OpaqueNorm(node, "its gain is not a constant of the model")
    if bias_value is not None and bias is None:
        return OpaqueNorm(node, "its bias is not a constant of the model")
    if gain.ndim == 0 or gain.size != gain.shape[-1] or not _last_axis_alone(node, source):
        return OpaqueNorm(node, "it normalises more than the last axis")
    norm = Norm(
        kind=layout.kind,
        node=node,
        output=node.outputs[0],
        dtype=ir.DataType.from_numpy(gain.dtype),
        source=source,
        axis=-1,
        gain=_vector(gain, gain.size),
        bias=None if bias is None else _vector(bias, gain.size),
        epsilon=node.attributes.get_float("epsilon", 1e-5),
        fused=layout,
    )
    if layout.bias is not None or node.op_type.startswith("Skip"):
        return norm
    # An operator that takes no bias, and an Add for it, are one norm of two nodes.
    output, added = _with_bias(norm.output, norm.width, -1)
    producer = output.producer()
    if added is None or producer is None:
        return norm
    return dataclasses.replace(norm, node=producer, output=output, bias=added, fused=None)


def _last_axis_alone(node: ir.Node, source: ir.Value) -> bool:
    axis = node.attributes.get_int("axis", -1)
    return node.op_type.startswith("Skip") or reduced_axes(source, [axis]) == (-1,)


def _decomposed(node: ir.Node) -> Norm | OpaqueNorm | None:
    """Read a product as a norm: one value, statistics of its rows, a constant vector."""
    product = factors(node.outputs[0])
    # What the statistics measure is the norm's input: factors of it are not factors of the norm.
    measured = set().union(*(measured_values(f.value) for f in product if f.exponent != 1))
    if measured and all(is_constant(value) for value in measured):
        return None  # a weight that is normalised, as that of a convolution may be
    product = factors(node.outputs[0], whole=measured)
    core = [factor for factor in product if not factor.constant]
    constants = [factor for factor in product if factor.constant]
    if _continues(node.outputs[0]):
        return None
    gain = _gain(constants)
    if gain is None:
        return _opaque(node, core, constants)
    values, axis = gain
    channels = [factor for factor in core if not is_row_statistic(factor.value, axis)]
    statistics = [factor for factor in core if factor not in channels]
    if len(channels) != 1 or channels[0].exponent != 1:
        return None
    numerator = channels[0].value
    if not _normalises(numerator, statistics) or dim(numerator, axis) not in (None, values.size):
        return None
    kind, source, epsilon = _kind(node.outputs[0], numerator, statistics, axis)
    output, bias = _with_bias(node.outputs[0], values.size, axis)
    producer = output.producer()
    assert producer is not None
    return Norm(
        kind=kind,
        node=producer,
        output=output,
        dtype=dtype_of(output) or _constant_type(constants),
        source=source,
        axis=axis,
        gain=values,
        bias=bias,
        epsilon=epsilon,
        core=tuple(core),
    )


def _multiplied_out(node: ir.Node) -> Norm | None:
    """Read a sum as a LayerNorm over the last axis whose scale was multiplied out."""
    found = scaled_difference(node, -1)
    if found is None:
        return None
    constants = [factor for factor in found.scale if factor.constant]
    statistics = [factor for factor in found.scale if not factor.constant]
    gain = _gain(constants)
    if gain is None or gain[1] != -1 or [one.exponent for one in statistics] != [Fraction(-1, 2)]:
        return None
    measured = mean_square(statistics[0].value, -1)
    if measured is None:
        return None
    centre = measured.source if measured.variance else centred(measured.source, -1)
    if centre is not found.source:
        return None
    width = gain[0].size
    output, added = _with_bias(node.outputs[0], width, -1)
    biases = [] if added is None else [added]
    for sign, value in found.constants:
        array = evaluate(value)
        if (
            array is None
            or array.size not in (1, width)
            or array.size != max(array.shape[-1:], default=1)
        ):
            return None
        biases.append(sign * _vector(array, width))
    producer = output.producer()
    assert producer is not None
    return Norm(
        kind="layer",
        node=producer,
        output=output,
        dtype=dtype_of(output) or _constant_type(constants),
        source=found.source,
        axis=-1,
        gain=gain[0],
        bias=np.sum(biases, axis=0) if biases else None,
        epsilon=measured.epsilon,
    )


def _normalises(numerator: ir.Value, statistics: list[Factor]) -> bool:
    """Whether the product is a norm and not just any scaled value."""
    if any(factor.exponent < 0 for factor in statistics):
        return True
    node = numerator.producer()
    if node is None or statistics:
        return False
    return (node.domain, node.op_type) in {("", "Tanh"), *FUSED_NORMS}


def _kind(
    output: ir.Value, numerator: ir.Value, statistics: list[Factor], axis: int
) -> tuple[Kind, ir.Value, float]:
    """Kind, source and epsilon of a decomposed norm."""
    source = skip_casts(numerator)
    if not statistics:
        node = source.producer()
        return ("tanh" if node is not None and node.op_type == "Tanh" else "other"), source, 0.0
    measured = None
    if len(statistics) == 1 and statistics[0].exponent == Fraction(-1, 2):
        measured = mean_square(statistics[0].value, axis)
    if measured is None:
        return "other", source, 0.0
    origin = centred(source, axis)
    deviations = measured.source is source or (
        origin is not None and centred(measured.source, axis) is origin
    )
    if (
        origin is not None
        and (measured.source is origin if measured.variance else deviations)
        # Centred rows that something else reads too are a value of their own, and this its RMSNorm.
        and not source.is_graph_output()
        and set(source.consumers()) <= interior(output, origin)
    ):
        return "layer", origin, measured.epsilon
    if measured.source is source and not measured.variance:
        return "rms", source, measured.epsilon
    return "other", source, 0.0


def _gain(constants: list[Factor]) -> tuple[_Vector, int] | None:
    """The constants' product when it is a vector: its values [D] and its axis from the end."""
    total: _Array = np.ones(())
    for factor in constants:
        array = evaluate(factor.value)
        assert array is not None
        with np.errstate(all="ignore"):
            powered = array.astype(np.float64) ** float(factor.exponent)
        if total.size > 1 and powered.size > 1 and total.shape[::-1][:1] != powered.shape[::-1][:1]:
            return None
        total = total * powered
    wide = [axis for axis, length in enumerate(total.shape) if length != 1]
    if len(wide) != 1 or not np.all(np.isfinite(total)):
        return None
    return total.reshape(-1), wide[0] - total.ndim


def _continues(output: ir.Value) -> bool:
    """Whether the only reader multiplies by one more constant vector, and so is the whole norm."""
    readers = output.consumers()
    if len(readers) != 1 or output.is_graph_output() or readers[0].op_type != "Mul":
        return False
    other = [operand for operand in readers[0].inputs if operand is not output]
    array = evaluate(other[0]) if len(other) == 1 else None
    return array is not None and array.size > 1


def _opaque(node: ir.Node, core: list[Factor], constants: list[Factor]) -> OpaqueNorm | None:
    """Say why the product is a norm whose gain cannot be read, if it is one."""
    if not any(f.exponent < 0 and is_row_statistic(f.value, -1) for f in core):
        return None
    if any(_wide_axes(factor) > 1 for factor in constants):
        return OpaqueNorm(node, "it normalises more than the last axis")
    channels = [factor.value for factor in core if not is_row_statistic(factor.value, -1)]
    if len(channels) == 2 and any(value.is_graph_input() for value in channels):
        return OpaqueNorm(node, "its gain is not a constant of the model")
    return None


def _wide_axes(factor: Factor) -> int:
    array = evaluate(factor.value)
    return 0 if array is None else sum(length != 1 for length in array.shape)


def _constant_type(constants: list[Factor]) -> ir.DataType:
    array = evaluate(next(factor.value for factor in constants if _wide_axes(factor)))
    assert array is not None
    return ir.DataType.from_numpy(array.dtype)


def _with_bias(output: ir.Value, width: int, axis: int) -> tuple[ir.Value, _Vector | None]:
    """Step over the Add of a constant vector, if that alone reads the scaled value."""
    readers = output.consumers()
    if len(readers) != 1 or output.is_graph_output() or readers[0].domain != "":
        return output, None
    reader = readers[0]
    if reader.op_type == "Cast":
        following, bias = _with_bias(reader.outputs[0], width, axis)
        return (output, None) if bias is None else (following, bias)
    other = [operand for operand in reader.inputs if operand is not output]
    array = evaluate(other[0]) if reader.op_type == "Add" and len(other) == 1 else None
    if array is None or array.ndim < -axis or array.size != width or array.shape[axis] != width:
        return output, None
    return reader.outputs[0], _vector(array, width)


def _input(node: ir.Node, index: int | None) -> ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None


def _vector(array: _Array, width: int) -> _Vector:
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (width,))
