"""What the operators of ONNX and of ONNX Runtime that are an attention each read and do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.heads import Operand
from onnx_tricks.patterns.scores import Bias, Scores
from onnx_tricks.patterns.tracer import Tracer

__all__ = [
    "Reading",
    "group_query",
    "input_at",
    "multi_head",
    "number_of",
    "onnx_attention",
    "straight",
]


@dataclasses.dataclass
class Reading:
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


def onnx_attention(tracer: Tracer, node: ir.Node) -> Reading | str:
    """Attention of opset 23 and later."""
    shape = tracer.run.shape(node.inputs[0]) if node.inputs[0] is not None else None
    others = [tracer.run.shape(one) if one is not None else None for one in node.inputs[1:3]]
    if shape is None or any(one is None for one in others):
        return "the shapes of its inputs are unknown"
    unpack: list[Callable[[Array], Array]]
    if len(shape) == 4:
        assert others[0] is not None
        heads, shared, width = shape[1], others[0][1], shape[3]
        unpack = [straight] * 3
    else:
        heads, shared = (node.attributes[f"{one}_num_heads"].as_int() for one in ("q", "kv"))
        width = shape[2] // heads
        unpack = [_rows(heads), _rows(shared), _rows(shared)]
    if input_at(node, 6) is not None:
        return "it reads a cache of fixed length, of which a part is in use"
    if (
        number_of(node, "left_window_size", -1) >= 0
        or number_of(node, "right_window_size", -1) >= 0
    ):
        return "it lets tokens see a window only"
    mask = input_at(node, 3)
    return Reading(
        _operands(node, (0, 1, 2), unpack),
        heads,
        shared,
        Scores(
            scale=number_of(node, "scale", 0.0) or width**-0.5,
            softcap=number_of(node, "softcap", 0.0) or None,
            terms=() if mask is None else (Bias(mask, 1.0),),
            causal=number_of(node, "is_causal", 0) != 0,
        ),
        True,
        ((4, 1), (5, 2)),
    )


def multi_head(tracer: Tracer, node: ir.Node) -> Reading | str:
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
            other = straight if len(keys) == 4 else _rows(heads)
            operands = _operands(node, (0, 1, 2), [_rows(heads), other, other])
    if input_at(node, 8) is not None or input_at(node, 9) is not None:
        return "it appends to a buffer of fixed length"
    biases = _split_bias(node, 3, heads, width, added=len(shapes[1] or ()) != 4)
    if isinstance(biases, str):
        return biases
    term = input_at(node, 5)
    return Reading(
        operands,
        heads,
        heads,
        Scores(
            scale=number_of(node, "scale", 0.0) or width**-0.5,
            terms=() if term is None else (Bias(term, 1.0),),
            causal=number_of(node, "unidirectional", 0) != 0,
            padding=input_at(node, 4),
        ),
        pasts=((6, 1), (7, 2)),
        biases=biases,
    )


def group_query(tracer: Tracer, node: ir.Node) -> Reading | str:
    """com.microsoft GroupQueryAttention."""
    heads, shared = (node.attributes[f"{one}num_heads"].as_int() for one in ("", "kv_"))
    query = node.inputs[0]
    shape = tracer.run.shape(query) if query is not None else None
    if shape is None:
        return "the shape of its input is unknown"
    packed = input_at(node, 1) is None
    width = shape[2] // (heads + 2 * shared if packed else heads)
    if packed:
        starts = (0, heads * width, (heads + shared) * width)
        counts = (heads, shared, shared)
        unpack = [_part(s, n, width) for s, n in zip(starts, counts, strict=True)]
        operands = _operands(node, (0, 0, 0), unpack)
    else:
        unpack = [_rows(heads), _rows(shared), _rows(shared)]
        operands = _operands(node, (0, 1, 2), unpack)
    if input_at(node, 11) is not None or number_of(node, "smooth_softmax", 0):
        return "its softmax has sinks of attention"
    if input_at(node, 12) is not None or input_at(node, 13) is not None:
        return "its cache is quantised"
    tables = None
    if number_of(node, "do_rotary", 0):
        cos, sin = input_at(node, 7), input_at(node, 8)
        if cos is None or sin is None:
            return "it rotates without tables of cos and sin"
        tables = (cos, sin, input_at(node, 9))
    window = int(number_of(node, "local_window_size", -1))
    term = input_at(node, 10)
    return Reading(
        operands,
        heads,
        shared,
        Scores(
            scale=number_of(node, "scale", 0.0) or width**-0.5,
            softcap=number_of(node, "softcap", 0.0) or None,
            terms=() if term is None else (Bias(term, 1.0),),
            causal=True,
            window=window if window >= 0 else None,
            lengths=input_at(node, 5),
        ),
        pasts=((3, 1), (4, 2)),
        tables=tables,
        interleaved=number_of(node, "rotary_interleaved", 0) != 0,
    )


def _split_bias(
    node: ir.Node, index: int, heads: int, width: int, *, added: bool
) -> tuple[Array | None, Array | None, Array | None] | str:
    """The biases of queries, keys and values that lie in one vector."""
    value = input_at(node, index)
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


def straight(array: Array) -> Array:
    """Heads that lie as the operators need them."""
    return array


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, which may have fewer."""
    return node.inputs[index] if index < len(node.inputs) else None


def number_of(node: ir.Node, name: str, default: float) -> float:
    """An attribute that is a number of either kind."""
    attribute = node.attributes.get(name)
    if attribute is None:
        return default
    if attribute.type == ir.AttributeType.INT:
        return float(attribute.as_int())
    return attribute.as_float()
