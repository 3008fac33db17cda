"""The least of a region that has to be stored so that nothing worth storing is computed.

A minimum cut between the token ids and whatever reads the region. A value costs its bytes when it
is stored; an operation costs the bytes of the constants it reads when it stays in the model. A
value read by several counts once. Both are bytes read for one token, and of equal cuts the one that
leaves fewer operations wins, where moving numbers counts as none.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import Hashable

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant, stored_tensor
from onnx_tricks.graph.shapes import dtype_of
from onnx_tricks.patterns.layout import length_of
from onnx_tricks.patterns.region import Operation, Region
from onnx_tricks.patterns.states import Constant, Row

__all__ = ["Cut", "Join", "find_cut", "find_joins"]

_BYTE = 1 << 20  # of a cost, whose lower part counts operations
_NEVER = 1 << 100
_LOOKUP = 1 << 10  # what is stored lies in one table, unless that is impossible
_SUMS = {
    ("", "Add"),
    ("com.microsoft", "SkipLayerNormalization"),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"),
}


@dataclasses.dataclass(frozen=True)
class Join:
    """A sum of several rows of a region and of other values, as behind a parallel block.

    Attributes:
        node: The last Add of the sum, or a norm that adds.
        rows: Keys of the rows in it.
        others: The other terms.
        key: Identifies the sum of the rows.
    """

    node: ir.Node
    rows: tuple[int, ...]
    others: tuple[ir.Value, ...]
    key: int


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is stored of a region.

    Attributes:
        stored: Keys of the rows: sums of joins first, then others as they are computed.
        removed: The operations that the model no longer needs.
        gone: Keys of rows that the model no longer has; stored ones are not among them.
        joins: The joins of which the sum is stored.
        weights: Bytes of constants that the removed operations read for one token, tables aside.
        matrices: Whether matrices are among them.
    """

    stored: tuple[int, ...]
    removed: tuple[Operation, ...]
    gone: frozenset[int]
    joins: tuple[Join, ...]
    weights: int
    matrices: bool


def find_joins(region: Region) -> list[Join]:
    """The sums of rows with other values, whose rows can be summed beforehand."""
    keys: dict[tuple[int, ...], int] = {}
    first = max(region.members, default=0) + 1
    joins = []
    found: dict[ir.Node, None] = {}
    for members in region.members.values():
        for value in members:
            for node in region.outside_readers(value):
                if _is_sum(node):
                    found[_top(node)] = None
    for node in found:
        terms = _terms(node, region)
        rows = [state for term in terms if isinstance(state := region.states.get(term), Row)]
        others = [term for term in terms if not isinstance(region.states.get(term), Row)]
        alike = len({(row.layout, row.dtype) for row in rows}) == 1
        if len(rows) > 1 and others and alike:
            summed = tuple(row.key for row in rows)
            key = keys.setdefault(summed, first + len(keys))
            joins.append(Join(node, summed, tuple(others), key))
    return joins


def find_cut(region: Region) -> Cut:
    """The cheapest cut of a region."""
    joins = find_joins(region)
    network = _Network()
    for index, operation in enumerate(region.operations):
        node = ("node", index)
        network.connect("source", node, _cost(region, operation))
        for key in operation.inputs:
            network.connect(("out", key), node, _NEVER)
        for made in operation.outputs:
            if made is not None:
                network.connect(node, ("in", made), _NEVER)
    joined = {(join.node, key): join for join in joins for key in join.rows}
    for key in region.members:
        row = region.row(key)
        network.connect(("in", key), ("out", key), _storage(row))
        if _is_needed(region, key, joined):
            network.connect(("out", key), "sink", _NEVER)
    for join in joins:
        network.connect("source", ("sum", join.key), 1)
        for key in join.rows:
            network.connect(("out", key), ("sum", join.key), _NEVER)
        network.connect(("sum", join.key), ("in", join.key), _NEVER)
        storage = _storage(region.row(join.rows[0]))
        network.connect(("in", join.key), ("out", join.key), storage, once=True)
        network.connect(("out", join.key), "sink", _NEVER)
    offline = network.source_side()
    keys = [*dict.fromkeys(join.key for join in joins), *region.members]
    computed = [key for key in keys if ("in", key) in offline]
    stored = tuple(key for key in computed if ("out", key) not in offline)
    removed = [one for index, one in enumerate(region.operations) if ("node", index) in offline]
    sizes = [size for one in removed if not one.lookup for size in _constants(region, one)]
    return Cut(
        stored,
        tuple(removed),
        frozenset(computed) - frozenset(stored),
        tuple(join for join in joins if join.key in stored),
        sum(nbytes for nbytes, _ in sizes),
        any(matrix for _, matrix in sizes),
    )


def _is_needed(region: Region, key: int, joined: dict[tuple[ir.Node, int], Join]) -> bool:
    """Whether something outside reads a row, other than a sum that can do with that of its rows."""
    for value in region.members[key]:
        if value.is_graph_output():
            return True
        for node in region.outside_readers(value):
            if not _is_sum(node) or (_top(node), key) not in joined:
                return True
    return False


def _storage(row: Row) -> int:
    return row.nbytes * _BYTE


def _cost(region: Region, operation: Operation) -> int:
    """The cost of leaving an operation in the model."""
    if operation.lookup:
        return (
            _LOOKUP
            + sum(region.row(key).nbytes for key in operation.outputs if key is not None) * _BYTE
        )
    if operation.moves_only:
        return 0
    return 1 + _BYTE * sum(nbytes for nbytes, _ in _constants(region, operation))


def _constants(region: Region, operation: Operation) -> list[tuple[int, bool]]:
    """Bytes of the constants that an operation reads, and whether each is a matrix."""
    node, found = operation.node, []
    if node.op_type == "Gather" and operation.inputs and node.domain == "":
        outputs = [region.row(key) for key in operation.outputs if key is not None]
        return [(row.nbytes, row.width > 1) for row in outputs]
    for value in node.inputs:
        state = region.states.get(value) if value is not None else None
        if value is None or not isinstance(state, Constant):
            continue
        dtype = dtype_of(value) or ir.DataType.FLOAT
        tensor = stored_tensor(value)
        if tensor is not None:
            dims, nbytes = tuple(tensor.shape.numpy()), tensor.nbytes
        else:
            dims = tuple(length_of(axis).factor for axis in state.layout or ())
            nbytes = math.prod(dims) * dtype.bitwidth // 8
        found.append((nbytes, sum(length > 1 for length in dims) > 1))
    return found


def _is_sum(node: ir.Node) -> bool:
    if (node.domain, node.op_type) not in _SUMS:
        return False
    # The bias of a linear layer is the runtime's to fuse.
    return not any(is_constant(value) for value in node.inputs[:2])


def _top(node: ir.Node) -> ir.Node:
    """The last node of the sum that a node is part of."""
    while node.op_type == "Add":
        value = node.outputs[0]
        readers = list(value.uses())
        if len(readers) != 1 or value.is_graph_output():
            break
        reader, index = readers[0]
        if not _is_sum(reader) or reader.graph is not node.graph or index > 1:
            break
        node = reader
    return node


def _terms(node: ir.Node, region: Region) -> list[ir.Value]:
    """The terms of a sum, from left to right."""
    found: list[ir.Value] = []
    for value in node.inputs[:2]:
        assert value is not None
        inner = value.producer()
        if inner is None or inner in region.nodes or inner.op_type != "Add" or not _is_sum(inner):
            found.append(value)
        elif _top(inner) is _top(node):
            found += _terms(inner, region)
        else:
            found.append(value)
    return found


class _Network:
    """Directed edges with capacities, and the minimum cut between "source" and "sink"."""

    def __init__(self) -> None:
        self._left: dict[Hashable, dict[Hashable, int]] = defaultdict(dict)

    def connect(self, start: Hashable, end: Hashable, capacity: int, *, once: bool = False) -> None:
        held = 0 if once else self._left[start].get(end, 0)
        self._left[start][end] = held + capacity
        self._left[end].setdefault(start, 0)

    def source_side(self) -> set[Hashable]:
        """The smallest side of a minimum cut (Edmonds and Karp)."""
        while True:
            before: dict[Hashable, Hashable] = {"source": "source"}
            queue = deque(["source"])
            while queue and "sink" not in before:
                vertex = queue.popleft()
                for other, left in self._left[vertex].items():
                    if left > 0 and other not in before:
                        before[other] = vertex
                        queue.append(other)  # type: ignore[arg-type]
            if "sink" not in before:
                return set(before)
            path = ["sink"]
            while path[-1] != "source":
                path.append(before[path[-1]])  # type: ignore[arg-type]
            edges = list(zip(path[1:], path, strict=False))
            flow = min(self._left[start][end] for start, end in edges)
            for start, end in edges:
                self._left[start][end] -= flow
                self._left[end][start] += flow
