"""Finding the part of a model that is a function of the token id alone.

From the ids the search goes forward, through all subgraphs, over operators that compute each
token's numbers from that token's id: the lookup in a constant table, and whatever is row-wise
behind it. Equal computations count as one, as those in the branches of an If.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.graph.shapes import dim, dtype_of, rank_of, shape_of
from onnx_tricks.graph.traverse import inner_graphs
from onnx_tricks.patterns.layout import Layout, Length, length_of, symbols
from onnx_tricks.patterns.lengths import Sizes, follow_sizes, sizes_of_constant
from onnx_tricks.patterns.region import Region, is_lookup, reads_shape
from onnx_tricks.patterns.region_keys import Keys
from onnx_tricks.patterns.rowmoves import MOVES, View
from onnx_tricks.patterns.rowwise import follow_rows
from onnx_tricks.patterns.states import Constant, Ids, Row, State, constant_layout, output_type

__all__ = ["find_regions"]

_UNSTABLE = ("Bernoulli", "Multinomial", "RandomNormal", "RandomUniform")
_SHAPED_BY = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1}


def find_regions(model: ir.Model) -> list[Region]:
    """The regions behind every lookup of a constant table, in the order of the lookups."""
    found: dict[tuple[ir.Value, int], Region] = {}
    for node in model.graph.all_nodes():
        if not is_lookup(node):
            continue
        table, index = node.inputs[0], node.inputs[1]
        assert table is not None
        assert index is not None
        ids, rows = _ids_behind(index), dim(table, 0)
        if rows and rank_of(ids) is not None and (ids, rows) not in found:
            found[ids, rows] = _Search(model, ids, rows).region
    regions = found.values()
    return [region for region in regions if any(one.lookup for one in region.operations)]


def _ids_behind(index: ir.Value) -> ir.Value:
    """What holds the ids before they are arranged for the lookup."""
    node = index.producer()
    while node is not None and node.domain == "" and node.op_type in MOVES - {"Split"}:
        source = node.inputs[0]
        if source is None or rank_of(source) is None:
            break
        index, node = source, source.producer()
    return index


class _Search:
    """Follows the graph forward from the ids."""

    def __init__(self, model: ir.Model, ids: ir.Value, vocabulary: int) -> None:
        self.region = Region(ids, vocabulary)
        self._states = self.region.states
        self._keys = Keys(self._states)
        self._opset = model.opset_imports.get("", 1)
        self._names = _axis_names(ids)
        self._visit(model.graph)

    def _visit(self, graph: ir.Graph) -> None:
        for node in graph:
            for inner in inner_graphs(node):
                self._visit(inner)
            self._follow(node)

    def _state(self, value: ir.Value | None) -> State | None:
        if value is not None and value not in self._states and stored_tensor(value) is not None:
            self._states[value] = Constant(constant_layout(value))
        return None if value is None else self._states.get(value)

    def _follow(self, node: ir.Node) -> None:
        if self.region.ids in node.outputs or node.op_type == "Constant":
            return
        states = [self._state(value) for value in node.inputs]
        if reads_shape(node):
            sizes = self._shape(node, states[0])
            if sizes is not None:
                self._states[node.outputs[0]] = sizes
        elif self._is_lookup(node, states):
            self._set_lookup(node, states[1])
        elif any(isinstance(state, Ids) for state in states):
            if node.op_type in MOVES and node.domain == "":
                moved = follow_rows(self._view(node, states)) or ()
                for output, layout in zip(node.outputs, moved, strict=False):
                    if layout is not None and self._whole(layout):
                        self._states[output] = Ids(layout)
        elif node.inputs and all(s or v is None for v, s in zip(node.inputs, states, strict=True)):
            self._follow_known(node, states)

    def _follow_known(self, node: ir.Node, states: list[State | None]) -> None:
        """A node of which all inputs are known."""
        view = self._view(node, states)
        if any(isinstance(state, Sizes) for state in states):
            sizes = follow_sizes(node, view.sizes)
            if sizes is not None:
                self._states[node.outputs[0]] = sizes
                return
        graphs = inner_graphs(node)
        named = [isinstance(one, Sizes) and one.numbers is None for one in states]
        if not any(named) and not any(isinstance(one, Row) for one in states):
            if not graphs and not node.op_type.startswith(_UNSTABLE):
                known = follow_rows(view) or [None] * len(node.outputs)
                for output, layout in zip(node.outputs, known, strict=False):
                    self._states[output] = Constant(constant_layout(output) or layout)
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
                constant = value if isinstance(state, Constant) else None
                sizes.append(None if constant is None else sizes_of_constant(constant))
        return View(node, layouts, sizes, self.region.fixed, self._opset)

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
            and dim(node.inputs[0], 0) == self.region.vocabulary  # type: ignore[arg-type]
        )

    def _set_lookup(self, node: ir.Node, state: State | None) -> None:
        assert isinstance(state, Ids)
        table, output = node.inputs[0], node.outputs[0]
        assert table is not None
        layout = constant_layout(table)
        dtype = dtype_of(table)
        if layout is None or dtype is None:
            return
        key = self._keys.number("lookup", self._keys.of(table), state.layout)
        row = Row((*state.layout, *layout[1:]), dtype, key)
        self.region.add(node, (), [(output, row)], lookup=True)

    def _set_rows(
        self, node: ir.Node, states: Sequence[State | None], layouts: Sequence[Layout | None]
    ) -> None:
        computation = self._keys.of_node(node)
        rows: list[tuple[ir.Value, Row | None]] = []
        for index, (output, layout) in enumerate(zip(node.outputs, layouts, strict=False)):
            known = layout is not None and self._whole(layout)
            if not known and (output.uses() or output.is_graph_output()):
                return
            dtype = output_type(node, index, states)
            if not known or layout is None or dtype is None:
                rows.append((output, None))
            else:
                rows.append((output, Row(layout, dtype, self._keys.number(*computation, index))))
        inputs = tuple(state.key for state in states if isinstance(state, Row))
        self.region.add(node, tuple(dict.fromkeys(inputs)), rows)

    def _whole(self, layout: Layout) -> bool:
        """Whether every axis of the ids is there exactly once."""
        return sorted(symbols(layout)) == sorted(self.region.axes)


def _axis_names(ids: ir.Value) -> dict[str, str]:
    shape = shape_of(ids)
    if shape is None or not ids.is_graph_input():
        return {}
    names = [None if isinstance(one, int) else one.value for one in shape]
    return {one: f"#{axis}" for axis, one in enumerate(names) if one and names.count(one) == 1}
