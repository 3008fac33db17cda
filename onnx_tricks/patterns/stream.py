"""The residual stream: a sum into which many layers write, and from which many read.

From one stage of the sum the search goes both ways, through additions and operators that move rows
about: back to the terms of the sum, and forward to whatever else reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.channels import Channels, Obstacle
from onnx_tricks.patterns.channelwise import pooled
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.maker import Made, came_from, made_of
from onnx_tricks.patterns.moves import follow
from onnx_tricks.patterns.weight import trace_weight

__all__ = ["Stream", "Term", "Use", "find_stream"]

_SKIP_NORMS = frozenset(("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"))
_SKIP_TERMS = (0, 1, 4)  # inputs of theirs that are added up, the bias last
_SKIP_SUM = 3  # the output that is the sum
_MAX_STAGES = 10_000

Use = tuple[ir.Node, int]
"""A node and which of its inputs."""
_Ends = Callable[[Use], bool]


@dataclasses.dataclass(frozen=True)
class Term:
    """One term of a residual stream.

    Attributes:
        value: What is added.
        axis: Its channel axis, counted from the end.
        uses: Where it enters the sum.
        made: The constants in which it is linear, all together; empty where it is anything but a
            linear layer, a lookup or a constant, or where something else reads it too.
    """

    value: ir.Value
    axis: int
    uses: tuple[Use, ...]
    made: tuple[Made, ...] = ()


@dataclasses.dataclass(frozen=True)
class Stream:
    """A residual stream.

    Attributes:
        stages: The sum as it grows, with the channel axis of each value.
        terms: What is added up.
        readers: The uses that are neither an addition nor a move of whole rows.
        obstacles: Uses that take single channels, and outputs of the graph.
    """

    stages: Mapping[ir.Value, int]
    terms: tuple[Term, ...]
    readers: tuple[Use, ...]
    obstacles: tuple[Obstacle, ...]


def find_stream(
    value: ir.Value, axis: int, width: int, ends: _Ends, whole: Collection[ir.Value] = ()
) -> Stream:
    """Find the residual stream that a value is a stage of.

    Args:
        value: The value.
        axis: Its channel axis, counted from the end.
        width: D, the number of channels.
        ends: Whether a use is a reader to look no further behind, as a norm is.
        whole: Values that are terms as they are, whatever sums they are made by, as norms are.
    """
    apart: set[ir.Value] = set()
    extents = Extents()
    while True:
        search = _Search(width, ends, apart, extents, whole)
        search.enter(value, axis)
        search.run()
        # What something else reads too must keep its value: only its use in the sum may change.
        leaking = search.leaking & set(search.begins) - {value}
        if not leaking:
            return search.result()
        apart |= leaking


class _Search:
    def __init__(
        self,
        width: int,
        ends: _Ends,
        apart: set[ir.Value],
        extents: Extents,
        whole: Collection[ir.Value],
    ) -> None:
        self.width, self.ends, self.apart, self.extents = width, ends, apart, extents
        self.whole = whole
        self.stages: dict[ir.Value, int] = {}
        self.pending: list[ir.Value] = []
        self.begins: dict[ir.Value, tuple[Made, ...]] = {}
        self.entries: dict[tuple[ir.Value, int], dict[Use, tuple[Made, ...]]] = {}
        self.moved_from: dict[ir.Value, ir.Value] = {}
        self.readers: list[Use] = []
        self.obstacles: list[Obstacle] = []
        self.leaking: set[ir.Value] = set()

    def enter(self, value: ir.Value, axis: int) -> None:
        if value not in self.stages:
            self.stages[value] = axis
            self.extents.learn(value, axis, self.width)
            self.pending.append(value)

    def run(self) -> None:
        while self.pending and len(self.stages) < _MAX_STAGES:
            value = self.pending.pop()
            self._back(value, self.stages[value])
            self._forward(value, self.stages[value])

    def result(self) -> Stream:
        begins = [
            Term(value, self.stages[value], tuple(value.uses()), made)
            for value, made in self.begins.items()
        ]
        entries = [
            Term(value, axis, tuple(uses), tuple(one for made in uses.values() for one in made))
            for (value, axis), uses in self.entries.items()
        ]
        return Stream(self.stages, (*begins, *entries), tuple(self.readers), tuple(self.obstacles))

    def _back(self, value: ir.Value, axis: int) -> None:
        if value in self.whole:
            self.begins[value] = ()
            return
        node = value.producer()
        summed = _sum_of(node, axis) if node is not None else None
        if node is not None and summed and summed[0] is value:
            self._add(_terms(node), axis)
            return
        source = came_from(value, axis, self.width, self.extents)
        operand = node.inputs[source[0]] if node is not None and source is not None else None
        if source is None or operand is None or is_constant(operand) or operand in self.apart:
            self.begins[value] = made_of(value, axis, self.width, self.extents)
        else:
            self.moved_from[value] = operand
            self.enter(operand, source[1])

    def _add(self, uses: Iterable[Use], axis: int) -> None:
        """Enter the terms of an addition."""
        for use in uses:
            node, index = use
            value = node.inputs[index]
            assert value is not None
            if is_constant(value):
                weight = trace_weight(value, axis)
                made = () if weight is None else (Made(node, index, weight),)
                self.entries.setdefault((value, axis), {})[use] = made
            elif value in self.apart:
                self.entries.setdefault((value, axis), {})[use] = ()
            else:
                self.enter(value, axis)

    def _forward(self, value: ir.Value, axis: int) -> None:
        if value.is_graph_output():
            self._stop(value, Obstacle(None, f"{value.name!r} is an output of the graph"))
        for node, index in value.uses():
            use = node, index
            if node.domain == "" and node.op_type in ("Shape", "Size"):
                continue
            ends = self.ends(use)
            if ends:
                self.readers.append(use)
            summed = _sum_of(node, axis) if not ends or node.op_type in _SKIP_NORMS else None
            if summed is not None:
                self._add(_terms(node), axis)
                for one in summed:
                    self.enter(one, axis)
            elif not ends:
                self._move(use, value, axis)

    def _move(self, use: Use, value: ir.Value, axis: int) -> None:
        node, index = use
        channels = Channels.all(axis, self.width)
        moved = pooled(node, index, channels) or follow(node, index, channels, self.extents)
        if isinstance(moved, Obstacle):
            self._stop(value, moved)
        elif moved is None:
            self.readers.append(use)
            self._leak(value)
        elif not all(behind.is_row(self.width) for _, behind in moved):
            self._stop(value, Obstacle(node, "takes its channels apart"))
        else:
            for output, behind in moved:
                self.moved_from[output] = value
                self.enter(output, behind.axis)

    def _stop(self, value: ir.Value, obstacle: Obstacle) -> None:
        self.obstacles.append(obstacle)
        self._leak(value)

    def _leak(self, value: ir.Value) -> None:
        while value in self.moved_from:
            value = self.moved_from[value]
        self.leaking.add(value)


def _sum_of(node: ir.Node, axis: int) -> list[ir.Value] | None:
    """The sum that a node adds up or joins from rows, if it has an output for it; else None."""
    if node.op_type in _SKIP_NORMS:
        return list(node.outputs[_SKIP_SUM : _SKIP_SUM + 1])
    if node.domain != "":
        return None
    if node.op_type in ("Add", "Sub", "Sum"):
        # A number added to all channels has no channel axis.
        ranks = [rank_of(one) for one in node.inputs if one is not None]
        return None if any(r is not None and r < -axis for r in ranks) else [node.outputs[0]]
    if node.op_type == "Concat":
        along = node.attributes["axis"].as_int()
        rank = rank_of(node.outputs[0])
        if along >= 0:
            if rank is None:
                return None
            along -= rank
        return None if along == axis else [node.outputs[0]]
    return None


def _terms(node: ir.Node) -> list[Use]:
    places = _SKIP_TERMS if node.op_type in _SKIP_NORMS else range(len(node.inputs))
    return [(node, i) for i in places if i < len(node.inputs) and node.inputs[i] is not None]
