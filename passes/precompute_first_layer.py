"""precompute-first-layer: what depends on the token id alone, looked up instead of computed."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.graph.edit import add_constant, fresh_name
from onnx_tricks.graph.names import node_name
from onnx_tricks.graph.sizes import measure
from onnx_tricks.patterns.cut import Cut, Join, find_cut
from onnx_tricks.patterns.excerpt import cut_out
from onnx_tricks.patterns.layout import Axis, Layout, length_of
from onnx_tricks.patterns.positions import find_added_rows
from onnx_tricks.patterns.region import Region, find_regions, reads_shape
from onnx_tricks.patterns.states import Row
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.runtime.sessions import load_runtime
from onnx_tricks.runtime.tabulate import Bar, TabulatedTensor, Tabulation

__all__ = ["FirstLayer", "Growth", "PrecomputeFirstLayer"]

_BLOCK = 32 << 20  # bytes of activations that one run of the first layer may take
_HIGHEST_STEP, _LOWEST_STEP = 1024, 16
_COPY, _REST = 0, -1  # entries of the shape given to Reshape
_SPLIT_INPUT = 13  # the first opset in which the widths of Split are an input


@dataclasses.dataclass(frozen=True)
class Growth:
    """What storing a first layer does to a model, known before anything is computed.

    Attributes:
        before: Bytes of all constants of the model.
        table: Bytes of the new table.
        removed: Bytes of the constants that go.
        parameters: Change in the number of parameters.
        reads_before: Bytes read for one token, at batch size one, by what is replaced.
        reads_after: Bytes read for one token from the table.
    """

    before: int
    table: int
    removed: int
    parameters: int
    reads_before: int
    reads_after: int

    @property
    def after(self) -> int:
        """Bytes of all constants afterwards."""
        return self.before + self.table - self.removed

    @property
    def percent(self) -> float:
        """By how much the constants grow."""
        return 100 * (self.after - self.before) / max(1, self.before)


@dataclasses.dataclass(frozen=True)
class FirstLayer(Site):
    """One lookup of token ids and the first layer behind it.

    Attributes:
        region: What depends on the ids alone.
        cut: What is stored of it.
        growth: What that costs.
    """

    region: Region = dataclasses.field(kw_only=True)
    cut: Cut = dataclasses.field(kw_only=True)
    growth: Growth = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class PrecomputeFirstLayer(Pass):
    """Look up what the first layer computes from the token id alone, up to attention.

    ``q, k, v = n(E[id]) W_QKV  ==>  x, q, k, v = Split(T[id])``, ``T = [E | n(E) W_QKV]``

    Shapes: E [V, D], T [V, n]; n is 2 (D + K) for D query and K key numbers per token, in parallel
    blocks too, where x + FFN(n(x)) takes the place of x.
    Exact: the table is computed by ONNX Runtime from the same operators; sums of a parallel block
    change their order. bfloat16 is computed in float32 and rounded once.
    Applies when: the first linear layers read nothing but the looked-up row (no learned positions).
    Saves: the weights in front of the first attention, and reading them for every token.
    Source: arXiv:2402.13388.

    Attributes:
        max_growth: Refuse where the constants would grow by more than this, in per cent.
        bar: Shows how far a table is while it is written.
    """

    name: ClassVar[str] = "precompute-first-layer"
    summary: ClassVar[str] = "Look up what the first layer computes from the token id alone."
    default: ClassVar[bool] = False

    max_growth: float = 10.0
    bar: Bar | None = dataclasses.field(default=None, repr=False, compare=False)

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield the first layer that can be stored, or why there is none."""
        regions = find_regions(model)
        if not regions:
            yield Skip(
                model.graph.name or "graph",
                "no Gather looks up token ids in a constant table: the model takes embeddings, "
                "images or sound, or its table is packed",
            )
            return
        cuts = [(region, find_cut(region)) for region in regions]
        worth = [(region, cut) for region, cut in cuts if cut.matrices]
        for region, cut in worth:
            growth = _growth(model, region, cut)
            if growth.percent <= self.max_growth:
                # One at a time: the next round sees what is left.
                yield _site(region, cut, growth)
                return
            yield Skip(_label(region), _too_large(region, growth, self.max_growth))
        if not worth:
            # Positions are looked up too, but worked out before.
            region = max(regions, key=lambda one: (one.ids.is_graph_input(), one.vocabulary))
            reason = _obstacle(region)
            if reason:
                yield Skip(_label(region), reason)

    def apply(self, model: ir.Model, site: Site) -> None:
        """Put one table, one Gather and one Split in the place of a first layer."""
        assert isinstance(site, FirstLayer)
        load_runtime()  # which the table will need: better missed now than when files are written
        _Rewriter(model, site, self.bar).run()


def _site(region: Region, cut: Cut, growth: Growth) -> FirstLayer:
    names = [region.members[key][0].name for key in cut.stored if key in region.members]
    inputs = [value.name for value in _graph_inputs(region.ids)]
    for join in cut.joins:
        inputs += [value.name for value in join.others]
        names += [value.name for value in join.node.outputs if value.name]
    return FirstLayer(
        _label(region),
        inputs=tuple(name or "" for name in dict.fromkeys(inputs)),
        outputs=tuple(name or "" for name in dict.fromkeys(names)),
        region=region,
        cut=cut,
        growth=growth,
    )


def _stored_rows(region: Region, cut: Cut) -> dict[int, Row]:
    """What is stored, by key."""
    joined = {join.key: join.rows[0] for join in cut.joins}
    return {key: region.row(joined.get(key, key)) for key in cut.stored}


def _growth(model: ir.Model, region: Region, cut: Cut) -> Growth:
    rows = _stored_rows(region, cut).values()
    width = sum(row.nbytes for row in rows)
    gone = _dead_tensors(region, cut)
    looked_up = [key for one in cut.removed if one.lookup for key in one.outputs if key is not None]
    stored = sum(row.width for row in rows if row.dtype.is_floating_point())
    return Growth(
        before=measure(model).bytes,
        table=region.vocabulary * width,
        removed=sum(tensor.nbytes for tensor in gone),
        parameters=region.vocabulary * stored
        - sum(tensor.size for tensor in gone if tensor.dtype.is_floating_point()),
        reads_before=cut.weights + sum(region.row(key).nbytes for key in looked_up),
        reads_after=width,
    )


def _dead_tensors(region: Region, cut: Cut) -> list[ir.TensorProtocol]:
    """The constants that nothing reads once the removed operations are gone."""
    keys = {key for one in cut.removed for key in one.outputs if key is not None}
    dead = {
        node
        for key in keys
        for value in region.members[key]
        if (node := value.producer()) is not None
    }
    pending = [value for node in dead for value in node.inputs]
    found: dict[int, ir.TensorProtocol] = {}
    while pending:
        value = pending.pop()
        if value is None or value.is_graph_output() or not set(value.consumers()) <= dead:
            continue
        tensor, node = stored_tensor(value), value.producer()
        if tensor is not None:
            found[id(value)] = tensor
        if node is None or node in dead:
            continue
        if all(set(output.consumers()) <= dead for output in node.outputs):
            dead.add(node)
            pending += node.inputs
    return list(found.values())


def _too_large(region: Region, growth: Growth, limit: float) -> str:
    numbers = growth.table // region.vocabulary
    return (
        f"its table of {region.vocabulary:,} tokens would take {growth.table:,} bytes ({numbers:,} "
        f"a token) and {growth.removed:,} bytes would go: the constants would grow by "
        f"{growth.percent:.1f} %, from {growth.before:,} to {growth.after:,} bytes "
        f"(--max-growth {limit:g} allows less)"
    )


def _obstacle(region: Region) -> str:
    """Why nothing behind a lookup is worth storing; empty where it is stored already."""
    wide = [members for key, members in region.members.items() if region.row(key).width > 1]
    values = [value for members in wide for value in members]
    readers = list(dict.fromkeys(node for one in values for node in region.outside_readers(one)))
    for node in readers:
        added = find_added_rows(node, region)
        if added is not None:
            return (
                f"{node.name or node.op_type} ({node.op_type}) adds rows of {added!r} that do not "
                "come from the token ids (positions or token types), so that the first layer is "
                "not a function of the token id alone"
            )
    if any(len(operation.outputs) > 1 for operation in region.operations):
        return ""
    named = ", ".join(f"{one.name or one.op_type} ({one.op_type})" for one in readers[:3])
    operands = [operand for one in readers[:1] for operand in one.inputs if operand is not None]
    inputs = [one.name for operand in operands for one in _graph_inputs(operand)]
    others = [name for name in dict.fromkeys(inputs) if name != region.ids.name]
    return (
        "no linear layer with constant weights lies between the lookup and what depends on more "
        f"than the token id: {named or 'nothing reads it'}"
        + (f", which depends on {', '.join(map(repr, others[:2]))}" if others else "")
    )


def _label(region: Region) -> str:
    return node_name(_lookup(region))


def _lookup(region: Region) -> ir.Node:
    return next(one.node for one in region.operations if one.lookup)


def _graph_inputs(value: ir.Value) -> list[ir.Value]:
    """The inputs of the graph that a value is computed from."""
    found, pending, seen = [], [value], set()
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        node = one.producer()
        if node is not None:
            pending += [operand for operand in node.inputs if operand is not None]
        elif one.is_graph_input():
            found.append(one)
    return found


class _Rewriter:
    """Rewrites one site."""

    def __init__(self, model: ir.Model, site: FirstLayer, bar: Bar | None) -> None:
        self._model, self._region, self._cut = model, site.region, site.cut
        self._rows = _stored_rows(site.region, site.cut)
        self._bar = bar
        graph, self._last = site.region.ids.graph, site.region.ids.producer()
        assert isinstance(graph, ir.Graph)
        self._graph, self._first = graph, next(iter(graph))
        table = _lookup(site.region).inputs[0]
        assert table is not None
        self._stem = f"{table.name}.first_layer"
        self._build = Builder(self._place, lambda one: fresh_name(model, f"{self._stem}/{one}"))

    def run(self) -> None:
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
