"""The part of a model that is a function of the token id alone.

From the ids the search goes forward, through all subgraphs, over operators that compute each
token's numbers from that token's id: the lookup in a constant table, and whatever is row-wise
behind it. Equal computations count as one, as those in the branches of an If.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from functools import cached_property

import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant, stored_tensor
from onnx_tricks.graph.shapes import dim, dtype_of, rank_of, shape_of
from onnx_tricks.patterns.layout import Layout, Length, length_of, symbols
from onnx_tricks.patterns.lengths import Sizes, follow_sizes, sizes_of_constant
from onnx_tricks.patterns.rowmoves import MOVES, View
from onnx_tricks.patterns.rowwise import follow_rows
from onnx_tricks.patterns.states import Constant, Ids, Row, State, constant_layout, output_type

__all__ = ["Operation", "Region", "find_regions", "is_lookup", "reads_shape"]

_SMALL = 1024  # bytes; constants that are compared by what is in them
_UNSTABLE = ("Bernoulli", "Multinomial", "RandomNormal", "RandomUniform")
_SHAPED_BY = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1}


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
        picks = self.node.op_type == "Slice" or is_pick(self.node)
        return self.node.domain == "" and (self.node.op_type in MOVES or picks)


class Region:
    """What can be told from the token ids alone.

    Attributes:
        ids: The value that holds the ids, of any shape.
        vocabulary: Number of rows of the tables that the ids look up.
        states: What is known of each value; values that depend on anything else are not in it.
        operations: The computations, each after those it reads.
        members: The values of each key.
    """

    def __init__(self, model: ir.Model, ids: ir.Value, vocabulary: int) -> None:
        self.ids, self.vocabulary = ids, vocabulary
        self.states: dict[ir.Value, State] = {}
        self.operations: list[Operation] = []
        self.members: dict[int, list[ir.Value]] = defaultdict(list)
        self._keys: dict[Hashable, int] = {}
        self._opset = model.opset_imports.get("", 1)
        rank = rank_of(ids) or 0
        self.axes = tuple(f"#{axis}" for axis in range(rank))
        lengths = [dim(ids, axis) for axis in range(rank)]
        self.fixed = {f"#{axis}": one for axis, one in enumerate(lengths) if one is not None}
        self.states[ids] = Ids(tuple((axis,) for axis in self.axes))
        self._names = _axis_names(ids)
        self._visit(model.graph)

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

    def _visit(self, graph: ir.Graph) -> None:
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                    self._visit(attribute.as_graph())
            self._follow(node)

    def _state(self, value: ir.Value | None) -> State | None:
        if value is not None and value not in self.states and stored_tensor(value) is not None:
            self.states[value] = Constant(constant_layout(value))
        return None if value is None else self.states.get(value)

    def _follow(self, node: ir.Node) -> None:
        if self.ids in node.outputs or node.op_type == "Constant":
            return
        states = [self._state(value) for value in node.inputs]
        given = [value is not None for value in node.inputs]
        if reads_shape(node):
            self._set_sizes(node, self._shape(node, states[0]))
        elif self._is_lookup(node, states):
            self._set_lookup(node, states[1])
        elif any(isinstance(state, Ids) for state in states):
            if node.op_type in MOVES and node.domain == "":
                moved = follow_rows(self._view(node, states)) or ()
                for output, layout in zip(node.outputs, moved, strict=False):
                    if layout is not None and self._whole(layout):
                        self.states[output] = Ids(layout)
        elif all(not there or state for there, state in zip(given, states, strict=True)) and given:
            self._follow_known(node, states)

    def _follow_known(self, node: ir.Node, states: list[State | None]) -> None:
        """A node of which all inputs are known."""
        view = self._view(node, states)
        if any(isinstance(state, Sizes) for state in states):
            sizes = follow_sizes(node, view.sizes)
            if sizes is not None:
                self._set_sizes(node, sizes)
                return
        graphs = any(one.type == ir.AttributeType.GRAPH for one in node.attributes.values())
        named = [isinstance(one, Sizes) and one.numbers is None for one in states]
        if not any(named) and not any(isinstance(one, Row) for one in states):
            if not graphs and not node.op_type.startswith(_UNSTABLE):
                known = follow_rows(view) or [None] * len(node.outputs)
                for output, layout in zip(node.outputs, known, strict=False):
                    self.states[output] = Constant(constant_layout(output) or layout)
            return
        # A number of tokens may shape a row, but not be part of what it holds.
        place = _SHAPED_BY.get(node.op_type)
        shaped = all(index == place for index, one in enumerate(named) if one)
        told = all(
            value is None or view.layouts[i] is not None for i, value in enumerate(node.inputs)
        )
        layouts = follow_rows(view) if shaped and told else None
        if layouts:
            self._set_rows(node, states, layouts)

    def _view(self, node: ir.Node, states: list[State | None]) -> View:
        layouts: list[Layout | None] = []
        sizes: list[Sizes | None] = []
        for value, state in zip(node.inputs, states, strict=True):
            if isinstance(state, Sizes):
                layouts.append(() if state.scalar else ((len(state.entries),),))
                sizes.append(state)
            else:
                layouts.append(state.layout if state is not None else None)
                known = isinstance(state, Constant) and value is not None
                sizes.append(sizes_of_constant(value) if known and value is not None else None)
        return View(node, layouts, sizes, self.fixed, self._opset)

    def _set_sizes(self, node: ir.Node, sizes: Sizes | None) -> None:
        if sizes is not None:
            self.states[node.outputs[0]] = sizes

    def _shape(self, node: ir.Node, state: State | None) -> Sizes | None:
        source = node.inputs[0]
        assert source is not None
        if isinstance(state, Row | Ids):
            lengths: list[Length | None] = [length_of(axis) for axis in state.layout]
        else:
            shape = shape_of(source)
            if shape is None:
                return None
            lengths = [self._length(source, one) for one in shape]
        if node.op_type == "Size":
            total: Length | None = Length()
            for one in lengths:
                total = None if total is None or one is None else total.times(one)
            return Sizes((total,), scalar=True)
        start, end = (node.attributes.get_int(one) for one in ("start", "end"))
        return Sizes(tuple(lengths[start or 0 : end]))

    def _length(self, source: ir.Value, length: int | ir.SymbolicDim) -> Length | None:
        if isinstance(length, int):
            return Length(length)
        # Between inputs, equal names mean equal lengths; elsewhere exporters name as they like.
        if not source.is_graph_input() or length.value is None:
            return None
        return Length(1, (self._names.get(length.value, length.value),))

    def _is_lookup(self, node: ir.Node, states: list[State | None]) -> bool:
        return (
            is_lookup(node)
            and isinstance(states[1], Ids)
            and dim(node.inputs[0], 0) == self.vocabulary  # type: ignore[arg-type]
        )

    def _set_lookup(self, node: ir.Node, state: State | None) -> None:
        assert isinstance(state, Ids)
        table, output = node.inputs[0], node.outputs[0]
        assert table is not None
        layout = constant_layout(table)
        dtype = dtype_of(table)
        if layout is None or dtype is None:
            return
        key = ("lookup", self._constant_key(table), state.layout)
        row = self._keys.setdefault(key, len(self._keys))
        self._add(node, (), [(output, Row((*state.layout, *layout[1:]), dtype, row))], lookup=True)

    def _set_rows(
        self, node: ir.Node, states: Sequence[State | None], layouts: Sequence[Layout | None]
    ) -> None:
        keys = tuple(
            self._input_key(value, state) for value, state in zip(node.inputs, states, strict=True)
        )
        attributes = tuple(sorted(_attribute_key(one) for one in node.attributes.values()))
        rows: list[tuple[ir.Value, Row | None]] = []
        for index, (output, layout) in enumerate(zip(node.outputs, layouts, strict=False)):
            known = layout is not None and self._whole(layout)
            if not known and (output.uses() or output.is_graph_output()):
                return
            key = (node.domain, node.op_type, attributes, keys, index)
            dtype = output_type(node, index, states)
            if not known or layout is None or dtype is None:
                rows.append((output, None))
            else:
                number = self._keys.setdefault(key, len(self._keys))
                rows.append((output, Row(layout, dtype, number)))
        inputs = tuple(state.key for state in states if isinstance(state, Row))
        self._add(node, tuple(dict.fromkeys(inputs)), rows)

    def _add(
        self,
        node: ir.Node,
        inputs: tuple[int, ...],
        rows: list[tuple[ir.Value, Row | None]],
        *,
        lookup: bool = False,
    ) -> None:
        outputs = tuple(None if row is None else row.key for _, row in rows)
        if all(key is None or key not in self.members for key in outputs):
            self.operations.append(Operation(node, inputs, outputs, lookup))
        for value, row in rows:
            if row is not None:
                self.states[value] = row
                self.members[row.key].append(value)

    def _whole(self, layout: Layout) -> bool:
        """Whether every axis of the ids is there exactly once."""
        return sorted(symbols(layout)) == sorted(self.axes)

    def _input_key(self, value: ir.Value | None, state: State | None) -> Hashable:
        if isinstance(state, Row):
            return state.key
        if isinstance(state, Sizes):
            return state
        return None if value is None else self._constant_key(value)

    def _constant_key(self, value: ir.Value) -> Hashable:
        tensor = stored_tensor(value)
        if tensor is not None:
            if tensor.nbytes <= _SMALL and tensor.dtype != ir.DataType.STRING:
                return (tensor.dtype, tuple(tensor.shape.numpy()), tensor.numpy().tobytes())
            return id(tensor)
        state = self.states.get(value)
        node = value.producer()
        if isinstance(state, Sizes) or node is None:
            return state if state is not None else id(value)
        inputs = tuple(None if one is None else self._constant_key(one) for one in node.inputs)
        attributes = tuple(sorted(_attribute_key(one) for one in node.attributes.values()))
        return (node.domain, node.op_type, attributes, inputs, list(node.outputs).index(value))


def find_regions(model: ir.Model) -> list[Region]:
    """The regions behind every lookup of a constant table, in the order of the lookups."""
    found: dict[tuple[ir.Value, int], Region] = {}
    for node in model.graph.all_nodes():
        if not is_lookup(node):
            continue
        table, index = node.inputs[0], node.inputs[1]
        assert table is not None
        assert index is not None
        ids, rows = _root(index), dim(table, 0)
        if rows and rank_of(ids) is not None and (ids, rows) not in found:
            found[ids, rows] = Region(model, ids, rows)
    regions = found.values()
    return [region for region in regions if any(one.lookup for one in region.operations)]


def is_lookup(node: ir.Node) -> bool:
    """Whether a node picks rows of a constant by something that is not constant."""
    if node.op_type != "Gather" or node.domain != "":
        return False
    table, index = node.inputs[0], node.inputs[1]
    first = node.attributes.get_int("axis", 0) == 0
    return first and is_constant(table) and index is not None and not is_constant(index)


def is_pick(node: ir.Node) -> bool:
    """Whether a node picks by constant indices."""
    return node.op_type == "Gather" and node.domain == "" and is_constant(node.inputs[1])


def reads_shape(node: ir.Node) -> bool:
    """Whether a node reads only the shape of its input."""
    return node.op_type in ("Shape", "Size") and node.domain == ""


def _root(index: ir.Value) -> ir.Value:
    """What holds the ids before they are arranged for the lookup."""
    node = index.producer()
    while node is not None and node.domain == "" and node.op_type in MOVES - {"Split"}:
        source = node.inputs[0]
        if source is None or rank_of(source) is None:
            break
        index, node = source, source.producer()
    return index


def _axis_names(ids: ir.Value) -> dict[str, str]:
    shape = shape_of(ids)
    if shape is None or not ids.is_graph_input():
        return {}
    names = [None if isinstance(one, int) else one.value for one in shape]
    return {one: f"#{axis}" for axis, one in enumerate(names) if one and names.count(one) == 1}


def _attribute_key(attribute: ir.Attr) -> tuple[str, str]:
    value = attribute.value
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return attribute.name, f"{tensor.dtype} {tensor.shape} {tensor.tobytes().hex()}"
    return attribute.name, f"{attribute.type} {value!r}"
