"""The linear layer behind an attention's queries, keys or values, and which columns are theirs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_constant
from onnx_tricks.graph.shapes import dim
from onnx_tricks.patterns.axes import Axes
from onnx_tricks.patterns.linear import Linear, find_linear

__all__ = ["Projection", "bias_of", "linear_behind", "matrix_of"]

_Matrix = np.ndarray[Any, np.dtype[np.float64]]
_Indices = np.ndarray[Any, np.dtype[np.int64]]
_Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Projection:
    """Heads as a linear function of a sequence: `heads[g] = x @ matrix()[:, g] + bias()[g]`.

    Attributes:
        source: x, [B, S, D].
        linear: The linear layer. It may hold other projections too, packed beside this one. None
            where the heads are the channels of x themselves, because their layer has been merged
            into the one that writes x.
        output: The value that has exactly this projection's heads, its columns in any arrangement,
            bias included.
        axes: What the axes of `output` run over.
        columns: [G, K], which output column of the layer each channel of each head is.
        scale: [G, K], by which the columns have been multiplied before they are cached, rotated or
            normalised.
        shift: [G, K], what has been added to them, the layer's own bias aside.
    """

    source: ir.Value
    linear: Linear | None
    output: ir.Value
    axes: Axes
    columns: _Indices
    scale: _Matrix
    shift: _Matrix

    @property
    def heads(self) -> int:
        """G, the number of different heads."""
        return int(self.columns.shape[0])

    @property
    def head_width(self) -> int:
        """K, the number of channels of one head."""
        return int(self.columns.shape[1])

    @property
    def width(self) -> int:
        """D, the number of channels of `source`."""
        if self.linear is None:
            return dim(self.source, -1) or self.columns.size
        return int(self.linear.weight.tensor.shape.numpy()[self.linear.weight.axis])

    def matrix(self) -> _Matrix:
        """The weights, [D, G K] in float64, head by head."""
        whole = np.eye(self.width) if self.linear is None else matrix_of(self.linear)
        return whole[:, self.columns.reshape(-1)].astype(np.float64) * self.scale.reshape(-1)

    def bias(self) -> _Matrix | None:
        """The bias, [G K] in float64, head by head; None where nothing is added."""
        total = self.shift.reshape(-1)
        row = None if self.linear is None else bias_of(self.linear)
        if row is not None:
            total = total + row[self.columns.reshape(-1)] * self.scale.reshape(-1)
        return total if np.any(total) else None


def linear_behind(value: ir.Value) -> Linear | None:
    """The linear layer over the last axis whose output, bias included, a value is."""
    node = value.producer()
    if node is None:
        return None
    candidates = [node]
    if node.op_type == "Add" and node.domain == "":
        products = [one for one in node.inputs if one is not None and not is_constant(one)]
        candidates = [maker for one in products if (maker := one.producer()) is not None]
    for candidate in candidates:
        linear = find_linear(candidate, 0, -1) if candidate.inputs else "has no input"
        if isinstance(linear, Linear) and linear.output is value and _is_matrix(linear):
            return linear
    return None


def bias_of(linear: Linear) -> _Matrix | None:
    """The bias that a layer adds to its rows, [out] in float64; None where it adds none."""
    present = evaluate(linear.bias)
    if present is None:
        return None
    beta = 1.0
    if linear.bias_index is not None and linear.node.op_type == "Gemm":
        beta = linear.node.attributes.get_float("beta", 1.0)
    row = np.broadcast_to(present.reshape(-1), (matrix_of(linear).shape[1],))
    return beta * row.astype(np.float64)


def _is_matrix(linear: Linear) -> bool:
    """Whether the layer is a matrix applied to the last axis of its first input."""
    weight, node = linear.weight, linear.node
    if not weight.readable or not weight.tensor.dtype.is_floating_point():
        return False
    kind = node.op_type
    if kind == "Einsum":
        return weight.rank == 2 and _einsum_is_plain(node)
    fused = kind == "FusedGemm" or (kind == "Attention" and node.domain == "com.microsoft")
    return weight.rank == 2 and weight.axis in (0, 1) and not fused and kind != "Conv"


def _einsum_is_plain(node: ir.Node) -> bool:
    left, _, right = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    rows, matrix = left.split(",")
    return set(matrix) == {rows[-1], right[-1]} and rows[:-1] == right[:-1]


def matrix_of(linear: Linear) -> _Array:
    """The weights [in, out] of a layer, without a copy where they are stored so."""
    array = linear.weight.read()
    node = linear.node
    if node.op_type == "Einsum":
        terms = node.attributes["equation"].as_string().replace(" ", "").split("->")[0].split(",")
        turned = terms[1][0] != terms[0][-1]
    else:
        turned = node.attributes.get_int("transB", 0) != 0
    array = array.T if turned else array
    alpha = node.attributes.get_float("alpha", 1.0)
    return array if alpha == 1.0 else array.astype(np.float64) * alpha
