"""Attention blocks in every spelling: products around a softmax, or one fused operator."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnx_tricks.patterns.block import Attention, OpaqueAttention
from onnx_tricks.patterns.fused_attention import FUSED, read_fused
from onnx_tricks.patterns.heads import Heads, Operand
from onnx_tricks.patterns.merge import find_merged
from onnx_tricks.patterns.scores import find_scores
from onnx_tricks.patterns.softmax import follow_weights
from onnx_tricks.patterns.tracer import Tracer

__all__ = ["Attention", "OpaqueAttention", "find_attentions"]


def find_attentions(model: ir.Model) -> Iterator[Attention | OpaqueAttention]:
    """Yield the attention blocks of a model in execution order, inner graphs included.

    Args:
        model: A model whose shapes and types have been inferred.
    """
    tracer = Tracer(model)
    for node in model.graph.all_nodes():
        if node.op_type == "Softmax" and node.domain == "" and _is_over_last_axis(tracer, node):
            found = _decomposed(tracer, node)
            if found is not None:
                yield found
        elif (node.domain, node.op_type) in FUSED:
            yield read_fused(tracer, node)


def _is_over_last_axis(tracer: Tracer, softmax: ir.Node) -> bool:
    axis = softmax.attributes.get_int("axis", -1)
    shape = tracer.run.shape(softmax.outputs[0])
    return axis == -1 or (shape is not None and axis == len(shape) - 1)


def _decomposed(tracer: Tracer, softmax: ir.Node) -> Attention | OpaqueAttention | None:
    weights = follow_weights(softmax)
    if weights is None:
        return None
    found = find_scores(tracer.run, softmax)
    if found is None:
        return None
    if isinstance(weights, str):
        return OpaqueAttention(softmax, weights)
    if isinstance(found, str):
        return OpaqueAttention(softmax, found)
    scores, product = found
    turned = weights.product.right
    operands = {
        "keys": product.right,
        "values": Operand(turned.value, lambda array: np.swapaxes(turned.unpack(array), -1, -2)),
        "queries": product.left,
    }
    traced = []
    for word, heads in zip(operands, tracer.trace_together([*operands.values()]), strict=True):
        if isinstance(heads, str):
            return OpaqueAttention(softmax, f"its {word} cannot be traced: {heads}")
        traced.append(heads)
    keys, values, query = traced
    groups = _groups(tracer, product.left, product.right, query, keys)
    if groups is None:
        return OpaqueAttention(softmax, "its query heads do not read key heads one by one")
    context = weights.product.node.outputs[0]
    # Where heads and tokens of the queries share an axis, the values have no axis of heads.
    axes = query.axes if len(values.lead) < 2 and "sh" in query.axes else (*values.lead, "s", "k")
    merged, projection = find_merged(tracer.run, context, axes, query.heads)
    return Attention(
        softmax,
        query.heads,
        groups,
        query,
        keys,
        values,
        _is_cross(query, keys),
        scores,
        weights.safe,
        weights.value,
        context,
        axes,
        merged,
        projection,
    )


def _is_cross(query: Heads, keys: Heads) -> bool:
    if keys.projection is None or query.projection is None:
        return keys.projection is None
    return keys.projection.source is not query.projection.source


def _groups(
    tracer: Tracer, left: Operand, right: Operand, query: Heads, keys: Heads
) -> tuple[int, ...] | None:
    """Which key head each query head reads."""
    if keys.heads == 1:
        return (0,) * query.heads
    lines = []
    for operand, heads in ((left, query), (right, keys)):
        shape = tracer.run.shape(operand.value)
        if shape is None:
            return None
        lead = operand.unpack(np.broadcast_to(np.zeros((), np.int8), shape)).shape[:-2]
        count = int(np.prod(lead))
        if count % len(heads.order):
            return None
        # Batch first or not, every row of the batch has the same heads.
        lines.append(np.resize(heads.order, count).reshape(lead))
    one, other = np.broadcast_arrays(*lines)
    pairs = dict(zip(one.reshape(-1).tolist(), other.reshape(-1).tolist(), strict=True))
    return tuple(pairs[head] for head in range(query.heads)) if len(pairs) == query.heads else None
