"""Linear layers with constant weights: `y = x W + b`, whatever the operator is called."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_constant, is_default
from onnx_tricks.graph.shapes import rank_of, shape_of
from onnx_tricks.patterns.weight import Weight, trace_weight
from onnx_tricks.weights import row_product

__all__ = ["Linear", "find_linear"]

_Array = np.ndarray[Any, np.dtype[Any]]
_MICROSOFT = "com.microsoft"


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer as one of its activations sees it.

    Attributes:
        node: The operator.
        weight: The constant operand; `weight.axis` is the axis that is contracted with channels.
        weight_index: Which input of the node the weight is.
        bias: The constant added to the product, or None where nothing is.
        bias_index: Where a bias goes: an input of the node, or None when an Add has to hold it.
        bias_add: The Add behind the node that holds the present bias, if one does.
        contribution: How a constant row [D] in front of the layer turns into a bias behind it:
            given the operand (as read by the node) and the row, both float64, the term to add; None
            where the layer cannot take one.
        groups: Number of channel groups (grouped Conv).
    """

    node: ir.Node
    weight: Weight
    weight_index: int
    bias: ir.Value | None = None
    bias_index: int | None = None
    bias_add: ir.Node | None = None
    contribution: Callable[[_Array, _Array], _Array] | None = None
    groups: int = 1

    @property
    def output(self) -> ir.Value:
        """The layer's output, bias included."""
        return (self.bias_add or self.node).outputs[0]


def find_linear(node: ir.Node, index: int, axis: int) -> Linear | str:
    """Read a node as a linear layer applied to the channels on one axis of one input.

    Args:
        node: The reader of the activations.
        index: Which of its inputs the activations are.
        axis: Their channel axis, counted from the end.

    Returns:
        The layer, or the reason why the node is none.
    """
    finder = _FINDERS.get((node.domain, node.op_type))
    if finder is None:
        if node.domain == "" and node.op_type in ("Add", "Sub", "Sum"):
            return "adds it to another value, as a residual connection does"
        if node.op_type in _ATTENTION_PARTS:
            return "takes it as queries, keys or values"
        return "is not linear in it"
    return finder(node, index, axis)


def _matmul(node: ir.Node, index: int, axis: int) -> Linear | str:
    fused = node.op_type == "FusedMatMul"
    if fused and (_flag(node, "transBatchA") or _flag(node, "transBatchB")):
        return "transposes its batch axes"
    transposed = [_flag(node, key) and fused for key in ("transA", "transB")]
    contracted = {0: -2 if transposed[0] else -1, 1: -1 if transposed[1] else -2}
    if axis != contracted[index]:
        return "multiplies along another axis"
    other = 1 - index
    operand = node.inputs[other]
    rank = rank_of(operand) if operand is not None else None
    weight = trace_weight(operand, 0 if rank == 1 else contracted[other])
    if weight is None:
        return _no_weight(operand)
    alpha = node.attributes.get_float("alpha", 1.0) if fused else 1.0

    def contribution(matrix: _Array, row: _Array) -> _Array:
        if matrix.ndim > 1 and transposed[other] == (index == 0):
            matrix = np.swapaxes(matrix, -1, -2)
        product = alpha * row_product(row, matrix)
        if index == 1:
            return product[..., None]  # a weight on the left: one number per row of the output
        return product if matrix.ndim <= 2 else product[..., None, :]

    add, bias = _bias_behind(node.outputs[0])
    return Linear(node, weight, other, bias, None, add, contribution)


def _gemm(node: ir.Node, index: int, axis: int) -> Linear | str:
    if index == 2:
        return "adds it as a bias"
    transposed = [_flag(node, key) for key in ("transA", "transB")]
    contracted = {0: -2 if transposed[0] else -1, 1: -1 if transposed[1] else -2}
    if axis != contracted[index]:
        return "multiplies along another axis"
    other = 1 - index
    weight = trace_weight(node.inputs[other], contracted[other])
    if weight is None:
        return _no_weight(node.inputs[other])
    alpha = node.attributes.get_float("alpha", 1.0)
    beta = node.attributes.get_float("beta", 1.0)

    def contribution(matrix: _Array, row: _Array) -> _Array:
        matrix = matrix.T if transposed[other] == (index == 0) else matrix
        product = alpha / beta * row_product(row, matrix)
        return product if index == 0 else product[:, None]

    present = node.inputs[2] if len(node.inputs) > 2 else None
    fits = beta != 0 and (present is None or evaluate(present) is not None)
    return Linear(node, weight, other, present, 2, None, contribution if fits else None)


def _conv(node: ir.Node, index: int, axis: int) -> Linear | str:
    if index != 0:
        return "uses it as a kernel"
    weight = trace_weight(node.inputs[1], 1)
    if weight is None or weight.path:
        return "multiplies it with something that is not a constant weight"
    kernel = tuple(weight.tensor.shape.numpy())
    if axis != 1 - len(kernel):
        return "convolves along another axis"
    groups = node.attributes.get_int("group", 1)
    padded = any(node.attributes.get_ints("pads", ())) or node.attributes.get_string(
        "auto_pad", "NOTSET"
    ) not in ("NOTSET", "VALID")

    def contribution(matrix: _Array, row: _Array) -> _Array:
        taps = matrix.reshape(groups, matrix.shape[0] // groups, matrix.shape[1], -1).sum(axis=-1)
        total: _Array = np.einsum("goc,gc->go", taps, row.reshape(groups, -1))
        return total.reshape(-1)

    # Padding puts zeros where the bias of the norm would have been.
    present = node.inputs[2] if len(node.inputs) > 2 else None
    fits = not padded and (present is None or evaluate(present) is not None)
    return Linear(node, weight, 1, present, 2, None, contribution if fits else None, groups=groups)


def _transposed_conv(node: ir.Node, index: int, axis: int) -> Linear | str:
    if index != 0:
        return "uses it as a kernel"
    weight = trace_weight(node.inputs[1], 0)
    if weight is None or weight.path:
        return _no_weight(node.inputs[1])
    if axis != 1 - weight.rank:
        return "convolves along another axis"
    # Borders, and places between strides, get fewer taps: no bias is the same everywhere.
    return Linear(node, weight, 1)


def _recurrent(node: ir.Node, index: int, axis: int) -> Linear | str:
    """The gates of RNN, GRU and LSTM: weights [directions, gates, D] on what comes in."""
    if index != 0 or axis != -1:
        return "uses it for something else than its input"
    weight = trace_weight(node.inputs[1], 2)
    if weight is None:
        return _no_weight(node.inputs[1])

    def contribution(matrix: _Array, row: _Array) -> _Array:
        gates = row_product(row, np.swapaxes(matrix, -1, -2))
        return np.concatenate([gates, np.zeros_like(gates)], axis=-1)  # and those of the state

    present = node.inputs[3] if len(node.inputs) > 3 else None
    fits = present is None or evaluate(present) is not None
    return Linear(node, weight, 1, present, 3, None, contribution if fits else None)


def _attention(node: ir.Node, index: int, axis: int) -> Linear | str:
    """com.microsoft Attention: packed query, key and value projection inside the operator."""
    if index != 0:
        return "uses it for something else than its input projection"
    weight = trace_weight(node.inputs[1], 0)
    if weight is None or axis != -1:
        return "multiplies it with something that is not a constant weight"
    present = node.inputs[2] if len(node.inputs) > 2 else None
    fits = present is None or evaluate(present) is not None
    return Linear(node, weight, 1, present, 2, None, _row_times if fits else None)


def _experts(node: ir.Node, index: int, axis: int) -> Linear | str:
    """com.microsoft MoE: the first matrices of all experts, inside the operator."""
    if index != 0 or axis != -1:
        return "uses it for something else than the input of experts"
    given = [*node.inputs, *(None,) * 7][:7]
    if given[6] is not None:
        return "multiplies it with two matrices of each expert"
    # Experts [E, F, D] and [E, D, F], or as older versions had them [E, D, F] and [E, F, D].
    first, second = (shape_of(one) if one is not None else None for one in (given[2], given[4]))
    if first is None or second is None or len(first) != 3 or len(second) != 3:
        return "multiplies it with something that is not a constant weight"
    places = [place for place in (-1, -2) if first[place] == second[-3 - place]]
    weight = trace_weight(given[2], places[0]) if len(places) == 1 else None
    if weight is None:
        return "holds experts whose layout cannot be told, or that are no constants"

    def contribution(matrix: _Array, row: _Array) -> _Array:
        return row_product(row, np.swapaxes(matrix, -1, -2) if places[0] == -1 else matrix)

    fits = given[3] is None or evaluate(given[3]) is not None
    return Linear(node, weight, 2, given[3], 3, None, contribution if fits else None)


def _row_times(matrix: _Array, row: _Array) -> _Array:
    return row_product(row, matrix)


def _einsum(node: ir.Node, index: int, axis: int) -> Linear | str:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != 2 or not right or len(terms[index]) < -axis or "." in equation:
        return "is an Einsum of another form than activations times weight"
    label = terms[index][axis]
    other = 1 - index
    if terms[other].count(label) != 1 or terms[index].count(label) != 1:
        return "is an Einsum that does not multiply its channels with a weight"
    weight = trace_weight(node.inputs[other], terms[other].index(label))
    if weight is None:
        return _no_weight(node.inputs[other])
    return Linear(node, weight, other)


def _no_weight(operand: ir.Value | None) -> str:
    """Why an operand is no weight that could be rewritten."""
    if is_constant(operand):
        return "multiplies it with a weight that the graph computes from another, which stays"
    if is_default(operand):
        return (
            "multiplies it with a weight that is an input, too, which callers may override: "
            "export the model with keep_initializers_as_inputs=False"
        )
    return "multiplies it with something that is not a constant weight"


def _flag(node: ir.Node, name: str) -> bool:
    return node.attributes.get_int(name, 0) != 0


def _bias_behind(output: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """The Add of a constant that alone reads a product, and that constant."""
    readers = output.consumers()
    if len(readers) != 1 or output.is_graph_output():
        return None, None
    reader = readers[0]
    if reader.op_type != "Add" or reader.domain != "" or reader.graph is not output.graph:
        return None, None
    other = [operand for operand in reader.inputs if operand is not output]
    if len(other) != 1 or evaluate(other[0]) is None:
        return None, None
    return reader, other[0]


_ATTENTION_PARTS = frozenset(
    "Attention DecoderMaskedMultiHeadAttention GroupQueryAttention MultiHeadAttention "
    "PagedAttention RotaryEmbedding".split()
)
_FINDERS: dict[tuple[str, str], Callable[[ir.Node, int, int], Linear | str]] = {
    ("", "MatMul"): _matmul,
    (_MICROSOFT, "FusedMatMul"): _matmul,
    ("", "Gemm"): _gemm,
    (_MICROSOFT, "FusedGemm"): _gemm,
    ("", "Conv"): _conv,
    (_MICROSOFT, "FusedConv"): _conv,
    ("", "ConvTranspose"): _transposed_conv,
    ("", "GRU"): _recurrent,
    ("", "LSTM"): _recurrent,
    ("", "RNN"): _recurrent,
    (_MICROSOFT, "Attention"): _attention,
    (_MICROSOFT, "MoE"): _experts,
    ("", "Einsum"): _einsum,
}
