"""A model run on sizes alone: the shape of every value, and the small integers that shapes are.

Exporters work reshapes out from `Shape` nodes, of which shape inference understands only some. Here
the batch and the lengths get small numbers, caches get the length 0, and the shapes follow node by
node. No weight is read. Between two values, `DryRun.replay` then runs the nodes for real, in NumPy:
so a recogniser sees where each number goes, whatever operators the exporter chose to move it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.graph.pasts import find_pasts
from onnx_tricks.graph.places import places_tokens
from onnx_tricks.graph.shapes import rank_of, shape_of
from onnx_tricks.graph.traverse import inner_graphs
from onnx_tricks.patterns.arithmetic import OPERATORS, Array, as_known
from onnx_tricks.patterns.sizing import output_shapes

__all__ = ["BATCH", "LENGTH", "DryRun", "Unknown"]

BATCH, LENGTH = 2, 3
"""Lengths that stand for the batch and for every other axis that is not fixed, caches aside."""

_SMALL = 4096  # elements; larger values are known by their shape only
_MAX_DEPTH = 200
# Operators whose result's shape is in the numbers of these inputs, not in their shapes.
_DECISIVE = {
    "ConstantOfShape": range(1),
    "Expand": range(1, 2),
    "NonZero": range(1),
    "Pad": range(1, 2),
    "Range": range(3),
    "ReduceMax": range(1, 2),
    "ReduceProd": range(1, 2),
    "RelativePositionBias": range(1, 3),
    "Reshape": range(1, 2),
    "Slice": range(1, 5),
    "Split": range(1, 2),
    "Squeeze": range(1, 2),
    "Tile": range(1, 2),
    "TopK": range(1, 2),
    "Unsqueeze": range(1, 2),
}


class Unknown(Exception):  # noqa: N818 - not an error: the caller turns it into a refusal
    """A value that cannot be worked out; the message says which node stands in the way."""


class DryRun:
    """Shapes and small integers of a model, at sizes chosen here.

    Attributes:
        order: The place of every node in execution order, inner graphs where their node stands.
        parents: By inner graph the node that holds it.
    """

    def __init__(self, model: ir.Model) -> None:
        """Run a model; operators without a rule leave their outputs unknown."""
        self.order: dict[ir.Node, int] = {}
        self.parents: dict[ir.Graph, ir.Node] = {}
        self._shapes: dict[ir.Value, tuple[int, ...]] = {}
        self._arrays: dict[ir.Value, Array] = {}
        self._pasts = {past: growth.axis for past, growth in find_pasts(model).items()}
        self._sizes = _sizes(model, self._pasts)
        self._rows: dict[str, int] = {}
        self._whole(model.graph)
        if self._rows:  # once more, with as many rows as were found to be needed
            self._sizes |= self._rows
            for known in (self.order, self.parents, self._shapes, self._arrays):
                known.clear()
            self._whole(model.graph)

    def _whole(self, graph: ir.Graph) -> None:
        for value in graph.inputs:
            self._declared(value)
            if self.shape(value) in ((), (1,)) and places_tokens(value, graph.inputs):
                # Behind an empty past tokens begin at 0.
                self._arrays[value] = np.zeros(self._shapes[value], dtype=np.int64)
        self._run(graph)

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        """The shape of a value at the chosen sizes; None where it is unknown."""
        if value not in self._shapes and (tensor := stored_tensor(value)) is not None:
            self._shapes[value] = tuple(tensor.shape.numpy())
        return self._shapes.get(value)

    def array(self, value: ir.Value | None) -> Array | None:
        """A small value that constants and sizes decide; None for any other."""
        if value is None:
            return None
        if value not in self._arrays:
            tensor = stored_tensor(value)
            if tensor is None or tensor.size > _SMALL or tensor.dtype == ir.DataType.STRING:
                return None
            self._arrays[value] = as_known(tensor.numpy())
        return self._arrays[value]

    def number(self, value: ir.Value | None) -> float | None:
        """The number in a value of one element that constants and sizes decide."""
        array = self.array(value)
        return float(array.reshape(())) if array is not None and array.size == 1 else None

    def replay(self, value: ir.Value, given: Mapping[ir.Value, Array | ir.Value]) -> Array:
        """Compute a value in NumPy from others.

        Args:
            value: What to compute.
            given: Arrays of values to start from; or another value, to be computed in place of
                one.

        Returns:
            The value, float64, int64 or bool.

        Raises:
            Unknown: An operator on the way has no rule, or something else is needed too.
        """
        return self._replay(value, given, {}, 0)

    def _replay(
        self,
        value: ir.Value,
        given: Mapping[ir.Value, Array | ir.Value],
        done: dict[ir.Value, Array],
        depth: int,
    ) -> Array:
        start = given.get(value)
        if isinstance(start, np.ndarray):
            return start
        if start is not None:
            return self._replay(start, given, done, depth + 1)
        if value in done:
            return done[value]
        tensor = stored_tensor(value)
        if tensor is not None:
            return as_known(tensor.numpy())
        node = value.producer()
        if node is None or depth > _MAX_DEPTH:
            raise Unknown(f"{value.name!r} is needed too")
        if node.op_type in ("Shape", "Size") and node.domain == "":
            array = self.array(value)
            if array is None:
                raise Unknown(f"the shape of {node.inputs[0]!s} is unknown")
            return array
        function = OPERATORS.get((node.domain, node.op_type))
        if function is None:
            raise Unknown(f"{node.op_type} {node.name!r} stands between")
        operands = [
            None if one is None else self._replay(one, given, done, depth + 1)
            for one in node.inputs
        ]
        try:
            results = function(node, *operands)
        except (ValueError, IndexError, TypeError, KeyError) as error:
            raise Unknown(f"{node.op_type} {node.name!r} cannot be followed: {error}") from error
        done.update(zip(node.outputs, _several(results), strict=False))
        return done[value]

    def _run(self, graph: ir.Graph) -> None:
        for node in graph:
            self.order[node] = len(self.order)
            for inner in inner_graphs(node):
                self.parents[inner] = node
                self._run(inner)
            self._enter(node)
            for output in node.outputs:
                if output not in self._shapes:
                    self._declared(output)

    def _enter(self, node: ir.Node) -> None:
        if node.op_type == "If" and node.domain == "":
            self._join(node)
            return
        if node.op_type in ("Shape", "Size") and node.domain == "":
            self._measure(node)
            return
        function = OPERATORS.get((node.domain, node.op_type))
        arrays = [self.array(one) for one in node.inputs]
        known = all(a is not None or v is None for a, v in zip(arrays, node.inputs, strict=True))
        if function is not None and known and node.inputs:
            try:
                results = _several(function(node, *arrays))
            except (ValueError, IndexError, TypeError, KeyError, ZeroDivisionError):
                return
            for output, result in zip(node.outputs, results, strict=False):
                self._shapes[output] = result.shape
                if result.size <= _SMALL:
                    self._arrays[output] = result
            return
        self._assume(node)
        shapes = [None if one is None else self.shape(one) for one in node.inputs]
        found = output_shapes(node, shapes)
        if found is None and function is not None:
            found = self._outline(node, shapes)
        for output, shape in zip(node.outputs, found or (), strict=False):
            self._shapes[output] = shape

    def _assume(self, node: ir.Node) -> None:
        """Rows behind a part that cannot be followed (patches of an image): as many as any."""
        source = node.inputs[0] if node.inputs else None
        if source is None or self.shape(source) is not None or rank_of(source) not in (None, 3):
            return
        if (node.domain, node.op_type) in (("", "LayerNormalization"), ("", "RMSNormalization")):
            gain = self.shape(node.inputs[1]) if node.inputs[1] is not None else None
            if gain is not None and len(gain) == 1:
                self._shapes[source] = (BATCH, LENGTH, gain[0])

    def _outline(
        self, node: ir.Node, shapes: list[tuple[int, ...] | None]
    ) -> list[tuple[int, ...]] | None:
        """Shapes of the outputs of an operator that moves numbers about: it moves zeros."""
        decisive = _DECISIVE.get(node.op_type, ())
        operands: list[Array | None] = []
        for index, (value, shape) in enumerate(zip(node.inputs, shapes, strict=True)):
            array = self.array(value)
            if value is not None and array is None:
                if shape is None or index in decisive:
                    return None
                array = np.broadcast_to(np.zeros((), np.int8), shape)
            operands.append(array)
        if node.op_type == "Reshape" and shapes[0] is not None:
            self._note_rows(node.inputs[0], shapes[0], operands[1])
        try:
            results = _several(OPERATORS[node.domain, node.op_type](node, *operands))
        except (ValueError, IndexError, TypeError, KeyError):
            return None
        return [result.shape for result in results]

    def _note_rows(
        self, source: ir.Value | None, shape: tuple[int, ...], target: Array | None
    ) -> None:
        """Note how many rows an input is to have where each of the batch stands for several."""
        if source is None or not source.is_graph_input() or not source.shape or target is None:
            return
        rows, rest = source.shape[0], int(np.prod(target[target != -1]))
        if isinstance(rows, ir.SymbolicDim) and rows.value and rest > 0 and np.prod(shape) % rest:
            self._rows[rows.value] = shape[0] * rest // math.gcd(rest, int(np.prod(shape[1:])))

    def _measure(self, node: ir.Node) -> None:
        source = node.inputs[0]
        shape = None if source is None else self.shape(source)
        if shape is None:
            return
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
        chosen = np.asarray(shape[start:end], dtype=np.int64)
        array = np.prod(chosen, dtype=np.int64) if node.op_type == "Size" else chosen
        self._arrays[node.outputs[0]] = np.asarray(array)
        self._shapes[node.outputs[0]] = np.asarray(array).shape

    def _join(self, node: ir.Node) -> None:
        """The outputs of an If: what its branches agree on, or what one of them knows."""
        branches = [attribute.as_graph() for attribute in node.attributes.values()]
        for index, output in enumerate(node.outputs):
            known = [self.shape(branch.outputs[index]) for branch in branches]
            found = {shape for shape in known if shape is not None}
            if len(found) == 1:
                self._shapes[output] = found.pop()

    def _declared(self, value: ir.Value) -> None:
        shape = shape_of(value)
        if shape is None:
            return
        lengths = [self._length(value, axis, one) for axis, one in enumerate(shape)]
        if all(length is not None for length in lengths):
            self._shapes[value] = tuple(length for length in lengths if length is not None)

    def _length(self, value: ir.Value, axis: int, length: int | ir.SymbolicDim) -> int | None:
        if isinstance(length, int):
            return length
        if self._pasts.get(value) == axis:
            return 0
        if length.value in self._sizes:
            return self._sizes[length.value]
        if not value.is_graph_input():
            return None
        return BATCH if axis == _batch_axis(value, self._pasts) else LENGTH


def _sizes(model: ir.Model, pasts: Mapping[ir.Value, int]) -> dict[str, int]:
    """A length for every symbol in the shapes of the inputs that stands for one thing alone."""
    named = [
        (value, axis, length.value)
        for value in model.graph.inputs
        for axis, length in enumerate(value.shape or ())
        if isinstance(length, ir.SymbolicDim) and length.value is not None
    ]
    grown = {name for value, axis, name in named if pasts.get(value) == axis}
    leading = {(value, axis) for value, axis, _ in named if axis == _batch_axis(value, pasts)}
    rows = {name for value, axis, name in named if (value, axis) in leading and _rank(value) > 1}
    flat = {name for value, axis, name in named if axis and _rank(value) == 2}
    others = [one for one in named if one[:2] not in leading]
    rest = {name for value, axis, name in others if pasts.get(value) != axis}
    first = {value: name for value, axis, name in named if (value, axis) in leading}
    # What comes behind a batch of another name is none, as the tokens of a mask [T, S] are not.
    behind = {name for value, _, name in others if first.get(value, name) not in (name, *rest)}
    rows -= behind
    sizes = dict.fromkeys(grown - flat - rows, 0)
    for value, axis, name in named:
        if name not in rows & rest and name not in rows & grown:
            batch = (value, axis) in leading and name not in behind
            sizes.setdefault(name, BATCH if batch else LENGTH)
    return sizes


def _batch_axis(value: ir.Value, pasts: Mapping[ir.Value, int]) -> int:
    """The first axis, or that behind tokens, or behind keys and values that one cache stacks."""
    shape = value.shape
    stacked = shape is not None and len(shape) > 4 and shape[0] == 2
    return int(stacked or pasts.get(value) == 0)


def _rank(value: ir.Value) -> int:
    return len(value.shape or ())


def _several(results: Array | tuple[Array, ...]) -> tuple[Array, ...]:
    return results if isinstance(results, tuple) else (results,)
