"""How far a positive factor on the rows of a value carries: to norms, which do not feel it, or not.

A value whose rows are multiplied by positive numbers passes through linear layers without bias,
ReLU, products with constants and moves of whole rows as rows multiplied by the same numbers, or by
a power of them. A norm over what came of one row undoes that; anything else is an obstacle.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Mapping

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.patterns.channels import Channels, Obstacle
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.linear import find_linear
from onnx_tricks.patterns.moves import follow
from onnx_tricks.patterns.norm import Norm

__all__ = ["End", "Spread", "spread"]

Use = tuple[ir.Node, int]
_UNARY = frozenset(("Abs", "Cast", "Dropout", "Identity", "LeakyRelu", "Neg", "Relu"))
_SUMS = frozenset(("Add", "Max", "Min", "Sub", "Sum"))


@dataclasses.dataclass(frozen=True)
class _State:
    """What is known of a value.

    Attributes:
        axis: An axis along which all numbers belong to one row, counted from the end.
        width: Its length.
        degree: The power of the row's factor that every number has.
        moved: The nodes that have moved rows about on the way.
    """

    axis: int
    width: int
    degree: int = 1
    moved: tuple[ir.Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class End:
    """A norm that undoes the factor.

    Attributes:
        norm: The norm.
        degree: The power of the factor that reaches it.
    """

    norm: Norm
    degree: int


@dataclasses.dataclass(frozen=True)
class Spread:
    """Where a factor on the rows of a value gets to.

    Attributes:
        ends: The norms that undo it.
        obstacle: What else feels it; None where nothing does.
    """

    ends: tuple[End, ...]
    obstacle: Obstacle | None


def spread(
    norm: Norm, order: Mapping[ir.Node, int], entries: Mapping[Use, Norm], extents: Extents
) -> Spread:
    """Follow a positive factor on the rows of what a norm computes.

    Args:
        norm: The norm.
        order: The place of each node in the order of execution.
        entries: The uses by which norms read their input, and the norm of each.
        extents: The lengths of axes, to be shared by all searches in a model.
    """
    states = {norm.output: _State(norm.axis, norm.width)}
    extents.learn(norm.output, norm.axis, norm.width)
    ends: dict[ir.Node, End] = {}
    pending: list[tuple[int, ir.Node]] = []
    queued: set[ir.Node] = set()

    def visit(one: ir.Value) -> Obstacle | None:
        if one.is_graph_output():
            return Obstacle(None, f"{one.name!r} is an output of the graph")
        for node, index in one.uses():
            end = entries.get((node, index))
            if end is not None:
                if end.axis != states[one].axis:
                    return Obstacle(node, "normalises other numbers than those of one row")
                ends[end.node] = End(end, states[one].degree)
            elif node not in queued and not (
                node.domain == "" and node.op_type in ("Shape", "Size")
            ):
                queued.add(node)
                heapq.heappush(pending, (order[node], node))
        return None

    obstacle = visit(norm.output)
    while pending and obstacle is None:
        _, node = heapq.heappop(pending)
        found = _through(node, states, extents)
        if isinstance(found, Obstacle):
            obstacle = found
            break
        for output, state in found:
            states[output] = state
            extents.learn(output, state.axis, state.width)
            obstacle = obstacle or visit(output)
    return Spread(tuple(ends.values()), obstacle)


def _through(
    node: ir.Node, states: Mapping[ir.Value, _State], extents: Extents
) -> list[tuple[ir.Value, _State]] | Obstacle:
    """What a factor on the inputs of a node makes of its outputs."""
    known = [
        (index, one, states[one])
        for index, one in enumerate(node.inputs)
        if one is not None and one in states
    ]
    others = [one for one in node.inputs if one is not None and one not in states]
    index, _, state = known[0]
    output = node.outputs[0]
    if node.domain == "" and node.op_type in _UNARY:
        return [(output, state)]
    if node.domain == "" and node.op_type in _SUMS:
        if others or len({one for _, _, one in known}) > 1:
            return Obstacle(node, "adds something that has not the same factor")
        return [(output, state)]
    if node.domain == "" and node.op_type == "Mul" and not others:
        if len({dataclasses.replace(one, degree=1) for _, _, one in known}) > 1:
            return Obstacle(node, "multiplies numbers of rows that have been moved apart")
        degree = sum(one.degree for _, _, one in known)
        return [(output, dataclasses.replace(state, degree=degree))]
    if len(known) > 1:
        return Obstacle(node, "does not carry a factor on its rows through")
    divides = node.op_type == "Div" and index == 0
    if node.domain == "" and (divides or node.op_type == "Mul") and is_constant(others[0]):
        return [(output, state)]
    return _single(node, index, state, extents)


def _single(
    node: ir.Node, index: int, state: _State, extents: Extents
) -> list[tuple[ir.Value, _State]] | Obstacle:
    """A move of whole rows, or a linear layer."""
    moved = follow(node, index, Channels.all(state.axis, state.width), extents)
    if isinstance(moved, Obstacle):
        return moved
    if moved is not None and not all(one.regular for _, one in moved):
        # Heads stay rows: none holds numbers of two of them. Several rows on one axis do not.
        return Obstacle(node, "joins rows, or may do so")
    if moved is not None:
        path = (*state.moved, node)
        return [(one, _State(c.axis, c.width, state.degree, path)) for one, c in moved]
    linear = find_linear(node, index, state.axis)
    if isinstance(linear, str):
        return Obstacle(node, linear)
    if node.op_type not in _PRODUCTS:
        return Obstacle(node, "mixes rows, or may do so")
    if linear.bias_index is not None and linear.bias is not None:
        return Obstacle(node, "adds a bias, which has no such factor")
    width = linear.weight.tensor.size // state.width
    if linear.weight.rank != 2:
        return Obstacle(node, "multiplies it with more than one matrix")
    return [
        (node.outputs[0], dataclasses.replace(state, axis=-1 if index == 0 else -2, width=width))
    ]


_PRODUCTS = frozenset(("FusedMatMul", "Gemm", "MatMul"))
