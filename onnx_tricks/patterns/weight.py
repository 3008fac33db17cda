"""A constant operand traced back to the stored tensor it is read from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, step, stored_tensor
from onnx_tricks.graph.shapes import dtype_of, rank_of

__all__ = ["Weight", "trace_weight"]

_Array = np.ndarray[Any, np.dtype[Any]]
_MAX_DEPTH = 8


@dataclasses.dataclass(frozen=True)
class Weight:
    """A constant as an operator reads it, and the tensor it comes from.

    Attributes:
        operand: The value that the operator reads.
        stored: The initializer, or the output of the Constant node, at the other end.
        axis: The axis of `stored` that is the traced axis of the operand.
        path: The nodes between them, from `stored` to the operand; each passes on its first input.
        steps: What these nodes do, as functions of arrays; None where data decide (Gather).
    """

    operand: ir.Value
    stored: ir.Value
    axis: int
    path: tuple[ir.Node, ...] = ()
    steps: tuple[Callable[[_Array], _Array] | None, ...] = ()

    @property
    def tensor(self) -> ir.TensorProtocol:
        """The stored tensor."""
        tensor = stored_tensor(self.stored)
        assert tensor is not None
        return tensor

    @property
    def half(self) -> bool:
        """Whether it is stored in half precision, or less: rounding it once more is felt."""
        return self.tensor.dtype.itemsize <= 2

    @property
    def rank(self) -> int:
        """Rank of the stored tensor."""
        return len(self.tensor.shape)

    @property
    def widened(self) -> bool:
        """Whether the weight is stored in a narrower type than it is computed in."""
        return any(
            node.op_type == "Cast"
            and ir.DataType(node.attributes["to"].as_int()).itemsize > self.tensor.dtype.itemsize
            for node in self.path
        )

    @property
    def readable(self) -> bool:
        """Whether `read` gives the operand."""
        return None not in self.steps

    def read(self) -> _Array:
        """The operand as an array, in its own type."""
        array = self.tensor.numpy()
        for function in self.steps:
            assert function is not None
            array = function(array)
        return array


def trace_weight(operand: ir.Value | None, axis: int) -> Weight | None:
    """Trace a constant operand and one of its axes back to where it is stored.

    Args:
        operand: What the operator reads.
        axis: The axis of interest, counted from the front, or from the end when negative.

    Returns:
        The weight, or None when the operand is not a stored tensor seen through Identity, Cast,
        Transpose, Squeeze, Unsqueeze, Expand or a Gather of whole slices.
    """
    path: list[ir.Node] = []
    value = operand
    while value is not None and len(path) < _MAX_DEPTH:
        tensor = stored_tensor(value)
        if tensor is not None:
            rank = len(tensor.shape)
            if not -rank <= axis < rank:
                return None
            assert operand is not None
            return Weight(
                operand,
                value,
                axis % rank,
                tuple(path[::-1]),
                tuple(step(node) for node in path[::-1]),
            )
        node = value.producer()
        if node is None or node.domain != "" or not node.inputs:
            return None
        before = _axis_before(node, value, axis)
        if before is None:
            return None
        axis = before
        path.append(node)
        value = node.inputs[0]
    return None


def _axis_before(node: ir.Node, output: ir.Value, axis: int) -> int | None:
    """The axis of a node's first input that becomes `axis` of its output."""
    if node.op_type in ("Identity", "Cast"):
        return axis
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm")
        if perm is None:
            return -1 - axis
        return perm[axis] - (len(perm) if axis < 0 else 0)
    if node.op_type in ("Squeeze", "Unsqueeze"):
        return _axis_before_squeeze(node, output, axis)
    if node.op_type == "Expand":
        # The same weight for every row of a batch.
        after, source = rank_of(output), node.inputs[0]
        rank = rank_of(source) if source is not None else None
        place = axis if axis < 0 else axis - (after or 0)
        known = rank is not None and (axis < 0 or after is not None)
        return place if known and -place <= (rank or 0) else None
    if node.op_type == "Gather":
        # Experts picked by index: slices along the first axis, whole in every other.
        source, index = node.inputs[0], node.inputs[1]
        rank = rank_of(source) if source is not None else None
        known = rank is not None and index is not None and rank_of(index) is not None
        if axis < 0 and known and node.attributes.get_int("axis", 0) in (0, -(rank or 0)):
            return axis if -axis < (rank or 0) else None
    return None


def _axis_before_squeeze(node: ir.Node, output: ir.Value, axis: int) -> int | None:
    source, rank = node.inputs[0], rank_of(output)
    if "axes" in node.attributes:
        axes = tuple(node.attributes["axes"].as_ints())
    else:
        array = evaluate(node.inputs[1]) if len(node.inputs) > 1 else None
        if array is None:
            return None
        axes = tuple(int(one) for one in array.reshape(-1))
    before = rank_of(source) if source is not None else None
    if rank is None or before is None or dtype_of(output) is None:
        return None
    longer = max(rank, before)
    kept = [i for i in range(longer) if i not in {one % longer for one in axes}]
    position = axis % rank
    if node.op_type == "Unsqueeze":
        return kept.index(position) if position in kept else None
    return kept[position]
