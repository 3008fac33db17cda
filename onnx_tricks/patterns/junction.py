"""Junctions: rows that linear layers write and linear layers read, with nothing between them.

In a transformer without skip connections and norms, such rows lie in front of every attention and
behind it. What they mean is up to the layers on both sides: any basis does.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.shapes import dim
from onnx_tricks.patterns.channels import Obstacle
from onnx_tricks.patterns.linear import Linear, find_linear
from onnx_tricks.patterns.maker import Made
from onnx_tricks.patterns.stream import Stream, Term, find_stream

__all__ = ["Junction", "find_junction"]

_PRODUCTS = frozenset((("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedMatMul")))
_SUMS = frozenset(("Add", "Sub", "Sum"))
_IS_SKIP = "is a residual connection: it adds what others read too"
_NO_MATRIX = "is no product of rows with one matrix"
_KEEPS_ROWS = frozenset(("Add", "Sum", "MatMul", "Gemm", "Gather", "Reshape", "Identity"))


@dataclasses.dataclass(frozen=True, eq=False)
class Junction:
    """Rows between linear layers.

    Attributes:
        width: D, the number of channels.
        rows: The value that the first reader reads.
        stages: All values that hold the rows, or terms of them.
        written: The constants that write them: weights, biases, tables; each by its output axis.
        writers: The linear layers that write them.
        readers: The linear layers that read them.
        even: Whether a constant may be added to the rows through any bias or table of `written`:
            no row is scaled or comes from elsewhere.
    """

    width: int
    rows: ir.Value
    stages: frozenset[ir.Value]
    written: tuple[Made, ...]
    writers: tuple[Linear, ...]
    readers: tuple[Linear, ...]
    even: bool


def find_junction(value: ir.Value) -> Junction | Obstacle:
    """Find the junction that a value belongs to, or what forbids to change its basis.

    Args:
        value: Rows [..., D].
    """
    width = dim(value, -1)
    if width is None:
        return Obstacle(None, f"the number of channels of {value.name!r} is unknown")
    skip = _skip_behind(value)  # the search would go through the whole model
    if skip is not None:
        return Obstacle(skip, _IS_SKIP)
    stream = find_stream(value, -1, width, lambda use: isinstance(find_linear(*use, -1), Linear))
    skip = next((sums[0] for one in stream.stages if (sums := _skips(one))), None)
    if skip is not None:
        return Obstacle(skip, _IS_SKIP)
    if stream.obstacles:
        return stream.obstacles[0]
    for term in stream.terms:
        obstacle = _term_obstacle(term, width)
        if obstacle is not None:
            return obstacle
    readers = []
    for node, index in stream.readers:
        rows = node.inputs[index]
        assert rows is not None
        linear = find_linear(node, index, stream.stages[rows])
        if isinstance(linear, str):
            return Obstacle(node, linear)
        linear = _with_row_bias(linear)
        if not _is_matrix(linear) or index != 0:
            return Obstacle(node, _NO_MATRIX)
        readers.append(linear)
    if not readers:
        return Obstacle(None, f"no linear layer reads {value.name!r}")
    writers = []
    for term in stream.terms:
        node = term.made[0].node
        linear = find_linear(node, 0, -1) if (node.domain, node.op_type) in _PRODUCTS else ""
        if isinstance(linear, Linear) and linear.weight.stored is term.made[0].weight.stored:
            linear = _with_row_bias(linear)
            if not _is_matrix(linear) or term.axis != -1:
                return Obstacle(node, _NO_MATRIX)
            writers.append(linear)
    made = tuple(one for term in stream.terms for one in term.made)
    rows = readers[0].node.inputs[0]
    assert rows is not None
    stages = frozenset(stream.stages)
    return Junction(
        width, rows, stages, made, tuple(writers), tuple(readers), _is_even(stream, width)
    )


def _skips(value: ir.Value) -> list[ir.Node]:
    """The additions that read a value, if something else does so too."""
    readers = [one for one in value.consumers() if one.op_type not in ("Shape", "Size")]
    sums = [one for one in readers if one.op_type in _SUMS]
    return sums if len(readers) > 1 else []


def _skip_behind(value: ir.Value) -> ir.Node | None:
    """The residual connection that rows enter next, if they do."""
    while True:
        readers = [one for one in value.consumers() if one.op_type not in ("Shape", "Size")]
        skips = [one for one in readers if one.op_type.startswith("Skip")] or _skips(value)
        if skips:
            return skips[0]
        if len(readers) != 1 or readers[0].op_type not in _SUMS:
            return None
        node = readers[0]
        if any(one is not None and _skips(one) for one in node.inputs):
            return node
        value = node.outputs[0]


def _term_obstacle(term: Term, width: int) -> Obstacle | None:
    """Why what is added to the rows cannot be had in another basis."""
    node = term.value.producer()
    if not term.made:
        if node is None:
            return Obstacle(None, f"{term.value.name!r} is written by no weights")
        return Obstacle(node, "stands before the linear layers and is none")
    for one in term.made:
        tensor = one.weight.tensor
        if one.scale is not None:
            return Obstacle(one.node, "is scaled channel by channel")
        if one.weight.widened or not tensor.dtype.is_floating_point():
            return Obstacle(one.node, f"reads a weight stored in {tensor.dtype.name}")
        if tensor.shape.numpy()[one.weight.axis] != width or not one.weight.readable:
            return Obstacle(one.node, "adds a constant that is no row of channels")
    return None


def _is_matrix(linear: Linear) -> bool:
    weight, node = linear.weight, linear.node
    return (
        (node.domain, node.op_type) in _PRODUCTS
        and weight.rank == 2
        and weight.readable
        and weight.tensor.dtype.is_floating_point()
        and not weight.widened
        and not node.attributes.get_int("transA", 0)
        and (linear.bias is None or _is_row(linear))
    )


def _with_row_bias(linear: Linear) -> Linear:
    """The layer without what is added behind it, where that is not one row for all."""
    if linear.bias_add is None or _is_row(linear):
        return linear
    return dataclasses.replace(linear, bias=None, bias_add=None)


def _is_row(linear: Linear) -> bool:
    """Whether the bias is a constant of one number for each channel."""
    bias = evaluate(linear.bias)
    tensor = linear.weight.tensor
    return bias is not None and bias.size * tensor.shape.numpy()[linear.weight.axis] == tensor.size


def _is_even(stream: Stream, width: int) -> bool:
    """Whether every row is the same sum, and nothing scales it on the way."""
    producers = [value.producer() for value in stream.stages]
    return all(
        node is not None
        and node.op_type in _KEEPS_ROWS
        and node.attributes.get_float("beta", 1.0) != 0
        for node in producers
    ) and all(dim(value, -1) == width for value in stream.stages if value.shape is not None)
