"""Heads of queries, keys or values, traced from where they are multiplied to where they come from.

On the way lie, in any order that makes sense: views, numbers that scale, repeated heads, a cache, a
rotation, a norm, and at the end a linear layer, or an input of the graph. Which column of the layer
becomes which channel of which head is not matched but tried: labelled numbers are sent through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.graph.names import described
from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.axes import Axes, complete, read_axes
from onnx_tricks.patterns.cache import Cache, axes_behind, leaving
from onnx_tricks.patterns.dry_run import DryRun, Unknown
from onnx_tricks.patterns.head_norm import HeadNorm, HeadNorms, NormPart, whole_norm
from onnx_tricks.patterns.labels import Letters, Origin, head_table
from onnx_tricks.patterns.linear import Linear
from onnx_tricks.patterns.pasts import appended, is_lone
from onnx_tricks.patterns.projection import Projection, linear_behind
from onnx_tricks.patterns.quantised import quantised_behind
from onnx_tricks.patterns.rotary import Rotary, find_rotary, keeps_size

__all__ = ["Heads", "Operand", "Tracer"]

_VIEWS = frozenset(
    "Cast Dropout Expand Flatten Gather GatherND Identity Reshape Slice Split Squeeze Tile "
    "Transpose Unsqueeze".split()
)
_AFFINE = frozenset("Add Sub Mul Div".split())
_MAX_NODES = 80
_Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclasses.dataclass(frozen=True)
class Operand:
    """What a product, or a fused operator, reads as heads.

    Attributes:
        value: The value.
        unpack: From an array of the value's shape to [..., S, K]: batch and heads in front.
    """

    value: ir.Value
    unpack: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries, keys or values of an attention.

    Attributes:
        operand: What the attention multiplies.
        axes: What its axes run over; "" for an axis of length one that stands for nothing.
        lead: What the axes in front of [S, K] run over, once unpacked.
        order: [N], which head each of the operand's is, for one row of the batch, in the order in
            which they lie in the operand: repeated heads have equal numbers.
        state: The heads before the last views and scaling: what a cache keeps, if there is one.
        state_axes: What the axes of `state` run over.
        state_order: Which head each of those in `state` is, as `order`.
        scale: `operand` is `scale` times `state`, apart from views, and from the rotation where
            that comes last.
        head_width: K.
        cache: The cache that they are read from, if any.
        rotary: The rotation they went through, if any.
        rotated_last: Whether a cache keeps them as they were before the rotation.
        norm: The norm they went through, if any; a text where that is more than an RMSNorm or a
            LayerNorm of each head or of all, or does not commute with the rotation before it.
        projection: The linear layer they come from; None where they are an input of the graph.
        input: The input of the graph that they are, where nothing computes them.
        inside: Whether a fused operator projects, rotates or appends them by itself, so that
            `operand` is what it reads.
    """

    operand: ir.Value
    axes: Axes
    lead: Axes
    order: _Indices
    state: ir.Value
    state_axes: Axes
    state_order: _Indices
    scale: float
    head_width: int
    cache: Cache | None = None
    rotary: Rotary | None = None
    rotated_last: bool = False
    norm: HeadNorm | str | None = None
    projection: Projection | None = None
    input: ir.Value | None = None
    inside: bool = False

    @property
    def heads(self) -> int:
        """G, the number of different heads."""
        return int(self.order.max()) + 1


@dataclasses.dataclass
class _Path:
    """The way from an operand to its origin.

    Attributes:
        given: Values that labels pass by, each with the one that they continue in.
        norms: The norm that heads went through, in parts.
        normed: The last value before heads are rotated or cached that is a norm of channels, apart
            from views: gain and shift are those with which it leaves.
        rotated_first: Whether the norm comes after the rotation.
        views: The values down to the first that is cached, rotated or normalised, latest first.
    """

    given: dict[ir.Value, ir.Value | Array] = dataclasses.field(default_factory=dict)
    appended: tuple[ir.Value, ir.Value, ir.Node] | None = None
    rotary: Rotary | None = None
    rotated_last: bool = False
    norms: Sequence[NormPart] = ()
    normed: ir.Value | None = None
    rotated_first: bool = False
    state: ir.Value | None = None
    below: ir.Value | None = None
    views: list[ir.Value] = dataclasses.field(default_factory=list)

    def stage(self, value: ir.Value, next_value: ir.Value) -> None:
        self.state = value if self.state is None else self.state
        self.below = next_value


class Tracer:
    """Traces heads through one model."""

    def __init__(self, model: ir.Model) -> None:
        """Prepare a model, whose shapes and types have been inferred."""
        self.run = DryRun(model)
        self._norms = HeadNorms(model)
        self._projected: dict[ir.Value, bool] = {}

    def trace(self, operand: Operand, rows: Collection[ir.Value] = ()) -> Heads | str:
        """Trace heads to where they come from; or say what stands in the way.

        Args:
            operand: What is multiplied as heads.
            rows: Values to stop at: heads that are their channels have no layer of their own.
        """
        path = _Path()
        if rows:  # what has been found without them may differ
            self._projected = dict.fromkeys(rows, True)
        try:
            end = self._walk(operand.value, path, rows)
            if isinstance(end, str):
                return quantised_behind(operand.value) or end
            if isinstance(end, Linear) or end in rows:
                return self._projected_heads(operand, path, end)
            return self._given_heads(operand, path, end)
        except Unknown as unknown:
            return str(unknown)
        except IndexError:
            return "the shapes on its way contradict each other"

    def trace_together(self, operands: Sequence[Operand]) -> list[Heads | str]:
        """Trace queries, keys and values, of which some may be what the others are made from."""
        found = [self.trace(one) for one in operands]
        known = [one.projection for one in found if isinstance(one, Heads)]
        rows = {one.source for one in known if one is not None}
        if not rows or (len(rows) == 1 and None not in known and len(known) == len(found)):
            return found
        traced = [self.trace(one, rows) for one in operands]
        self._projected = {}
        return traced

    def _walk(
        self, value: ir.Value, path: _Path, rows: Collection[ir.Value]
    ) -> Linear | ir.Value | str:
        """Go back to a linear layer or an input, noting what lies on the way."""
        for _ in range(_MAX_NODES):
            if path.state is None:
                path.views.append(value)
            if value in rows:
                return value
            linear = linear_behind(value)
            if linear is not None:
                return linear
            node = value.producer()
            if node is None:
                return value
            norms = self._norms.read(value)
            if isinstance(norms, str):
                return norms
            if norms is not None:
                if path.norms:
                    return f"{described(node)} is a second norm of one head"
                path.norms, source = norms
                path.given |= {one.output: one.source for one in path.norms}
                path.normed = path.below or value
                path.stage(value, source)
                value = source
                continue
            joined = appended(node)
            if joined is not None:
                if path.appended is not None:
                    return f"{described(node)} appends to a cache that is appended to again"
                path.appended = (*joined, node)
                path.rotated_last = path.rotary is not None
                path.stage(value, joined[1])
                value = joined[1]
                continue
            step = self._step(node)
            if step is not None:
                if step[1]:
                    path.given[value] = step[0]
                value = step[0]
                continue
            rotary = find_rotary(self.run, value, self._comes_from_a_layer)
            if rotary is None:
                if node.op_type == "Concat":
                    return f"{described(node)} joins channels that do not come from one projection"
                return f"{described(node)} is not understood between a projection and the heads"
            if path.rotary is not None:
                return f"{described(node)} rotates heads that are rotated again"
            path.rotary = rotary
            path.rotated_first = bool(path.norms)
            path.given.update(rotary.idle)
            path.stage(value, rotary.source)
            value = rotary.source
        return "the way from a projection to the heads is too long"

    def _step(self, node: ir.Node) -> tuple[ir.Value, bool] | None:
        """One node back along views and constant factors; and whether the node changes numbers."""
        if node.domain != "":
            return None
        if node.op_type in _VIEWS or is_lone(node):
            source = node.inputs[0]
            return None if source is None else (source, False)
        if node.op_type in _AFFINE and len(node.inputs) == 2:
            known = [self._is_known(one) for one in node.inputs]
            if known.count(True) == 1 and not (known[0] and node.op_type == "Div"):
                source = node.inputs[known.index(False)]
                return None if source is None else (source, True)
        return None

    def _is_known(self, value: ir.Value | None) -> bool:
        return is_constant(value) or self.run.array(value) is not None

    def _comes_from_a_layer(self, value: ir.Value) -> bool:
        """Whether a value is heads on their way from a projection, and not an angle."""
        if value not in self._projected:
            self._projected[value] = False  # of a loop, which there is none
            self._projected[value] = self._look_back(value)
        return self._projected[value]

    def _look_back(self, value: ir.Value) -> bool:
        if self._norms.read(value) is not None or linear_behind(value) is not None:
            return True
        node = value.producer()
        if node is None or node.domain != "":
            return node is not None and node.op_type == "RotaryEmbedding"
        if appended(node) is not None or node.op_type == "RotaryEmbedding":
            return True
        if node.op_type in {*_VIEWS, "Clip", "Neg"}:
            operands = node.inputs[:1]
        elif node.op_type in {*_AFFINE, "Concat"}:
            operands = node.inputs
        else:
            return False
        return any(one is not None and self._comes_from_a_layer(one) for one in operands)

    def _projected_heads(
        self, operand: Operand, path: _Path, end: Linear | ir.Value
    ) -> Heads | str:
        run, linear = self.run, end if isinstance(end, Linear) else None
        if isinstance(end, Linear):
            output, before, maker = end.output, end.node.inputs[0], described(end.node)
        else:
            output, before, maker = end, end, repr(end.name)
        origin = Origin(run, output, before)
        if origin.source is None:
            return f"{maker} reads rows of a shape that cannot be told"
        given = {**path.given, output: origin.labels}
        if path.appended is not None:
            given[path.appended[2].outputs[0]] = path.appended[1]
        labels = run.replay(operand.value, given)
        batch, rows, columns = origin.decode(operand.unpack(labels))
        order, table = head_table(batch, rows, columns)
        if table is None:
            return f"{maker} does not give every token heads of its own"
        letters = Letters(origin, table)
        last = path.state if path.state is path.normed else None
        if last is not None and self._scale(operand, last) is None:
            # Whatever else every channel is put through belongs to the norm.
            path.state = path.normed = operand.value
        cache, kept = self._cache(path, letters, given)
        held = kept or path.state or self._bare(path, origin, table)
        scale = self._scale(operand, held)
        below = path.below or held
        affine = self._affine(below, output, origin, table)
        if scale is None or affine is None:
            return f"{maker} makes heads that are more than scaled on their way"
        return Heads(
            operand.value,
            letters.axes(labels),
            letters.axes(operand.unpack(labels))[:-2],
            order,
            cache.present if cache else held,
            cache.axes if cache else letters.axes(run.replay(held, given)),
            letters.order(run.replay(held, given)),
            scale,
            table.shape[1],
            cache,
            path.rotary,
            path.rotated_last,
            self._norm(path, origin, table, given),
            Projection(
                origin.source, linear, below, self._axes(below, output, letters), table, *affine
            ),
        )

    def _cache(
        self, path: _Path, letters: Letters, given: Mapping[ir.Value, Array | ir.Value]
    ) -> tuple[Cache | None, ir.Value | None]:
        """What is appended to a past; or, without one, a view of the heads that leaves.

        And the value on the way whose view it is.
        """
        if path.appended is not None:
            past, new, node = path.appended
            present = node.outputs[0]
            found = leaving(self.run, present)
            axis = node.attributes["axis"].as_int()
            axes = letters.axes(self.run.replay(present, given), axis)
            before = axes_behind(node.inputs[0], axes)
            leaves = found[1] if found else None
            return Cache(past, new, present, leaves, node, axes, before), path.state
        for value in path.views if path.state is None else [path.state]:
            found = leaving(self.run, value)
            if found is not None:
                present, leaves = found
                axes = letters.axes(self.run.replay(present, given))
                return Cache(None, present, present, leaves, None, axes), value
        return None, None

    def _bare(self, path: _Path, origin: Origin, table: _Indices) -> ir.Value:
        """The last value that holds every head once, before anything scales it."""
        count = origin.labels.size // origin.labels.shape[-1] * table.size
        for value in path.views:
            node, shape = value.producer(), self.run.shape(value)
            once = shape is not None and np.prod(shape) == count
            if once and node is not None and node.op_type not in ("Mul", "Div"):
                return value
        return path.views[-1]

    def _given_heads(self, operand: Operand, path: _Path, source: ir.Value) -> Heads | str:
        """Heads that are an input of the graph, as those of an encoder in later steps are."""
        shape = self.run.shape(source)
        if not source.is_graph_input():
            return f"{source.name!r} is a constant"
        if shape is None or path.appended is not None or path.norms or path.rotary:
            return f"{source.name!r} is an input that is changed before it is multiplied"
        labels = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
        given = {**path.given, source: labels}
        found = operand.unpack(self.run.replay(operand.value, given))
        index = np.unravel_index(found.astype(np.int64), shape)
        # The operand tells what the axes of the input stand for: [..., tokens, channels].
        letters: dict[int, str] = {}
        for axis, coordinate in enumerate(index):
            moved = read_axes({"x": coordinate})
            places = [place - found.ndim for place, one in enumerate(moved) if one]
            if len(places) > 1:
                return f"{source.name!r} is arranged in a way that cannot be told"
            if places and places[0] >= -2:
                letters[axis] = {-2: "s", -1: "k"}[places[0]]
        rest = [axis for axis in range(len(shape)) if axis not in letters]
        letters |= dict(zip(rest, "bh", strict=False))
        axes = tuple(letters.get(axis, "") for axis in range(len(shape)))
        heads = np.asarray(index[axes.index("h")]) if "h" in axes else np.zeros_like(index[0])
        batch = np.asarray(index[axes.index("b")]) if "b" in axes else np.zeros_like(index[0])
        lines, rows = (
            heads.reshape(-1, *heads.shape[-2:])[:, 0, 0],
            batch.reshape(-1, *batch.shape[-2:])[:, 0, 0],
        )
        scale = self._scale(operand, source)
        if scale is None:
            return f"{source.name!r} is an input that is changed before it is multiplied"
        coordinates = dict(zip(axes, index, strict=True))
        direct = np.unravel_index(self.run.replay(operand.value, given).astype(np.int64), shape)
        return Heads(
            operand.value,
            complete(read_axes(dict(zip(axes, direct, strict=True)))),
            complete(read_axes(coordinates))[:-2],
            lines[rows == 0],
            source,
            axes,
            np.arange(int(heads.max()) + 1),
            scale,
            int(coordinates["k"].max()) + 1 if "k" in coordinates else 1,
            Cache(source, None, source, None, None, axes, axes),
            input=source,
        )

    def _norm(
        self,
        path: _Path,
        origin: Origin,
        table: _Indices,
        given: Mapping[ir.Value, Array | ir.Value],
    ) -> HeadNorm | str | None:
        """The norm on a path, its gain and shift channel by channel."""
        if path.normed is None:
            return None
        place = np.full(origin.labels.shape[-1], -1)
        place[table] = np.arange(table.size).reshape(table.shape)

        def places(value: ir.Value) -> _Indices:
            found: _Indices = place[origin.decode(self.run.replay(value, given))[2]]
            return found

        norm = whole_norm(self.run, path.norms, path.normed, places, table.shape)
        if not path.rotated_first or isinstance(norm, str):
            return norm
        assert path.rotary is not None
        if norm.centered or np.any(norm.shift):
            return "are normalised after their rotation by more than their size and a gain"
        if not keeps_size(path.rotary):
            return "are normalised after a rotation of which nothing tells that it keeps their size"
        return dataclasses.replace(norm, turned=True)

    def _scale(self, operand: Operand, state: ir.Value) -> float | None:
        """The number that the operand is times the state."""
        shape = self.run.shape(state)
        if shape is None:
            raise Unknown(f"the shape of {state.name!r} is unknown")
        zeros = self.run.replay(operand.value, {state: np.zeros(shape)})
        ones = self.run.replay(operand.value, {state: np.ones(shape)})
        if np.any(zeros) or ones.size == 0 or np.any(ones != ones.flat[0]):
            return None
        return float(ones.flat[0])

    def _affine(
        self, below: ir.Value, output: ir.Value, origin: Origin, table: _Indices
    ) -> tuple[Array, Array] | None:
        """Factor and term, [G, K] each, of what is cached, rotated or normalised."""
        if below is output or self.run.shape(below) is None:
            return np.ones(table.shape), np.zeros(table.shape)
        shape = origin.labels.shape
        zeros = self.run.replay(below, {output: np.zeros(shape)})
        ones = self.run.replay(below, {output: np.ones(shape)})
        where = self.run.replay(below, self._past_constants(below, output, origin))
        columns = where.astype(np.int64) % shape[-1]
        found = []
        for array in (ones - zeros, zeros):
            row = np.full(shape[-1], np.nan)
            row[columns] = array
            if np.any(row[columns] != array):
                return None
            found.append(row[table])
        return None if np.any(np.isnan(found[0])) else (found[0], found[1])

    def _axes(self, below: ir.Value, output: ir.Value, letters: Letters) -> Axes:
        return letters.axes(
            self.run.replay(below, self._past_constants(below, output, letters.origin))
        )

    def _past_constants(
        self, below: ir.Value, output: ir.Value, origin: Origin
    ) -> Mapping[ir.Value, Array | ir.Value]:
        """Labels at the layer, and every constant factor on the way passed by."""
        given: dict[ir.Value, Array | ir.Value] = {output: origin.labels}
        value = below
        for _ in range(_MAX_NODES):
            node = value.producer()
            if value is output or node is None:
                break
            step = self._step(node)
            if step is None:
                break
            if step[1]:
                given[value] = step[0]
            value = step[0]
        return given
