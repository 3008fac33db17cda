"""The part of a model that is a function of the token id alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.graph.shapes import dim, rank_of
from onnx_tricks.patterns.rowmoves import MOVES
from onnx_tricks.patterns.states import Ids, Row, State

__all__ = ["Operation", "Region", "is_lookup", "reads_shape"]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One computation of a region, however often the graph holds it.

    Attributes:
        node: A node that does it.
        inputs: Keys of the rows it reads.
        outputs: Keys of the rows it computes; None for an output that is not one.
        lookup: Whether it looks up a row of a table by the ids.
    """

    node: ir.Node
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    lookup: bool = False

    @property
    def moves_only(self) -> bool:
        """Whether it only arranges numbers, or picks some of them."""
        node = self.node
        picks = node.op_type == "Gather" and is_constant(node.inputs[1])
        return node.domain == "" and (picks or node.op_type in {*MOVES, "Slice"})


class Region:
    """What can be told from the token ids alone.

    Attributes:
        ids: The value that holds the ids, of any shape.
        vocabulary: Number of rows of the tables that the ids look up.
        axes: The symbols of the axes of the ids.
        fixed: Lengths of these symbols, where the model fixes them.
        states: What is known of each value; values that depend on anything else are not in it.
        operations: The computations, each after those it reads.
        members: The values of each key.
    """

    def __init__(self, ids: ir.Value, vocabulary: int) -> None:
        self.ids, self.vocabulary = ids, vocabulary
        lengths = [dim(ids, axis) for axis in range(rank_of(ids) or 0)]
        self.axes = tuple(f"#{axis}" for axis in range(len(lengths)))
        self.fixed = {f"#{axis}": one for axis, one in enumerate(lengths) if one is not None}
        self.states: dict[ir.Value, State] = {ids: Ids(tuple((axis,) for axis in self.axes))}
        self.operations: list[Operation] = []
        self.members: dict[int, list[ir.Value]] = defaultdict(list)

    def row(self, key: int) -> Row:
        """The row of a key."""
        state = self.states[self.members[key][0]]
        assert isinstance(state, Row)
        return state

    @property
    def lookup(self) -> ir.Node:
        """The first node that looks up the ids in a table."""
        return next(one.node for one in self.operations if one.lookup)

    @cached_property
    def nodes(self) -> set[ir.Node]:
        """All nodes that compute rows of the region, every copy of every operation."""
        values = (value for members in self.members.values() for value in members)
        return {node for value in values if (node := value.producer()) is not None}

    def outside_readers(self, value: ir.Value) -> Iterator[ir.Node]:
        """Nodes that read a row and compute something else from it than its shape."""
        for node in value.consumers():
            if node not in self.nodes and not reads_shape(node):
                yield node

    def add(
        self,
        node: ir.Node,
        inputs: tuple[int, ...],
        rows: list[tuple[ir.Value, Row | None]],
        *,
        lookup: bool = False,
    ) -> None:
        """Add a computation.

        Args:
            node: A node that does it.
            inputs: Keys of the rows it reads.
            rows: Its outputs, each with the row that it is, if it is one.
            lookup: Whether it looks up a row of a table by the ids.
        """
        outputs = tuple(None if row is None else row.key for _, row in rows)
        if all(key is None or key not in self.members for key in outputs):
            self.operations.append(Operation(node, inputs, outputs, lookup))
        for value, row in rows:
            if row is not None:
                self.states[value] = row
                self.members[row.key].append(value)


def is_lookup(node: ir.Node) -> bool:
    """Whether a node picks rows of a constant by something that is not constant."""
    if node.op_type != "Gather" or node.domain != "":
        return False
    table, index = node.inputs[0], node.inputs[1]
    first = node.attributes.get_int("axis", 0) == 0
    return first and is_constant(table) and index is not None and not is_constant(index)


def reads_shape(node: ir.Node) -> bool:
    """Whether a node reads only the shape of its input."""
    return node.op_type in ("Shape", "Size") and node.domain == ""
