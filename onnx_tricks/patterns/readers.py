"""Who reads a value channel by channel: the linear layers behind it, and whatever else.

From a value scaled per channel, the search goes forward through operators that move rows about, or
are linear in each channel, and ends at linear layers. Anything else that reads it is an obstacle.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.channels import Channels, Obstacle
from onnx_tricks.patterns.channelwise import channelwise
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.linear import Linear, find_linear
from onnx_tricks.patterns.moves import follow

__all__ = ["Reader", "Readers", "find_readers"]

_JOINS = frozenset(("Add", "Concat", "Sub", "Sum"))
_MAX_NODES = 10_000


@dataclasses.dataclass(frozen=True)
class Reader:
    """A linear layer and the channels that reach it."""

    linear: Linear
    channels: Channels


@dataclasses.dataclass(frozen=True)
class Readers:
    """All readers of a value.

    Attributes:
        linear: The linear layers, with the channels that reach each.
        obstacles: Readers that are not linear in the channels: node and what it does with them.
    """

    linear: tuple[Reader, ...]
    obstacles: tuple[Obstacle, ...]


def find_readers(value: ir.Value, axis: int, width: int, extents: Extents) -> Readers:
    """Find the readers of a value.

    Args:
        value: The value.
        axis: Its channel axis, counted from the end.
        width: D, the number of channels.
        extents: The lengths of axes, to be shared by all searches in a model.
    """
    search = _Search(extents)
    search.add(value, Channels.all(axis, width))
    search.run()
    # A residual connection tells most: it is there by design.
    obstacles = sorted(search.obstacles, key=lambda one: not _is_sum(one.node))
    return Readers(tuple(search.linear), tuple(obstacles))


def _is_sum(node: ir.Node | None) -> bool:
    return node is not None and node.domain == "" and node.op_type in _JOINS - {"Concat"}


class _Search:
    def __init__(self, extents: Extents) -> None:
        self.region: dict[ir.Value, Channels] = {}
        self.extents = extents
        self.pending: list[ir.Value] = []
        self.passed: list[ir.Node] = []
        self.joins: dict[ir.Node, bool] = {}
        self.linear: list[Reader] = []
        self.obstacles: list[Obstacle] = []

    def add(self, value: ir.Value, channels: Channels) -> None:
        self.region[value] = channels
        if channels.inner is None and not channels.assumed:
            self.extents.learn(value, channels.axis, channels.width)
        self.pending.append(value)

    def run(self) -> None:
        while self.pending and len(self.region) < _MAX_NODES:
            value = self.pending.pop()
            if value.is_graph_output():
                self.obstacles.append(Obstacle(None, f"{value.name!r} is an output of the graph"))
            for node, index in value.uses():
                self._read(value, node, index)
        if self.pending:
            self.obstacles.append(Obstacle(None, "more operators read it than can be followed"))
        for node in (one for one, joined in self.joins.items() if not joined):
            self.obstacles.append(Obstacle(node, self._unlike(node)))
        squared = [n for n in self.passed if sum(one in self.region for one in n.inputs) > 1]
        self.obstacles[:0] = [Obstacle(node, "is not linear in it") for node in squared]

    def _read(self, value: ir.Value, node: ir.Node, index: int) -> None:
        channels = self.region[value]
        if node.domain == "" and node.op_type in ("Shape", "Size"):
            return
        if node.domain == "" and node.op_type in _JOINS:
            self._join(value, node)
            return
        moved = channelwise(node, index, channels) or follow(node, index, channels, self.extents)
        if isinstance(moved, Obstacle):
            self.obstacles.append(moved)
        elif moved is not None:
            self.passed.append(node)
            for output, state in moved:
                self.add(output, state)
        else:
            self._end(node, index, channels)

    def _end(self, node: ir.Node, index: int, channels: Channels) -> None:
        linear = find_linear(node, index, channels.axis)
        if isinstance(linear, str):
            self.obstacles.append(Obstacle(node, linear))
        elif channels.heads:
            self.obstacles.append(Obstacle(node, "multiplies all heads of it with one weight"))
        elif channels.inner is not None or (channels.assumed and not _confirms(linear, channels)):
            self.obstacles.append(Obstacle(node, "reads it in a shape that cannot be told"))
        else:
            self.linear.append(Reader(linear, channels))

    def _join(self, value: ir.Value, node: ir.Node) -> None:
        """Go on behind a Concat or a sum, once all that it joins has been reached."""
        given = [one for one in node.inputs if one is not None]
        states = [self.region[one] for one in given if one in self.region]
        along = self._is_along(value, node)
        self.joins.setdefault(node, False)
        if len(states) < len(given) or along is None or self.joins[node]:
            return
        joined = _side_by_side(node, states) if along else _alike(node, states)
        if joined is not None:
            self.joins[node] = True
            self.add(node.outputs[0], joined)

    def _is_along(self, value: ir.Value, node: ir.Node) -> bool | None:
        """Whether a Concat joins along the channel axis; None where that cannot be told."""
        if node.op_type != "Concat":
            return False
        axis, rank = node.attributes["axis"].as_int(), rank_of(value)
        if axis >= 0 and rank is None:
            return None
        return (axis if axis < 0 else axis - (rank or 0)) == self.region[value].axis

    def _unlike(self, node: ir.Node) -> str:
        """Why a Concat or a sum is an obstacle."""
        reached = [one for one in node.inputs if one is not None and one in self.region]
        if node.op_type == "Concat":
            along = self._is_along(reached[0], node)
            other = "other channels" if along else "rows that are not scaled alike"
            return f"joins it with {other}" if along is not None else "joins it along any axis"
        if len(reached) == 1:
            if any(is_constant(one) for one in node.inputs):
                return "adds a constant to it, which is not scaled like it"
            return "adds it to another value, as a residual connection does"
        return "adds its channels to one another, as rotary positions do"


def _alike(node: ir.Node, states: list[Channels]) -> Channels | None:
    """Rows of several values, or their sum, where the same channels lie in the same places."""
    first, *others = states
    if any(_places(one) != _places(first) for one in others):
        return None
    if node.op_type == "Concat" and all(one == first for one in others):
        return first
    return dataclasses.replace(first, uneven=f"{node.op_type} mixes rows")


def _side_by_side(node: ir.Node, states: list[Channels]) -> Channels | None:
    """Channels of several values on one axis."""
    first = states[0]
    apart = {dataclasses.replace(_places(one), pieces=()) for one in states}
    if len(apart) > 1 or first.assumed or first.inner is not None:
        return None
    even = {(one.scale, one.uneven) for one in states} == {(first.scale, first.uneven)}
    return dataclasses.replace(
        first,
        pieces=tuple(piece for one in states for piece in one.pieces),
        uneven=first.uneven if even else f"{node.op_type} joins channels of different rows",
    )


def _places(channels: Channels) -> Channels:
    """Where channels lie, whatever they were multiplied with."""
    return dataclasses.replace(channels, scale=1.0, uneven="")


def _confirms(linear: Linear, channels: Channels) -> bool:
    """Whether a layer runs only if there are as many channels as assumed."""
    length = linear.weight.tensor.shape.numpy()[linear.weight.axis] * linear.groups
    return linear.node.op_type != "Einsum" and length == channels.width
