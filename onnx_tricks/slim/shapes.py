"""Shapes without the values: graphs read the shape of what is no longer computed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.slim.states import builder_before

__all__ = ["Length", "free_shapes"]

Length = int | Sequence[tuple[ir.Value, int]]
"""A number, or the sum of the lengths of axes of values."""

_END = 2**62
_SAME = frozenset("Cast Clip Cos Dropout Exp Identity IsNaN Neg Not Sin Softmax Sqrt Tanh".split())
_BROADCAST = frozenset("Add And Div Equal Greater Less Max Min Mul Or Pow Sub Where".split())


def free_shapes(model: ir.Model, known: Mapping[ir.Value, Sequence[Length]], run: DryRun) -> None:
    """Let no value be computed only because something reads its shape.

    Args:
        model: The model.
        known: The shapes of inputs that are to go.
        run: A dry run of the model, for ranks.
    """
    for graph in model.graphs():
        needed = _needed(graph)
        shapes = _Shapes(needed, known, run)
        for node in list(graph):
            if node.op_type != "Shape" or node.domain or node.inputs[0] is None:
                continue
            value = node.inputs[0]
            if value in known or (value.producer() is not None and value.producer() not in needed):
                _free(model, node, shapes)


def _needed(graph: ir.Graph) -> set[ir.Node]:
    """The nodes of a graph whose results are needed for more than their shape."""
    pending = list(graph.outputs)
    for node in graph.all_nodes():
        if node.graph is not graph:
            pending += [value for value in node.inputs if value is not None]
    found: set[ir.Node] = set()
    while pending:
        maker = pending.pop().producer()
        if maker is None or maker in found or maker.graph is not graph:
            continue
        found.add(maker)
        if maker.op_type != "Shape":
            pending += [value for value in maker.inputs if value is not None]
        for attribute in maker.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                inner = attribute.as_graph()
                pending += [v for n in inner.all_nodes() for v in n.inputs if v is not None]
                pending.extend(inner.outputs)
    return found


def _computed_from(sources: Iterable[ir.Value]) -> set[ir.Value]:
    """The values that cannot be computed without some others."""
    found = set(sources)
    pending = list(found)
    while pending:
        for node in pending.pop().consumers():
            if node.op_type != "Shape":
                pending += [output for output in node.outputs if output not in found]
                found.update(node.outputs)
    return found


def _free(model: ir.Model, node: ir.Node, shapes: _Shapes) -> None:
    """Give the readers of a Shape node what it would have given."""
    value = node.inputs[0]
    assert value is not None
    build = builder_before(model, node, node.name or "Shape")
    shape = shapes.at(build).of(value)
    if shape is None:
        return
    start, end = node.attributes.get_int("start", 0), node.attributes.get("end")
    if start or end is not None:
        shape = build.Slice(shape, [start], [_END if end is None else end.as_int()])
    node.outputs[0].replace_all_uses_with(shape)


class _Shapes:
    """Writes the shapes of values from those of values that are there anyway."""

    def __init__(
        self,
        needed: set[ir.Node],
        known: Mapping[ir.Value, Sequence[Length]],
        run: DryRun,
    ) -> None:
        self._needed, self._known, self._run = needed, known, run
        self._doomed = _computed_from(known)

    def at(self, build: Builder) -> _Shapes:
        """Begin anew, with nodes made in another place."""
        self._build = build
        self._made: dict[ir.Value, ir.Value | None] = {}
        return self

    def _rank(self, value: ir.Value) -> int | None:
        shape = self._run.shape(value)
        return rank_of(value) if shape is None else len(shape)

    def of(self, value: ir.Value) -> ir.Value | None:
        """The shape of a value as a tensor; None where it cannot be told without the value."""
        if value not in self._made:
            self._made[value] = self._make(value)
        return self._made[value]

    def _make(self, value: ir.Value) -> ir.Value | None:
        if value in self._known:
            parts = [self._vector(length) for length in self._known[value]]
            return self._build.Concat(*parts, axis=0)
        node = value.producer()
        if node is None or node in self._needed:
            return self._build.Shape(value)
        make = _MAKERS.get(node.op_type) if node.domain == "" else None
        shape = None if make is None else make(self, node)
        if shape is None and value not in self._doomed:
            return self._build.Shape(value)
        return shape

    def _vector(self, length: Length) -> ir.Value | list[int]:
        """A length as a tensor [1]."""
        if isinstance(length, int):
            return [length]
        build = self._build
        parts = [build.Slice(build.Shape(value), [axis], [axis + 1]) for value, axis in length]
        return functools.reduce(build.Add, parts)

    def same(self, node: ir.Node) -> ir.Value | None:
        assert node.inputs[0] is not None
        return self.of(node.inputs[0])

    def broadcast(self, node: ir.Node) -> ir.Value | None:
        """The largest length along each axis."""
        operands = [one for one in node.inputs if one is not None]
        ranks = [self._rank(one) for one in operands]
        if None in ranks:
            return None
        rank = max(one for one in ranks if one is not None)
        total: ir.Value | None = None
        for operand, own in zip(operands, ranks, strict=True):
            assert own is not None
            shape = self.of(operand)
            if shape is None:
                return None
            if own < rank:
                shape = self._build.Concat([1] * (rank - own), shape, axis=0)
            total = shape if total is None else self._build.Max(total, shape)
        return total

    def transpose(self, node: ir.Node) -> ir.Value | None:
        shape, perm = self.same(node), node.attributes.get("perm")
        if shape is None or perm is None:
            return None
        return self._build.Gather(shape, list(perm.as_ints()))

    def matmul(self, node: ir.Node) -> ir.Value | None:
        left, right = node.inputs
        assert left is not None
        assert right is not None
        ranks = self._rank(left), self._rank(right)
        shapes = self.of(left), self.of(right)
        if None in ranks or None in shapes or ranks[0] < ranks[1] or ranks[1] < 2:  # type: ignore[operator]
            return None
        rows = self._build.Slice(shapes[0], [0], [-1])
        return self._build.Concat(rows, self._build.Slice(shapes[1], [-1], [_END]), axis=0)

    def concat(self, node: ir.Node) -> ir.Value | None:
        operands = [one for one in node.inputs if one is not None]
        shapes = [self.of(one) for one in operands]
        rank = self._rank(operands[0])
        if rank is None or any(one is None for one in shapes):
            return None
        axis, build = node.attributes["axis"].as_int() % rank, self._build
        lengths = [build.Slice(one, [axis], [axis + 1]) for one in shapes]
        ends = [build.Slice(shapes[0], [0], [axis]), build.Slice(shapes[0], [axis + 1], [_END])]
        return build.Concat(ends[0], functools.reduce(build.Add, lengths), ends[1], axis=0)

    def reshape(self, node: ir.Node) -> ir.Value | None:
        target, shape, build = node.inputs[1], self.same(node), self._build
        if target is None or shape is None or node.attributes.get_int("allowzero", 0) != 0:
            return None
        constant = evaluate(target)
        if constant is not None and all(constant > 0):
            return target
        # What is -1 follows from the number of elements.
        if constant is not None and any(constant == 0):
            zeros = [i for i, one in enumerate(constant) if one == 0]
            parts = [
                build.Slice(shape, [i], [i + 1]) if i in zeros else [int(one)]
                for i, one in enumerate(constant)
            ]
            target = build.Concat(*parts, axis=0)
        total = build.ReduceProd(shape, keepdims=1)
        rest = build.Neg(build.ReduceProd(target, keepdims=1))
        return build.Where(build.Equal(target, [-1]), build.Div(total, rest), target)


_MAKERS: dict[str, Callable[[_Shapes, ir.Node], ir.Value | None]] = {
    **dict.fromkeys(_SAME, _Shapes.same),
    **dict.fromkeys(_BROADCAST, _Shapes.broadcast),
    "Concat": _Shapes.concat,
    "MatMul": _Shapes.matmul,
    "Reshape": _Shapes.reshape,
    "Transpose": _Shapes.transpose,
}
