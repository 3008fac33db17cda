"""Attention as one operator: ONNX's own, and those of ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_constant
from onnx_tricks.graph.names import described
from onnx_tricks.graph.pasts import input_behind, leaving
from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.attention_operators import (
    Reading,
    group_query,
    input_at,
    multi_head,
    number_of,
    onnx_attention,
    straight,
)
from onnx_tricks.patterns.block import Attention, OpaqueAttention
from onnx_tricks.patterns.cache import STACKED, Cache, axes_behind
from onnx_tricks.patterns.heads import Heads, Operand
from onnx_tricks.patterns.linear import Linear, find_linear
from onnx_tricks.patterns.merge import find_merged
from onnx_tricks.patterns.projection import Projection
from onnx_tricks.patterns.quantised import QUANTISED
from onnx_tricks.patterns.rotary import Rotary
from onnx_tricks.patterns.scores import Bias, Scores
from onnx_tricks.patterns.tracer import Tracer

__all__ = ["FUSED", "read_fused"]

_MICROSOFT = "com.microsoft"
_CACHE_AXES = ("b", "h", "s", "k")


def read_fused(tracer: Tracer, node: ir.Node) -> Attention | OpaqueAttention:
    """Read an attention operator.

    Args:
        tracer: Traces what it reads.
        node: A node of an operator in `FUSED`.
    """
    reading = FUSED[node.domain, node.op_type](tracer, node)
    if isinstance(reading, str):
        return OpaqueAttention(node, reading)
    if isinstance(reading, Attention):
        return reading
    traced = []
    words = ("queries", "keys", "values")
    found = tracer.trace_together(reading.operands)
    for word, heads, bias in zip(words, found, reading.biases, strict=True):
        heads = _with_bias(heads, bias) if isinstance(heads, Heads) else heads
        if isinstance(heads, str):
            return OpaqueAttention(node, f"its {word} cannot be traced: {heads}")
        traced.append(heads)
    if reading.tables is not None:
        for place in (0, 1):
            turned = _with_rotary(tracer, node, traced[place], reading)
            if isinstance(turned, str):
                return OpaqueAttention(node, turned)
            traced[place] = turned
    if reading.pasts is not None:
        for place, (past, present) in enumerate(reading.pasts, start=1):
            cached = _with_cache(tracer, node, traced[place], past, present)
            if isinstance(cached, str):
                return OpaqueAttention(node, cached)
            traced[place] = cached
    query, keys, values = traced
    each = reading.heads // reading.shared
    groups = tuple(int(keys.order[head // each]) for head in range(reading.heads))
    return _block(tracer, node, (query, keys, values), reading, groups)


def _block(
    tracer: Tracer,
    node: ir.Node,
    traced: tuple[Heads, Heads, Heads],
    reading: Reading,
    groups: tuple[int, ...],
) -> Attention:
    query, keys, values = traced
    context = node.outputs[0]
    flat = len(tracer.run.shape(context) or ()) != 4
    axes = ("b", "s", "hk") if flat else _CACHE_AXES
    merged, projection = find_merged(tracer.run, context, axes, reading.heads)
    own = query.projection, keys.projection
    cross = own[1] is None or (own[0] is not None and own[0].source is not own[1].source)
    return Attention(
        node,
        reading.heads,
        groups,
        query,
        keys,
        values,
        cross,
        reading.scores,
        reading.safe,
        None,
        context,
        axes,
        merged,
        projection,
    )


def _with_bias(heads: Heads, bias: Array | None) -> Heads | str:
    """Heads to which the operator adds a constant."""
    if bias is None or not np.any(bias):
        return heads
    if heads.projection is None or heads.rotary is not None or heads.norm is not None:
        return "the operator adds a bias to heads that are no projection"
    shift = np.zeros(heads.projection.columns.shape)
    shift[heads.order] = bias.reshape(len(heads.order), -1)
    projection = dataclasses.replace(heads.projection, shift=heads.projection.shift + shift)
    return dataclasses.replace(heads, projection=projection, inside=True)


def _with_rotary(tracer: Tracer, node: ir.Node, heads: Heads, reading: Reading) -> Heads | str:
    """Heads that the operator rotates."""
    assert reading.tables is not None
    cos, sin, positions = reading.tables
    shape = tracer.run.shape(cos)
    if not (is_constant(cos) and is_constant(sin)) or shape is None:
        return "its tables of cos and sin are chosen anew at every step, for new tokens alone"
    if heads.rotary is not None or heads.cache is not None:
        return "it rotates heads that have been rotated or cached before"
    value = heads.operand
    rotary = Rotary(
        value, value, cos, sin, -1, 0, 2 * shape[-1], reading.interleaved, positions, node
    )
    return dataclasses.replace(heads, rotary=rotary, inside=True)


def _with_cache(
    tracer: Tracer, node: ir.Node, heads: Heads, past: int, present: int
) -> Heads | str:
    """Heads that the operator appends to a past."""
    before = input_at(node, past)
    after = node.outputs[present] if present < len(node.outputs) else None
    if after is not None and not after.uses() and not after.is_graph_output():
        after = None
    if before is None and after is None:
        return heads
    source = input_behind(before)
    if heads.cache is not None or after is None or (before is not None and source is None):
        return "it appends to a past that is no input of the graph"
    found = leaving(after, tracer.run.parents)
    leaves, axes = found[1] if found else None, axes_behind(before, _CACHE_AXES)
    cache = Cache(source, heads.operand, after, leaves, node, _CACHE_AXES, axes)
    return dataclasses.replace(heads, state=after, state_axes=_CACHE_AXES, cache=cache, inside=True)


def _with_half(tracer: Tracer, node: ir.Node, heads: Heads, half: int) -> Heads | str:
    """Keys (0) or values (1) that the operator keeps in one tensor with the others."""
    past, stacked = input_at(node, 4), node.outputs[1] if len(node.outputs) > 1 else None
    source, axes = None, None
    if past is not None:
        stack = past.producer()
        parts = stack.inputs if stack is not None and stack.op_type == "Concat" else ()
        source = input_behind(parts[half]) if len(parts) == 2 else None
        if source is None:
            return STACKED
        axes = axes_behind(parts[half], ("", *_CACHE_AXES))
    taken = () if stacked is None else stacked.consumers()
    found = next((one.outputs[0] for one in taken if _takes(one, half)), None)
    if found is None:
        return heads if past is None and not taken else STACKED
    left = leaving(found, tracer.run.parents)
    new = heads.operand
    cache = Cache(source, new, found, left[1] if left else None, node, _CACHE_AXES, axes)
    return dataclasses.replace(heads, state=found, state_axes=_CACHE_AXES, cache=cache)


def _takes(node: ir.Node, half: int) -> bool:
    """Whether a node takes one half of what is stacked along the first axis."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return False
    index = evaluate(node.inputs[1])
    return index is not None and index.shape == () and int(index) == half


def _microsoft(tracer: Tracer, node: ir.Node) -> Attention | str:
    """com.microsoft Attention, which projects queries, keys and values by itself."""
    source, heads = node.inputs[0], node.attributes["num_heads"].as_int()
    linear = find_linear(node, 0, -1)
    if source is None or isinstance(linear, str) or not linear.weight.readable:
        return "its weights are not constant"
    if linear.weight.rank != 2 or linear.weight.axis != 0:
        return "its weights are arranged in a way that is not understood"
    if input_at(node, 6) is not None:
        return "it appends to a buffer of fixed length"
    if number_of(node, "do_rotary", 0):
        return "it rotates without tables of cos and sin"
    width = int(linear.weight.tensor.shape.numpy()[1])
    sizes = list(node.attributes.get_ints("qkv_hidden_sizes") or (width // 3,) * 3)
    starts = [0, sizes[0], sizes[0] + sizes[1]]
    query, *others = (
        _inside(source, linear, start, heads, size // heads)
        for start, size in zip(starts, sizes, strict=True)
    )
    keys, values = (_with_half(tracer, node, one, half) for half, one in enumerate(others))
    if isinstance(keys, str) or isinstance(values, str):
        return keys if isinstance(keys, str) else str(values)
    term = input_at(node, 5)
    scores = Scores(
        scale=number_of(node, "scale", 0.0) or query.head_width**-0.5,
        terms=() if term is None else (Bias(term, 1.0),),
        causal=number_of(node, "unidirectional", 0) != 0,
        padding=input_at(node, 3),
    )
    whole = Operand(source, straight)
    reading = Reading((whole, whole, whole), heads, heads, scores)
    return _block(tracer, node, (query, keys, values), reading, tuple(range(heads)))


def _inside(source: ir.Value, linear: Linear, start: int, heads: int, width: int) -> Heads:
    columns = start + np.arange(heads * width, dtype=np.int64).reshape(heads, width)
    ones = np.ones(columns.shape)
    projection = Projection(source, linear, source, ("b", "s", ""), columns, ones, 0 * ones)
    order = np.arange(heads)
    axes = ("b", "s", "")
    return Heads(
        source, axes, (), order, source, axes, order, 1.0, width, projection=projection, inside=True
    )


_Reader = Callable[[Tracer, ir.Node], "Reading | Attention | str"]
FUSED: dict[tuple[str, str], _Reader] = {
    ("", "Attention"): onnx_attention,
    (_MICROSOFT, "Attention"): _microsoft,
    (_MICROSOFT, "GroupQueryAttention"): group_query,
    (_MICROSOFT, "MultiHeadAttention"): multi_head,
    (_MICROSOFT, "QAttention"): lambda _, node: QUANTISED.format(described(node)),
}
"""Readers of attention operators, by domain and name."""
