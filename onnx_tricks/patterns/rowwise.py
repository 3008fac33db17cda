"""Operators that compute every token's numbers from that token's numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.patterns.layout import (
    Axis,
    Layout,
    axis_of,
    broadcast,
    inner_size,
    replaced,
    symbols,
)
from onnx_tricks.patterns.rowmoves import MOVE_RULES, Result, Rule, View

__all__ = ["follow_rows"]

_MICROSOFT = "com.microsoft"
_FLAT_SOFTMAX = 12  # the last opset in which Softmax flattens the axes behind its own


def follow_rows(view: View) -> Result:
    """The layouts of a node's outputs, or None where it is not row-wise."""
    rule = _RULES.get((view.node.domain, view.node.op_type))
    first = view.layouts[0] if view.layouts else None
    try:
        return None if rule is None or first is None else rule(view, first)
    except (IndexError, KeyError):
        return None  # a node that contradicts the ranks of its inputs


def _elementwise(view: View, _: Layout) -> Result:
    result = broadcast([layout for layout in view.layouts if layout is not None])
    return [result] * len(view.node.outputs)


def _same(view: View, first: Layout) -> Result:
    """Element by element, with parameters that are the same for all tokens."""
    if any(layout is not None and symbols(layout) for layout in view.layouts[1:]):
        return None
    return [first] * len(view.node.outputs)


def _dropout(view: View, first: Layout) -> Result:
    training = evaluate(view.node.inputs[2]) if view.given(2) else None
    return None if view.given(2) and (training is None or training.any()) else _same(view, first)


def _quantise(view: View, first: Layout) -> Result:
    """QuantizeLinear and its inverse, with one scale for all numbers."""
    return (
        [first] if not any(axis for layout in view.layouts[1:] for axis in layout or ()) else None
    )


def _experts(view: View, first: Layout) -> Result:
    """com.microsoft MoE: rows, their scores, and the weights of the experts."""
    scores, weights = view.layouts[1], view.layouts[2:]
    if scores is None or scores[:-1] != first[:-1]:
        return None
    return None if any(symbols(layout) for layout in weights if layout) else [first]


def _matmul(view: View, left: Layout) -> Result:
    right = view.layouts[1]
    node = view.node
    if right is None or any(node.attributes.get_int(f"transBatch{one}", 0) for one in "AB"):
        return None
    if node.attributes.get_int("transA", 0):
        left = (*left[:-2], left[-1], left[-2])
    if node.attributes.get_int("transB", 0):
        right = (*right[:-2], right[-1], right[-2])
    return [_product(left, right)]


def _product(left: Layout, right: Layout) -> Layout | None:
    if not left or not right:
        return None
    rows = left[-2:-1]
    columns = right[-1:] if len(right) > 1 else ()
    contracted = right[-2] if len(right) > 1 else right[-1]
    if left[-1] != contracted or inner_size(contracted) is None:
        return None
    batch = broadcast([left[:-2], right[:-2]])
    return None if batch is None else (*batch, *rows, *columns)


def _gemm(view: View, left: Layout) -> Result:
    product = _matmul(view, left)
    result = product[0] if product else None
    if result is not None and view.given(2) and view.layouts[2] is not None:
        return [result if broadcast([result, view.layouts[2]]) == result else None]
    return [result]


def _packed_matmul(view: View, first: Layout) -> Result:
    """MatMulNBits: the weight is packed, its sizes are attributes."""
    attributes = view.node.attributes
    if first[-1] != axis_of(attributes["K"].as_int()) or _same(view, first) is None:
        return None
    return [(*first[:-1], axis_of(attributes["N"].as_int()))]


def _norm(view: View, first: Layout) -> Result:
    start = view.axis(-1, len(first))
    if _same(view, first) is None or any(inner_size(axis) is None for axis in first[start:]):
        return None
    statistic = (*first[:start], *[()] * (len(first) - start))
    return [first, statistic, statistic][: len(view.node.outputs)]


def _skip_norm(view: View, first: Layout) -> Result:
    """Input and skip are summed; the sum is the fourth output."""
    skip = view.layouts[1]
    total = broadcast([first, skip]) if skip is not None else None
    rest = view.layouts[2:]
    if total is None or inner_size(total[-1]) is None:
        return None
    if any(layout is not None and symbols(layout) for layout in rest):
        return None
    statistic = (*total[:-1], ())
    return [total, statistic, statistic, total][: len(view.node.outputs)]


def _reduce(view: View, first: Layout) -> Result:
    axes = view.axes(1)
    if not axes:
        return None
    keep = view.node.attributes.get_int("keepdims", 1)
    return [_reduced(first, axes, bool(keep))]


def _arg(view: View, first: Layout) -> Result:
    keep = view.node.attributes.get_int("keepdims", 1)
    return [_reduced(first, (view.axis(0, len(first)),), bool(keep))]


def _reduced(layout: Layout, axes: Sequence[int], keep: bool) -> Layout | None:
    gone = {axis % len(layout) for axis in axes}
    if any(inner_size(layout[axis]) is None for axis in gone):
        return None
    return tuple(
        () if place in gone else axis
        for place, axis in enumerate(layout)
        if keep or place not in gone
    )


def _softmax(view: View, first: Layout) -> Result:
    flat = view.opset <= _FLAT_SOFTMAX
    start = view.axis(1 if flat else -1, len(first))
    mixed = first[start:] if flat else first[start : start + 1]
    return [first] if all(inner_size(axis) is not None for axis in mixed) else None


def _along(view: View, first: Layout) -> Result:
    """CumSum: along an axis that a constant input names."""
    axis = view.integers(1)
    if axis is None or inner_size(first[axis[0]]) is None:
        return None
    return [first]


def _topk(view: View, first: Layout) -> Result:
    count, place = view.integers(1), view.axis(-1, len(first))
    if count is None or inner_size(first[place]) is None:
        return None
    return [replaced(first, place, axis_of(count[0]))] * 2


def _einsum(view: View, _: Layout) -> Result:
    equation = view.node.attributes["equation"].as_string().replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    axes: dict[str, Axis] = {}
    if not arrow or "." in left or len(terms) != len(view.layouts):
        return None
    for term, layout in zip(terms, view.layouts, strict=True):
        if layout is None or len(term) != len(layout) or len(set(term)) != len(term):
            return None
        for label, axis in zip(term, layout, strict=True):
            if axes.setdefault(label, axis) != axis:
                return None
    if any(inner_size(axis) is None for label, axis in axes.items() if label not in right):
        return None
    return [tuple(axes[label] for label in right)]


_ELEMENTWISE = """
Abs Add And Ceil Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish
IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal
Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tan Tanh ThresholdedRelu Where
Xor
""".split()
_REDUCTIONS = """
ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare
""".split()

_RULES: dict[tuple[str, str], Rule] = {
    **MOVE_RULES,
    **{("", name): _elementwise for name in _ELEMENTWISE},
    **{("", name): _reduce for name in _REDUCTIONS},
    **{("", name): _same for name in ("Cast", "CastLike", "Clip", "Identity")},
    **{(_MICROSOFT, name): _elementwise for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")},
    ("", "ArgMax"): _arg,
    ("", "ArgMin"): _arg,
    ("", "CumSum"): _along,
    ("", "DequantizeLinear"): _quantise,
    ("", "Dropout"): _dropout,
    ("", "Einsum"): _einsum,
    ("", "Gemm"): _gemm,
    ("", "LayerNormalization"): _norm,
    ("", "LogSoftmax"): _softmax,
    ("", "MatMul"): _matmul,
    ("", "QuantizeLinear"): _quantise,
    ("", "RMSNormalization"): _norm,
    ("", "SimplifiedLayerNormalization"): _norm,
    ("", "Softmax"): _softmax,
    ("", "TopK"): _topk,
    (_MICROSOFT, "FusedGemm"): _gemm,
    (_MICROSOFT, "FusedMatMul"): _matmul,
    (_MICROSOFT, "MatMulNBits"): _packed_matmul,
    (_MICROSOFT, "MoE"): _experts,
    (_MICROSOFT, "SimplifiedLayerNormalization"): _norm,
    (_MICROSOFT, "SkipLayerNormalization"): _skip_norm,
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_norm,
}
