"""Norms that are made of several nodes: a value, statistics of its rows, and a constant vector."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_constant
from onnx_tricks.graph.shapes import dim, dtype_of
from onnx_tricks.patterns.difference import scaled_difference
from onnx_tricks.patterns.interior import interior
from onnx_tricks.patterns.norm import (
    FUSED_NORMS,
    Kind,
    Norm,
    OpaqueNorm,
    as_vector,
    unknown_reason,
    with_bias,
)
from onnx_tricks.patterns.product import Factor, factors, skip_casts
from onnx_tricks.patterns.statistic import (
    centred,
    is_row_statistic,
    mean_square,
    measured_values,
)

__all__ = ["decomposed_norm", "multiplied_out_norm"]

_Array = np.ndarray[Any, np.dtype[Any]]
_Vector = np.ndarray[Any, np.dtype[np.float64]]


def decomposed_norm(node: ir.Node) -> Norm | OpaqueNorm | None:
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
    output, bias = with_bias(node.outputs[0], values.size, axis)
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


def multiplied_out_norm(node: ir.Node) -> Norm | None:
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
    output, added = with_bias(node.outputs[0], width, -1)
    biases = [] if added is None else [added]
    for sign, value in found.constants:
        array = evaluate(value)
        if (
            array is None
            or array.size not in (1, width)
            or array.size != max(array.shape[-1:], default=1)
        ):
            return None
        biases.append(sign * as_vector(array, width))
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
    while node is not None and node.domain == "" and node.op_type == "Reshape" and node.inputs[0]:
        node = node.inputs[0].producer()  # groups of channels are normalised as one
    if node is None or statistics:
        return False
    if (node.domain, node.op_type) in FUSED_NORMS:
        # What else reads a norm makes this product no norm of its own, but one of its readers.
        return all(one.op_type in ("Cast", "Mul", "Reshape") for one in numerator.consumers())
    return node.domain == "" and node.op_type in ("Erf", "Tanh")


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
    """Whether the only reader multiplies by one more constant, and so is the whole norm."""
    readers = output.consumers()
    if len(readers) != 1 or output.is_graph_output() or readers[0].op_type != "Mul":
        return False
    other = [operand for operand in readers[0].inputs if operand is not output]
    array = evaluate(other[0]) if len(other) == 1 else None
    if array is None or array.size > 1:
        return array is not None
    # A number (1, as `addcmul` has it) may stand between the gain and the bias.
    behind = readers[0].outputs[0].consumers()
    return (
        len(behind) == 1 and behind[0].op_type == "Add" and any(map(_is_vector, behind[0].inputs))
    )


def _is_vector(value: ir.Value | None) -> bool:
    array = evaluate(value)
    return array is not None and array.size > 1


def _opaque(node: ir.Node, core: list[Factor], constants: list[Factor]) -> OpaqueNorm | None:
    """Say why the product is a norm whose gain cannot be read, if it is one."""
    if not any(f.exponent < 0 and is_row_statistic(f.value, -1) for f in core):
        return None
    if any(_wide_axes(factor) > 1 for factor in constants):
        return OpaqueNorm(node, "it normalises more than the last axis")
    channels = [factor.value for factor in core if not is_row_statistic(factor.value, -1)]
    given = [value for value in channels if value.is_graph_input()]
    if len(channels) == 2 and given:
        return OpaqueNorm(node, unknown_reason("gain", given[0]))
    return None


def _wide_axes(factor: Factor) -> int:
    array = evaluate(factor.value)
    return 0 if array is None else sum(length != 1 for length in array.shape)


def _constant_type(constants: list[Factor]) -> ir.DataType:
    array = evaluate(next(factor.value for factor in constants if _wide_axes(factor)))
    assert array is not None
    return ir.DataType.from_numpy(array.dtype)
