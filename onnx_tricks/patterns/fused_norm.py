"""Norms that are one operator, perhaps with an Add behind it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.shapes import dim, rank_of
from onnx_tricks.patterns.norm import (
    FUSED_NORMS,
    Norm,
    OpaqueNorm,
    as_vector,
    unknown_reason,
    with_bias,
)
from onnx_tricks.patterns.statistic import reduced_axes

__all__ = ["fused_norm"]


def fused_norm(node: ir.Node) -> Norm | OpaqueNorm | None:
    """Read one of FUSED_NORMS; None where it has nothing to fold."""
    layout = FUSED_NORMS[node.domain, node.op_type]
    gain_value, bias_value = _input(node, layout.gain), _input(node, layout.bias)
    gain, bias = evaluate(gain_value), evaluate(bias_value)
    source = node.inputs[0]
    plain = gain is not None and np.all(gain == 1) and (bias is None or not np.any(bias))
    if (layout.maps and plain) or (gain is None and _is_one(gain_value)):
        return None  # nothing to fold
    if source is None or gain_value is None or gain is None:
        return OpaqueNorm(node, unknown_reason("gain", gain_value))
    if bias_value is not None and bias is None:
        return OpaqueNorm(node, unknown_reason("bias", bias_value))
    axis = _channel_axis(source, gain.size) if layout.maps else -1
    if axis is None:
        return OpaqueNorm(node, "its gain is not that of a channel, or not visibly so")
    if not layout.maps and (
        gain.ndim == 0 or gain.size != gain.shape[-1] or not _last_axis_alone(node, source)
    ):
        return OpaqueNorm(node, "it normalises more than the last axis")
    norm = Norm(
        kind=layout.kind,
        node=node,
        output=node.outputs[0],
        dtype=ir.DataType.from_numpy(gain.dtype),
        source=source,
        axis=axis,
        gain=as_vector(gain, gain.size),
        bias=None if bias is None else as_vector(bias, gain.size),
        epsilon=node.attributes.get_float("epsilon", 1e-5),
        fused=layout,
    )
    skips = node.op_type.startswith("Skip")
    if layout.maps or (skips and layout.bias is not None):
        return norm
    # An operator and an Add behind it for the bias, or for more of it, are one norm of two nodes.
    output, added = with_bias(norm.output, norm.width, -1)
    producer = output.producer()
    if added is None or producer is None:
        return norm
    whole = added if norm.bias is None else norm.bias + added
    if skips:  # it adds up the residual stream too, so it stays
        return dataclasses.replace(norm, output=output, bias=whole)
    return dataclasses.replace(norm, node=producer, output=output, bias=whole, fused=None)


def _channel_axis(source: ir.Value, channels: int) -> int | None:
    """Where the channels of a map lie, counted from the end; a group may have one gain, too."""
    rank = rank_of(source)
    return None if rank is None or dim(source, 1) != channels else 1 - rank


def _is_one(gain: ir.Value | None) -> bool:
    """Whether a gain is filled with ones, perhaps in the shape of the input."""
    node = gain.producer() if gain is not None else None
    if node is None or node.domain != "" or node.op_type != "ConstantOfShape":
        return False
    fill = node.attributes.get("value")
    return fill is not None and bool(np.all(fill.as_tensor().numpy() == 1))


def _last_axis_alone(node: ir.Node, source: ir.Value) -> bool:
    axis = node.attributes.get_int("axis", -1)
    return node.op_type.startswith("Skip") or reduced_axes(source, [axis]) == (-1,)


def _input(node: ir.Node, index: int | None) -> ir.Value | None:
    return node.inputs[index] if index is not None and index < len(node.inputs) else None
