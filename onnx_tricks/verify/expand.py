"""Ops that ONNX Runtime computes only in narrow types, written in ops that it computes in double.

Only what would spoil a float64 reference is here: the ops that carry the residual stream, the
convolution, norms of images, and Erf, which is in every exact GELU.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = ["expand"]

# A convolution is unfolded into a matrix; where that grows its input more, it stays in float32.
_LARGEST_UNFOLDING = 4
_REDUCE_SUM_BY_INPUT = 13  # the opset since which its axes are an input
_TO_THE_END = np.iinfo(np.int64).max


def expand(node: ir.Node) -> list[ir.Node]:
    """Write a node as nodes that have double kernels.

    Args:
        node: A node in a graph. The uses of its outputs are moved to the new nodes.

    Returns:
        The nodes to put in its place; none where there is no expansion (another op, or a form of
        it that is not covered).
    """
    form = _FORMS.get((node.domain, node.op_type))
    if form is None or any(attr.is_ref() for attr in node.attributes.values()):
        return []
    tape = _Tape()
    results = form(tape, node)
    for old, new in zip(node.outputs, results, strict=False):
        if new is not None:
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            old.name, new.name = None, old.name
    return tape.nodes if results else []


class _Tape:
    """Collects nodes in order."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __call__(
        self,
        op: str,
        *inputs: ir.Value | None,
        **attributes: int | float | list[int] | ir.TensorProtocol,
    ) -> ir.Value:
        node = ir.node(op, list(inputs), attributes)
        self.nodes.append(node)
        return node.outputs[0]

    def integers(self, *numbers: int) -> ir.Value:
        return self.constant(np.array(numbers, np.int64))

    def constant(self, array: npt.ArrayLike) -> ir.Value:
        return self("Constant", value=ir.tensor(np.asarray(array)))


def _skip_norm(tape: _Tape, node: ir.Node) -> list[ir.Value | None]:
    """``norm(input + skip + bias)``; the sum itself is the fourth output."""
    x, skip, gamma, *rest = [*node.inputs, None, None]
    simplified = node.op_type == "SkipSimplifiedLayerNormalization"
    beta, bias = (None, rest[0]) if simplified else rest[:2]
    total = tape("Add", x, skip)
    if bias is not None:
        total = tape("Add", total, bias)
    attribute = node.attributes.get("epsilon")
    epsilon = 1e-12 if attribute is None else attribute.as_float()
    if simplified:
        y = tape("SimplifiedLayerNormalization", total, gamma, axis=-1, epsilon=epsilon)
    else:
        y = tape("LayerNormalization", total, gamma, beta, axis=-1, epsilon=epsilon)
    if any(value.name and (value.uses() or value.is_graph_output()) for value in node.outputs[1:3]):
        return []
    return [y, None, None, total]


def _conv(tape: _Tape, node: ir.Node) -> list[ir.Value | None]:
    """Unfold one spatial axis after the other, so that a product with a matrix remains."""
    x, w, b = [*node.inputs, None][:3]
    if w is None or w.shape is None or not w.shape.is_static():
        return []
    out_channels, in_channels, *kernel = (int(n) for n in w.shape.numpy())
    rank = len(kernel)
    strides = _integers(node, "strides", [1] * rank)
    dilations = _integers(node, "dilations", [1] * rank)
    pads = _integers(node, "pads", [0] * rank * 2)
    auto_pad = node.attributes.get("auto_pad")
    (groups,) = _integers(node, "group", [1])
    grouped = groups != 1 and math.prod(kernel) != 1
    too_large = math.prod(kernel) > _LARGEST_UNFOLDING * math.prod(strides)
    if grouped or too_large or (auto_pad is not None and auto_pad.as_string() != "NOTSET"):
        return []
    if any(pads):
        x = tape("Pad", x, tape.integers(0, 0, *pads[:rank], 0, 0, *pads[rank:]))
    for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        shifted = []
        for offset in range(size):
            left = dilation * (size - 1 - offset)
            end = -left if left else _TO_THE_END
            bounds = [offset * dilation, end, axis + 2, stride]
            shifted.append(tape("Slice", x, *(tape.integers(n) for n in bounds)))
        x = tape("Concat", *shifted, axis=1)
    # Groups come first, taps before channels; there is one group where there are several taps.
    shape = tape.integers(groups, out_channels // groups, -1)
    matrix = tape("Reshape", tape("Transpose", w, perm=[0, *range(rank + 1, 0, -1)]), shape)
    rows = tape("Transpose", x, perm=[0, *range(2, rank + 2), 1])
    outer = [0] * (rank + 1)
    rows = tape("Reshape", rows, tape.integers(*outer, groups, 1, in_channels * math.prod(kernel)))
    y = tape("MatMul", rows, tape("Transpose", matrix, perm=[0, 2, 1]))
    y = tape("Reshape", y, tape.integers(*outer, out_channels))
    if b is not None:
        y = tape("Add", y, b)
    return [tape("Transpose", y, perm=[0, rank + 1, *range(1, rank + 1)])]


def _erf(tape: _Tape, node: ir.Node) -> list[ir.Value | None]:
    """Taylor expansion around the nearest point of a table; the remainder is below 1e-13."""
    steps, end = 1024.0, 6.0  # 1 - erf(6) is below half a unit in the last place
    grid = np.arange(0, end * steps + 1) / steps
    x = node.inputs[0]
    size = tape("Min", tape("Abs", x), tape.constant(end))
    nearest = tape("Add", tape("Mul", size, tape.constant(steps)), tape.constant(0.5))
    index = tape("Cast", nearest, to=int(ir.DataType.INT64))
    point = tape("Gather", tape.constant(grid), index)
    value = tape("Gather", tape.constant(np.array([math.erf(z) for z in grid])), index)
    slope = tape("Gather", tape.constant(2 / math.sqrt(math.pi) * np.exp(-grid * grid)), index)
    d = tape("Sub", size, point)
    # d - c d^2 + (2 c^2 - 1) / 3 d^3, by Horner's rule
    cubic = tape("Mul", tape.constant(2 / 3), tape("Mul", point, point))
    cubic = tape("Mul", d, tape("Sub", cubic, tape.constant(1 / 3)))
    inner = tape("Sub", cubic, point)
    series = tape("Mul", d, tape("Add", tape("Mul", d, inner), tape.constant(1.0)))
    result = tape("Add", value, tape("Mul", slope, series))
    return [tape("Mul", tape("Sign", x), result)]


def _instance_norm(tape: _Tape, node: ir.Node) -> list[ir.Value | None]:
    """Each channel of each image less its mean, over its deviation."""
    x, gain, bias = node.inputs
    graph = node.graph
    if not isinstance(graph, ir.Graph) or graph.opset_imports.get("", 0) < _REDUCE_SUM_BY_INPUT:
        return []
    last, inner = tape.integers(-1), tape.integers(1)
    rows = tape("Reshape", x, tape.integers(0, 0, -1))
    double = int(ir.DataType.DOUBLE)
    count = tape("Cast", tape("Gather", tape("Shape", rows), last), to=double)
    centred = tape("Sub", rows, tape("Div", tape("ReduceSum", rows, last), count))
    square = tape("Div", tape("ReduceSum", tape("Mul", centred, centred), last), count)
    attribute = node.attributes.get("epsilon")
    epsilon = tape.constant(np.float64(1e-5 if attribute is None else attribute.as_float()))
    deviation = tape("Sqrt", tape("Add", square, epsilon))
    scaled = tape("Mul", tape("Div", centred, deviation), tape("Unsqueeze", gain, inner))
    shifted = tape("Add", scaled, tape("Unsqueeze", bias, inner))
    return [tape("Reshape", shifted, tape("Shape", x))]


def _integers(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attr = node.attributes.get(name)
    if attr is None:
        return default
    return [attr.as_int()] if attr.type == ir.AttributeType.INT else list(attr.as_ints())


_FORMS: dict[tuple[str, str], Callable[[_Tape, ir.Node], list[ir.Value | None]]] = {
    ("", "Conv"): _conv,
    ("", "Erf"): _erf,
    ("", "InstanceNormalization"): _instance_norm,
    ("com.microsoft", "SkipLayerNormalization"): _skip_norm,
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): _skip_norm,
}
