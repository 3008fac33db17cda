"""Who reads a value channel by channel: the linear layers behind it, and whatever else.

From a value scaled per channel, the search goes forward through operators that move rows about or
scale them whole, and ends at linear layers. Anything else that reads the value is an obstacle.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.linear import Linear, find_linear
from onnx_tricks.patterns.moves import Channels, Obstacle, average, follow

__all__ = ["Reader", "Readers", "find_readers"]

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


def find_readers(value: ir.Value, axis: int, width: int) -> Readers:
    """Find the readers of a value with `width` channels along `axis` (counted from the end)."""
    search = _Search()
    search.add(value, Channels(axis, 0, width))
    search.run()
    # A residual connection tells most: it is there by design.
    obstacles = sorted(search.obstacles, key=lambda one: not _is_sum(one.node))
    return Readers(tuple(search.linear), tuple(obstacles))


def _is_sum(node: ir.Node | None) -> bool:
    return node is not None and node.domain == "" and node.op_type in ("Add", "Sub", "Sum")


class _Search:
    def __init__(self) -> None:
        self.region: dict[ir.Value, Channels] = {}
        self.lengths: dict[tuple[ir.Value, int], int] = {}
        self.pending: list[ir.Value] = []
        self.joins: dict[ir.Node, ir.Value] = {}
        self.linear: list[Reader] = []
        self.obstacles: list[Obstacle] = []

    def add(self, value: ir.Value, channels: Channels) -> None:
        self.region[value] = channels
        self.lengths[value, channels.axis] = channels.width
        self.pending.append(value)

    def run(self) -> None:
        while self.pending and len(self.region) < _MAX_NODES:
            value = self.pending.pop()
            if value.is_graph_output():
                self.obstacles.append(Obstacle(None, f"{value.name!r} is an output of the graph"))
            for node, index in value.uses():
                self._read(value, node, index)
        for node, value in self.joins.items():
            # Rows of one scale cannot be told from rows of another once they lie side by side.
            if not all(self.region.get(one) == self.region[value] for one in node.inputs if one):
                self.obstacles.append(
                    Obstacle(node, "joins it with rows that are not scaled alike")
                )

    def _read(self, value: ir.Value, node: ir.Node, index: int) -> None:
        channels = self.region[value]
        if node.op_type in ("Shape", "Size") and node.domain == "":
            return
        if node.op_type == "Concat" and node.domain == "":
            self._join(value, node)
            return
        moved = average(node, channels) or follow(node, index, channels, self.lengths)
        if isinstance(moved, Obstacle):
            self.obstacles.append(moved)
        elif moved is not None:
            for output, state in moved:
                self.add(output, state)
        else:
            linear = find_linear(node, index, channels.axis)
            if isinstance(linear, str):
                self.obstacles.append(Obstacle(node, linear))
            else:
                self.linear.append(Reader(linear, channels))

    def _join(self, value: ir.Value, node: ir.Node) -> None:
        axis = node.attributes["axis"].as_int()
        rank = rank_of(value)
        if axis >= 0 and rank is None:
            self.obstacles.append(Obstacle(node, "joins it along an axis that cannot be told"))
        elif (axis if axis < 0 else axis - (rank or 0)) == self.region[value].axis:
            self.obstacles.append(Obstacle(node, "joins it with other channels"))
        elif node not in self.joins:
            self.joins[node] = value
            self.add(node.outputs[0], self.region[value])
