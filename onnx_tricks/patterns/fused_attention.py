"""Attention as one operator: ONNX's own, and those of ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_constant
from onnx_tricks.graph.names import described
from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.block import Attention, OpaqueAttention
from onnx_tricks.patterns.cache import STACKED, Cache, axes_behind, leaving
from onnx_tricks.patterns.heads import Heads, Operand, Tracer
from onnx_tricks.patterns.linear import Linear, find_linear
from onnx_tricks.patterns.merge import find_merged
from onnx_tricks.patterns.pasts import input_behind
from onnx_tricks.patterns.projection import Projection
from onnx_tricks.patterns.quantised import QUANTISED
from onnx_tricks.patterns.rotary import Rotary
from onnx_tricks.patterns.scores import Bias, Scores

__all__ = ["FUSED", "read_fused"]

_MICROSOFT = "com.microsoft"
_CACHE_AXES = ("b", "h", "s", "k")


@dataclasses.dataclass
class _Reading:
    """What an operator reads and does.

    Attributes:
        operands: Queries, keys and values.
        heads: H.
        shared: G, the number of key heads.
        scores: What it does to the scores.
        safe: Whether rows in which everything is masked are zeros.
        pasts: Inputs and outputs that hold the caches of keys and of values.
        biases: Constants [heads, width] that it adds to queries, keys and values.
        tables: cos, sin and positions of the rotation that it applies.
        interleaved: Whether that rotation turns neighbours.
    """

    operands: tuple[Operand, Operand, Operand]
    heads: int
    shared: int
    scores: Scores
    safe: bool = False
    pasts: tuple[tuple[int, int], tuple[int, int]] | None = None
    biases: tuple[Array | None, Array | None, Array | None] = (None, None, None)
    tables: tuple[ir.Value, ir.Value, ir.Value | None] | None = None
    interleaved: bool = False


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
    reading: _Reading,
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


def _with_rotary(tracer: Tracer, node: ir.Node, heads: Heads, reading: _Reading) -> Heads | str:
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
    before = _input(node, past)
    after = node.outputs[present] if present < len(node.outputs) else None
    if after is not None and not after.uses() and not after.is_graph_output():
        after = None
    if before is None and after is None:
        return heads
    source = input_behind(before)
    if heads.cache is not None or after is None or (before is not None and source is None):
        return "it appends to a past that is no input of the graph"
    found = leaving(tracer.run, after)
    leaves, axes = found[1] if found else None, axes_behind(before, _CACHE_AXES)
    cache = Cache(source, heads.operand, after, leaves, node, _CACHE_AXES, axes)
    return dataclasses.replace(heads, state=after, state_axes=_CACHE_AXES, cache=cache, inside=True)


def _with_half(tracer: Tracer, node: ir.Node, heads: Heads, half: int) -> Heads | str:
    """Keys (0) or values (1) that the operator keeps in one tensor with the others."""
    past, stacked = _input(node, 4), node.outputs[1] if len(node.outputs) > 1 else None
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
    left = leaving(tracer.run, found)
    new = heads.operand
    cache = Cache(source, new, found, left[1] if left else None, node, _CACHE_AXES, axes)
    return dataclasses.replace(heads, state=found, state_axes=_CACHE_AXES, cache=cache)


def _takes(node: ir.Node, half: int) -> bool:
    """Whether a node takes one half of what is stacked along the first axis."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return False
    index = evaluate(node.inputs[1])
    return index is not None and index.shape == () and int(index) == half


def _onnx(tracer: Tracer, node: ir.Node) -> _Reading | str:
    """Attention of opset 23 and later."""
    shape = tracer.run.shape(node.inputs[0]) if node.inputs[0] is not None else None
    others = [tracer.run.shape(one) if one is not None else None for one in node.inputs[1:3]]
    if shape is None or any(one is None for one in others):
        return "the shapes of its inputs are unknown"
    unpack: list[Callable[[Array], Array]]
    if len(shape) == 4:
        assert others[0] is not None
        heads, shared, width = shape[1], others[0][1], shape[3]
        unpack = [_straight] * 3
    else:
        heads, shared = (node.attributes[f"{one}_num_heads"].as_int() for one in ("q", "kv"))
        width = shape[2] // heads
        unpack = [_rows(heads), _rows(shared), _rows(shared)]
    if _input(node, 6) is not None:
        return "it reads a cache of fixed length, of which a part is in use"
    if _number(node, "left_window_size", -1) >= 0 or _number(node, "right_window_size", -1) >= 0:
        return "it lets tokens see a window only"
    mask = _input(node, 3)
    return _Reading(
        _operands(node, (0, 1, 2), unpack),
        heads,
        shared,
        Scores(
            scale=_number(node, "scale", 0.0) or width**-0.5,
            softcap=_number(node, "softcap", 0.0) or None,
            terms=() if mask is None else (Bias(mask, 1.0),),
            causal=_number(node, "is_causal", 0) != 0,
        ),
        True,
        ((4, 1), (5, 2)),
    )


def _multi_head(tracer: Tracer, node: ir.Node) -> _Reading | str:
    """com.microsoft MultiHeadAttention."""
    heads = node.attributes["num_heads"].as_int()
    shapes = [None if one is None else tracer.run.shape(one) for one in node.inputs[:3]]
    query = shapes[0]
    if query is None:
        return "the shapes of its inputs are unknown"
    if len(query) == 5:
        operands = _operands(node, (0, 0, 0), [_stacked(place) for place in range(3)])
        width = query[4]
    else:
        width, keys = query[2] // heads, shapes[1]
        if keys is None:
            return "the shapes of its inputs are unknown"
        if len(keys) == 5:
            operands = _operands(node, (0, 1, 1), [_rows(heads), _stacked(0), _stacked(1)])
        else:
            other = _straight if len(keys) == 4 else _rows(heads)
            operands = _operands(node, (0, 1, 2), [_rows(heads), other, other])
    if _input(node, 8) is not None or _input(node, 9) is not None:
        return "it appends to a buffer of fixed length"
    biases = _split_bias(node, 3, heads, width, added=len(shapes[1] or ()) != 4)
    if isinstance(biases, str):
        return biases
    term = _input(node, 5)
    return _Reading(
        operands,
        heads,
        heads,
        Scores(
            scale=_number(node, "scale", 0.0) or width**-0.5,
            terms=() if term is None else (Bias(term, 1.0),),
            causal=_number(node, "unidirectional", 0) != 0,
            padding=_input(node, 4),
        ),
        pasts=((6, 1), (7, 2)),
        biases=biases,
    )


def _group_query(tracer: Tracer, node: ir.Node) -> _Reading | str:
    """com.microsoft GroupQueryAttention."""
    heads, shared = (node.attributes[f"{one}num_heads"].as_int() for one in ("", "kv_"))
    query = node.inputs[0]
    shape = tracer.run.shape(query) if query is not None else None
    if shape is None:
        return "the shape of its input is unknown"
    packed = _input(node, 1) is None
    width = shape[2] // (heads + 2 * shared if packed else heads)
    if packed:
        starts = (0, heads * width, (heads + shared) * width)
        counts = (heads, shared, shared)
        unpack = [_part(s, n, width) for s, n in zip(starts, counts, strict=True)]
        operands = _operands(node, (0, 0, 0), unpack)
    else:
        unpack = [_rows(heads), _rows(shared), _rows(shared)]
        operands = _operands(node, (0, 1, 2), unpack)
    if _input(node, 11) is not None or _number(node, "smooth_softmax", 0):
        return "its softmax has sinks of attention"
    if _input(node, 12) is not None or _input(node, 13) is not None:
        return "its cache is quantised"
    tables = None
    if _number(node, "do_rotary", 0):
        cos, sin = _input(node, 7), _input(node, 8)
        if cos is None or sin is None:
            return "it rotates without tables of cos and sin"
        tables = (cos, sin, _input(node, 9))
    window = int(_number(node, "local_window_size", -1))
    term = _input(node, 10)
    return _Reading(
        operands,
        heads,
        shared,
        Scores(
            scale=_number(node, "scale", 0.0) or width**-0.5,
            softcap=_number(node, "softcap", 0.0) or None,
            terms=() if term is None else (Bias(term, 1.0),),
            causal=True,
            window=window if window >= 0 else None,
            lengths=_input(node, 5),
        ),
        pasts=((3, 1), (4, 2)),
        tables=tables,
        interleaved=_number(node, "rotary_interleaved", 0) != 0,
    )


def _microsoft(tracer: Tracer, node: ir.Node) -> Attention | str:
    """com.microsoft Attention, which projects queries, keys and values by itself."""
    source, heads = node.inputs[0], node.attributes["num_heads"].as_int()
    linear = find_linear(node, 0, -1)
    if source is None or isinstance(linear, str) or not linear.weight.readable:
        return "its weights are not constant"
    if linear.weight.rank != 2 or linear.weight.axis != 0:
        return "its weights are arranged in a way that is not understood"
    if _input(node, 6) is not None:
        return "it appends to a buffer of fixed length"
    if _number(node, "do_rotary", 0):
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
    term = _input(node, 5)
    scores = Scores(
        scale=_number(node, "scale", 0.0) or query.head_width**-0.5,
        terms=() if term is None else (Bias(term, 1.0),),
        causal=_number(node, "unidirectional", 0) != 0,
        padding=_input(node, 3),
    )
    whole = Operand(source, _straight)
    reading = _Reading((whole, whole, whole), heads, heads, scores)
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


def _split_bias(
    node: ir.Node, index: int, heads: int, width: int, *, added: bool
) -> tuple[Array | None, Array | None, Array | None] | str:
    """The biases of queries, keys and values that lie in one vector."""
    value = _input(node, index)
    if value is None:
        return None, None, None
    bias = evaluate(value)
    if bias is None:
        return "its bias is not constant"
    parts = np.split(bias.astype(np.float64).reshape(-1), [heads * width, 2 * heads * width])
    query, keys, values = (part.reshape(heads, -1) for part in parts)
    return (query, keys, values) if added else (query, None, None)


def _operands(
    node: ir.Node, places: tuple[int, int, int], unpack: list[Callable[[Array], Array]]
) -> tuple[Operand, Operand, Operand]:
    found = []
    for place, function in zip(places, unpack, strict=True):
        value = node.inputs[place]
        assert value is not None
        found.append(Operand(value, function))
    return found[0], found[1], found[2]


def _straight(array: Array) -> Array:
    return array


def _rows(heads: int) -> Callable[[Array], Array]:
    """[B, S, H K] to [B, H, S, K]."""
    return lambda array: np.swapaxes(array.reshape(*array.shape[:2], heads, -1), 1, 2)


def _part(start: int, heads: int, width: int) -> Callable[[Array], Array]:
    """Some channels of [B, S, ...] to [B, H, S, K]."""
    rows = _rows(heads)
    return lambda array: rows(array[..., start : start + heads * width])


def _stacked(place: int) -> Callable[[Array], Array]:
    """[B, S, H, n, K] to [B, H, S, K]."""
    return lambda array: np.swapaxes(array[:, :, :, place], 1, 2)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    if attribute.type == ir.AttributeType.INT:
        return float(attribute.as_int())
    return attribute.as_float()


_Reader = Callable[[Tracer, ir.Node], "_Reading | Attention | str"]
FUSED: dict[tuple[str, str], _Reader] = {
    ("", "Attention"): _onnx,
    (_MICROSOFT, "Attention"): _microsoft,
    (_MICROSOFT, "GroupQueryAttention"): _group_query,
    (_MICROSOFT, "MultiHeadAttention"): _multi_head,
    (_MICROSOFT, "QAttention"): lambda _, node: QUANTISED.format(described(node)),
}
"""Readers of attention operators, by domain and name."""
