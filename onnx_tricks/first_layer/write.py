"""Puts one table, one Gather and one Split in the place of a first layer."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from onnx_tricks.first_layer.growth import stored_rows
from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.edit import add_constant, fresh_name
from onnx_tricks.patterns.cut import Cut, Join
from onnx_tricks.patterns.excerpt import cut_out
from onnx_tricks.patterns.layout import Axis, Layout, length_of
from onnx_tricks.patterns.region import Region, reads_shape
from onnx_tricks.runtime.tabulate import Bar, TabulatedTensor, Tabulation

__all__ = ["Replacement"]

_BLOCK = 32 << 20  # bytes of activations that one run of the first layer may take
_HIGHEST_STEP, _LOWEST_STEP = 1024, 16
_COPY, _REST = 0, -1  # entries of the shape given to Reshape
_SPLIT_INPUT = 13  # the first opset in which the widths of Split are an input


class Replacement:
    """The lookup that takes the place of a region, up to where that is cut.

    Args:
        model: The model.
        region: What depends on the ids alone.
        cut: What is stored of it.
        bar: Shows how far the table is while it is written.
    """

    def __init__(self, model: ir.Model, region: Region, cut: Cut, bar: Bar | None) -> None:
        self._model, self._region, self._cut, self._bar = model, region, cut, bar
        self._rows = stored_rows(region, cut)
        graph, self._last = region.ids.graph, region.ids.producer()
        assert isinstance(graph, ir.Graph)
        self._graph, self._first = graph, next(iter(graph))
        table = region.lookup.inputs[0]
        assert table is not None
        self._stem = f"{table.name}.first_layer"
        self._build = Builder(self._place, lambda one: fresh_name(model, f"{self._stem}/{one}"))

    def write(self) -> None:
        """Write the lookups, and let them be read."""
        made: dict[int, ir.Value] = {}
        for dtype in dict.fromkeys(row.dtype for row in self._rows.values()):
            made |= self._look_up([k for k, row in self._rows.items() if row.dtype == dtype], dtype)
        self._redirect_shapes(made)
        for join in self._cut.joins:
            _rejoin(self._model, join, made[join.key])
        for key, value in made.items():
            self._replace(self._region.members.get(key, []), value)

    def _place(self, node: ir.Node) -> None:
        """Put a node in front of all others, or behind what makes the ids, in order."""
        if self._last is None:
            self._graph.insert_before(self._first, node)
        else:
            self._graph.insert_after(self._last, node)
            self._last = node

    def _look_up(self, keys: list[int], dtype: ir.DataType) -> dict[int, ir.Value]:
        """Write one table for the rows of one type."""
        widths = [self._rows[key].width for key in keys]
        table = add_constant(self._model, self._stem, self._table(keys, dtype))
        packed = self._build.Gather(table, self._region.ids, axis=0)
        parts = [packed] if len(keys) == 1 else self._split(packed, widths)
        made = {
            key: self._arranged(part, self._rows[key].layout)
            for key, part in zip(keys, parts, strict=True)
        }
        for value in (packed, *parts, *made.values()):
            value.type = ir.TensorType(dtype)
        return made

    def _table(self, keys: list[int], dtype: ir.DataType) -> TabulatedTensor:
        region, made = self._region, [key for one in self._cut.removed for key in one.outputs]
        numbers = sum(region.row(key).nbytes for key in made if key is not None)
        step = min(max(_LOWEST_STEP, min(_HIGHEST_STEP, _BLOCK // numbers)), region.vocabulary)
        excerpt = cut_out(self._model, region, self._cut, keys, step)
        outputs = [excerpt.outputs[key] for key in keys]
        how = Tabulation(excerpt.model, excerpt.sources, excerpt.shapes, outputs, step, self._bar)
        width = sum(self._rows[key].width for key in keys)
        return TabulatedTensor(how, region.vocabulary, width, dtype)

    def _split(self, packed: ir.Value, widths: list[int]) -> list[ir.Value]:
        attributes: list[ir.Attr] = [ir.AttrInt64("axis", -1)]
        inputs = [packed]
        if self._model.opset_imports.get("", 1) < _SPLIT_INPUT:
            attributes.append(ir.AttrInt64s("split", widths))
        else:
            sizes = ir.Tensor(np.asarray(widths, dtype=np.int64))
            inputs.append(add_constant(self._model, f"{self._stem}.widths", sizes))
        return list(self._build.node("", "Split", inputs, attributes, len(widths)))

    def _arranged(self, value: ir.Value, layout: Layout) -> ir.Value:
        """Bring [ids, numbers] into a layout."""
        axes = self._region.axes
        factors = [factor for axis in layout for factor in axis]
        numbers = [factor for factor in factors if isinstance(factor, int)]
        in_front = factors == [*axes, *numbers]
        if in_front and layout == (*((axis,) for axis in axes), tuple(numbers[:1])):
            return value
        if not in_front:
            value = self._build.Reshape(value, [_COPY] * len(axes) + numbers)
            following = itertools.count(len(axes))
            places = [axes.index(f) if isinstance(f, str) else next(following) for f in factors]
            value = self._build.Transpose(value, perm=places)
            if all(len(axis) == 1 for axis in layout):
                return value
        shape = [_dimension(axis, place, axes) for place, axis in enumerate(layout)]
        if not in_front or shape.count(_REST) > 1:
            return self._build.Reshape(value, self._shape(layout))
        return self._build.Reshape(value, shape)

    def _redirect_shapes(self, made: dict[int, ir.Value]) -> None:
        """Let what reads the shape of a row that goes read that of one that stays, or make it."""
        alike = {self._rows[key].layout: value for key, value in made.items()}
        for key in sorted(self._cut.gone):
            for value in self._region.members.get(key, ()):
                layout = self._region.row(key).layout
                for node in [one for one in value.consumers() if reads_shape(one)]:
                    if layout in alike:
                        node.replace_input_with(0, alike[layout])
                    elif node.op_type == "Size":
                        axis = tuple(factor for axis in layout for factor in axis)
                        size = self._build.Squeeze(self._shape((axis,)), [0])
                        node.outputs[0].replace_all_uses_with(size)
                    else:
                        start, end = (node.attributes.get_int(one) for one in ("start", "end"))
                        shape = self._shape(layout[start or 0 : end])
                        node.outputs[0].replace_all_uses_with(shape)

    def _shape(self, layout: Layout) -> ir.Value:
        """The shape of a layout, worked out from that of the ids."""
        given, build = self._build.Shape(self._region.ids), self._build
        lengths = []
        for axis in layout:
            length = length_of(axis)
            value: ir.Value | list[int] = [length.factor]
            for symbol in length.symbols:
                one = build.Gather(given, [self._region.axes.index(symbol)], axis=0)
                value = one if value == [1] else build.Mul(value, one)
            lengths.append(value)
        return build.Concat(*lengths, axis=0)

    def _replace(self, members: list[ir.Value], new: ir.Value) -> None:
        """Let a new value stand wherever equal old ones were read, under the name of one."""
        named = False
        for old in sorted(members, key=lambda one: not one.is_graph_output()):
            value = new
            if old.is_graph_output() and (named or old.graph is not new.graph):
                # A graph returns only what its own nodes make, and each value once.
                graph = old.graph
                assert isinstance(graph, ir.Graph)
                copies = Builder(graph.append, lambda one: fresh_name(self._model, one))
                value = copies.Identity(new)
            old.replace_all_uses_with(value, replace_graph_outputs=True)
            if value is not new or not named:
                old.name, value.name = value.name, old.name
                value.shape, value.type = old.shape, value.type or old.type
                value.meta.update(old.meta)
            named = named or value is new


def _rejoin(model: ir.Model, join: Join, total: ir.Value) -> None:
    """Add the sum of rows to the other terms."""
    node, graph = join.node, join.node.graph
    assert graph is not None
    build = Builder(
        lambda added: graph.insert_before(node, added),
        lambda one: fresh_name(model, f"{node.name or node.op_type}/{one}"),
    )
    first, *rest = join.others
    for other in rest:
        first = build.Add(first, other)
    node.replace_input_with(0, first)
    node.replace_input_with(1, total)


def _dimension(axis: Axis, place: int, axes: tuple[str, ...]) -> int:
    """An entry of the shape given to Reshape."""
    length = length_of(axis)
    if not length.symbols:
        return length.factor
    return _COPY if place < len(axes) and axis == (axes[place],) else _REST
