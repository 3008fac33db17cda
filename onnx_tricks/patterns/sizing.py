"""The shapes that operators give their results, where these follow from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate

__all__ = ["BROADCAST", "LIKE_FIRST", "REDUCTIONS", "output_shapes"]

Shape = tuple[int, ...]
_Shapes = Sequence[Shape | None]
_MICROSOFT = "com.microsoft"

LIKE_FIRST = frozenset(
    "Abs BiasGelu Cast Ceil Celu Clip Cos CumSum Dropout Elu Erf Exp FastGelu Floor Gelu "
    "HardSigmoid HardSwish Identity IsInf IsNaN LayerNormalization LeakyRelu Log LogSoftmax "
    "LpNormalization Mish Neg Not QuickGelu RMSNormalization Reciprocal Relu RotaryEmbedding "
    "Round ScatterElements ScatterND Sigmoid Sign SimplifiedLayerNormalization Sin "
    "SkipLayerNormalization SkipSimplifiedLayerNormalization Softmax Softplus Sqrt Swish Tanh "
    "Trilu".split()
)
BROADCAST = frozenset(
    "Add And BiasSoftmax Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or "
    "PRelu Pow Sub Sum Where Xor".split()
)
REDUCTIONS = frozenset(
    "ReduceL1 ReduceL2 ReduceLogSumExp ReduceMean ReduceMin ReduceSum ReduceSumSquare".split()
)


def output_shapes(node: ir.Node, shapes: _Shapes) -> list[Shape] | None:
    """The shapes of a node's outputs, from those of its inputs; None where there is no rule.

    Args:
        node: The node.
        shapes: By input its shape; None where it is absent or unknown.
    """
    first = shapes[0] if shapes else None
    if node.op_type in LIKE_FIRST:
        # The operators that add a residual give the sum as their fourth output.
        return None if first is None else [first] * len(node.outputs)
    present = [shape for v, shape in zip(node.inputs, shapes, strict=True) if v is not None]
    if any(shape is None for shape in present):
        return None
    rule = _RULES.get((node.domain, node.op_type))
    try:
        if node.op_type in BROADCAST:
            return [np.broadcast_shapes(*(shape for shape in present if shape is not None))]
        if node.op_type in REDUCTIONS:
            return _reduced(node, shapes)
        return None if rule is None else rule(node, shapes)
    except (ValueError, IndexError, KeyError):
        return None


def _shape(shapes: _Shapes, index: int) -> Shape:
    shape = shapes[index] if index < len(shapes) else None
    if shape is None:
        raise ValueError(f"input {index} is absent")
    return shape


def _matmul(node: ir.Node, shapes: _Shapes) -> list[Shape]:
    left, right = _shape(shapes, 0), _shape(shapes, 1)
    fused = node.op_type == "FusedMatMul"
    if fused and node.attributes.get_int("transA", 0) != 0:
        left = (*left[:-2], left[-1], left[-2])
    if fused and node.attributes.get_int("transB", 0) != 0:
        right = (*right[:-2], right[-1], right[-2])
    if len(right) == 1:
        return [left[:-1]]
    if len(left) == 1:
        return [(*right[:-2], right[-1])]
    return [(*np.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])]


def _gemm(node: ir.Node, shapes: _Shapes) -> list[Shape]:
    left, right = _shape(shapes, 0), _shape(shapes, 1)
    rows = left[1 if node.attributes.get_int("transA", 0) else 0]
    return [(rows, right[0 if node.attributes.get_int("transB", 0) else 1])]


def _matmul_bits(node: ir.Node, shapes: _Shapes) -> list[Shape]:
    return [(*_shape(shapes, 0)[:-1], node.attributes["N"].as_int())]


def _einsum(node: ir.Node, shapes: _Shapes) -> list[Shape] | None:
    left, _, right = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    if not right or "." in left:
        return None
    terms = left.split(",")
    lengths = {
        label: length
        for index, term in enumerate(terms)
        for label, length in zip(term, _shape(shapes, index), strict=True)
    }
    return [tuple(lengths[label] for label in right)]


def _reduced(node: ir.Node, shapes: _Shapes) -> list[Shape] | None:
    # Axes given as an input are nearly always the last; any other is told by keepdims alone.
    source = _shape(shapes, 0)
    if "axes" in node.attributes:
        axes = {axis % len(source) for axis in node.attributes["axes"].as_ints()}
    elif len(node.inputs) > 1 and node.inputs[1] is not None:
        constant = evaluate(node.inputs[1])
        if constant is None:
            return None
        axes = {int(axis) % len(source) for axis in constant.reshape(-1)}
    else:
        axes = set(range(len(source)))
    if node.attributes.get_int("keepdims", 1):
        return [tuple(1 if i in axes else n for i, n in enumerate(source))]
    return [tuple(n for i, n in enumerate(source) if i not in axes)]


def _onnx_attention(node: ir.Node, shapes: _Shapes) -> list[Shape]:
    query, key, value = (_shape(shapes, index) for index in range(3))
    if len(query) == 4:
        return [(*query[:3], value[3]), key, value]
    heads = node.attributes["q_num_heads"].as_int()
    shared = node.attributes["kv_num_heads"].as_int()
    width = value[2] // shared
    cache = (key[0], shared, key[1])
    return [(*query[:2], heads * width), (*cache, key[2] // shared), (*cache, width)]


def _microsoft_attention(node: ir.Node, shapes: _Shapes) -> list[Shape]:
    source, weight = _shape(shapes, 0), _shape(shapes, 1)
    sizes = node.attributes.get_ints("qkv_hidden_sizes") or (weight[1] // 3,) * 3
    heads = node.attributes["num_heads"].as_int()
    cache = (2, source[0], heads, source[1], sizes[2] // heads)
    return [(*source[:2], sizes[2]), cache]


def _multi_head(node: ir.Node, shapes: _Shapes) -> list[Shape]:
    query, heads = _shape(shapes, 0), node.attributes["num_heads"].as_int()
    if len(query) == 5:  # [B, S, H, 3, K]
        batch, length, width = query[0], query[1], heads * query[4]
        cache = (batch, heads, length, query[4])
        return [(batch, length, width), cache, cache]
    key = _shape(shapes, 1)
    if len(key) == 5:
        cache = (key[0], heads, key[1], key[4])
        return [(*query[:2], heads * key[4]), cache, cache]
    value = _shape(shapes, 2)
    if len(value) == 4:
        return [(*query[:2], heads * value[3]), key, value]
    lead = (key[0], heads, key[1])
    return [(*query[:2], value[2]), (*lead, key[2] // heads), (*lead, value[2] // heads)]


def _group_query(node: ir.Node, shapes: _Shapes) -> list[Shape]:
    query = _shape(shapes, 0)
    heads = node.attributes["num_heads"].as_int()
    shared = node.attributes["kv_num_heads"].as_int()
    packed = len(node.inputs) < 2 or node.inputs[1] is None
    width = query[2] // (heads + 2 * shared if packed else heads)
    cache = (query[0], shared, query[1], width)
    return [(*query[:2], heads * width), cache, cache]


def _embedding(_: ir.Node, shapes: _Shapes) -> list[Shape]:
    ids, table = _shape(shapes, 0), _shape(shapes, 2)
    return [(*ids, table[-1]), ids[:1]]


_RULES: dict[tuple[str, str], Callable[[ir.Node, _Shapes], list[Shape] | None]] = {
    ("", "Attention"): _onnx_attention,
    ("", "Einsum"): _einsum,
    ("", "Gemm"): _gemm,
    ("", "MatMul"): _matmul,
    (_MICROSOFT, "Attention"): _microsoft_attention,
    (_MICROSOFT, "DecoderMaskedMultiHeadAttention"): _multi_head,
    (_MICROSOFT, "EmbedLayerNormalization"): _embedding,
    (_MICROSOFT, "FusedMatMul"): _matmul,
    (_MICROSOFT, "GroupQueryAttention"): _group_query,
    (_MICROSOFT, "MatMulNBits"): _matmul_bits,
    (_MICROSOFT, "MultiHeadAttention"): _multi_head,
}
