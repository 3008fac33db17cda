"""Rotation angles of cached keys, from the positions of all of them.

Exporters compute cos and sin for the new tokens alone, from their position ids. Keys that are
cached before rotation need them for every token of the context: the nodes between position ids and
angles are repeated on the positions of all keys.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.constants import is_constant
from onnx_tricks.graph.places import INTEGERS
from onnx_tricks.graph.shapes import dim, dtype_of, rank_of
from onnx_tricks.patterns.attention import Attention
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.patterns.rotary import Rotary
from onnx_tricks.patterns.rotary_angles import bare_angle
from onnx_tricks.slim.dependence import sources_of
from onnx_tricks.slim.repeat import repeat_on, rounds_between
from onnx_tricks.slim.states import builder_before

__all__ = ["Angles", "all_positions", "find_mask"]

_END = 2**62
_STATE = ("past_key_values.positions", "present.positions")


def find_mask(model: ir.Model) -> ir.Value | None:
    """The input that says which tokens of the context are real, [B, S] of integers."""
    for value in model.graph.inputs:
        name = (value.name or "").lower()
        named = "attention_mask" in name and "encoder" not in name
        if named and value.shape is not None and len(value.shape) == 2:
            return value
    return None


def all_positions(build: Builder, mask: ir.Value | None, length: ir.Value | None) -> ir.Value:
    """Positions of all tokens of the context, as exporters define them.

    Args:
        build: Makes the nodes.
        mask: [B, S]; tokens are counted from the first real one.
        length: S as a scalar, for models without a mask.

    Returns:
        [B, S] with a mask, [1, S] without; int64.
    """
    if mask is None:
        assert length is not None
        zero, one = np.asarray(0, dtype=np.int64), np.asarray(1, dtype=np.int64)
        return build.Unsqueeze(build.Range(zero, length, one), [0])
    counted = build.CumSum(build.Cast(mask, to=ir.DataType.INT64), np.asarray(1, dtype=np.int64))
    # Padding has no position; what is computed for it is masked, but has to be a valid index.
    return build.Max(build.Sub(counted, [1]), [0])


class Angles:
    """Rotation angles of all keys, made once for the layers of a graph that share them.

    Args:
        model: The model.
        run: A dry run of it.
        keep: Whether positions are a state of their own, and not counted.
    """

    def __init__(self, model: ir.Model, run: DryRun, *, keep: bool) -> None:
        self._model, self._run, self._keep = model, run, keep
        self._state: tuple[ir.Value, ir.Value] | None = None
        self._made: dict[tuple[object, ...], dict[str, ir.Value]] = {}
        self._rounded: dict[ir.Value, ir.Value] = {}

    def of(
        self, build: Builder, view: Attention, dtype: ir.DataType, past: ir.Value
    ) -> dict[str, ir.Value]:
        """`cos` and `sin`, [B or 1, S, R / 2], for the keys of a view.

        Args:
            build: Makes the nodes, in front of the first layer that needs them.
            view: The layer.
            dtype: Type of the angles.
            past: [B, G, P, K], the cached keys.
        """
        rotary = view.keys.rotary
        assert rotary is not None
        roots = rotary.rows or (bare_angle(rotary.cos), bare_angle(rotary.sin))
        key = (*roots, view.node.graph)
        if key not in self._made:
            positions = self._positions(build, view, past)
            self._made[key] = {
                name: self._angles(build, rotary, root, positions, dtype)
                for name, root in zip(("cos", "sin"), roots, strict=True)
            }
        return self._made[key]

    def _positions(self, build: Builder, view: Attention, past: ir.Value) -> ir.Value:
        """Positions of all keys, in the form of those that the exporter has for new tokens."""
        rotary, mask = view.keys.rotary, find_mask(self._model)
        assert rotary is not None
        given = rotary.positions
        if rotary.rows is not None:
            return self._cut_positions(build, bare_angle(rotary.cos), past)
        if given is None:
            # The operator counts by itself: along the mask, or all tokens.
            total = self._length(build, view.query.operand, 1, past)
            return all_positions(build, None if view.scores.lengths is None else mask, total)
        chosen, rank = _follows(given, mask), self._rank(given)
        if chosen and (self._keep or mask is None or rank == 1):
            return build.Cast(self._remembered(build, given, rank, past), to=dtype_of(given))
        length = None if chosen else self._length(build, given, rank - 1, past)
        positions = all_positions(build, mask if chosen else None, length)
        if rank == 1:
            positions = build.Squeeze(positions, [0])
        return build.Cast(positions, to=dtype_of(given) or ir.DataType.INT64)

    def _cut_positions(self, build: Builder, angle: ir.Value, past: ir.Value) -> ir.Value:
        """Positions of all keys, [1, S], where a slice of a table has the angles of new tokens."""
        cut = angle.producer()
        assert cut is not None
        first = cut.inputs[1]
        assert first is not None
        if not _follows(first, None):
            return all_positions(build, None, self._length(build, angle, 0, past))
        first = build.Cast(build.Squeeze(first), to=ir.DataType.INT64)
        tokens = build.Squeeze(build.Slice(build.Shape(angle), [0], [1]))
        one = np.asarray(1, dtype=np.int64)
        new = build.Range(first, build.Add(first, tokens), one)
        return build.Unsqueeze(self._remembered(build, new, 1, past), [0])

    def _rank(self, given: ir.Value) -> int:
        rank, shape = rank_of(given), self._run.shape(given)
        return len(shape or ()) or 1 if rank is None else rank

    def _length(self, build: Builder, new: ir.Value, axis: int, past: ir.Value) -> ir.Value:
        """S as a scalar, where an axis of a value has the new tokens."""
        tokens = build.Slice(build.Shape(new), [axis], [axis + 1])
        return build.Squeeze(build.Add(build.Slice(build.Shape(past), [2], [3]), tokens), [0])

    def _remembered(self, build: Builder, given: ir.Value, rank: int, past: ir.Value) -> ir.Value:
        """Positions of all keys, from a state [B, S] that new ones are appended to.

        Those without a batch are kept once a row, so that callers may choose rows of all states.
        """
        if self._state is None:
            shape = ir.Shape([_rows(given, rank), "past_sequence_length"])
            state = ir.Value(name=_STATE[0], shape=shape, type=ir.TensorType(ir.DataType.INT64))
            self._model.graph.inputs.append(state)
            new = build.Cast(given, to=ir.DataType.INT64)
            if rank == 1:
                batch = build.Slice(build.Shape(past), [0], [1])
                new = build.Expand(build.Unsqueeze(new, [0]), build.Concat(batch, [1], axis=0))
            self._state = state, build.Concat(state, new, axis=-1)
        first = np.asarray(0, dtype=np.int64)
        return build.Gather(self._state[1], first, axis=0) if rank == 1 else self._state[1]

    def finish(self) -> None:
        """Do what has to wait for the last layer.

        Positions leave the model, where they are a state, and where angles of keys were computed
        in half precision before, those of queries are computed in float32 like them.
        """
        for angle, positions in self._rounded.items():
            self._widen(angle, positions)
        if self._state is not None:
            past, present = self._state
            assert past.shape is not None
            present.name, present.type = _STATE[1], past.type
            present.shape = ir.Shape([*past.shape[:-1], "total_sequence_length"])
            self._model.graph.outputs.append(present)

    def _angles(
        self,
        build: Builder,
        rotary: Rotary,
        root: ir.Value,
        positions: ir.Value,
        dtype: ir.DataType,
    ) -> ir.Value:
        wide = False
        if is_constant(root):
            angles, width = build.Gather(root, positions), dim(root, -1)
        else:
            assert rotary.positions is not None
            wide = rounds_between([root], rotary.positions)
            if wide:
                self._rounded[root] = rotary.positions
            (angles,) = repeat_on(build, [root], rotary.positions, positions, wide=wide)
            shape = self._run.shape(root) or ()
            width = shape[-1] if shape else None
            if len(shape) == 4:  # one for all heads
                angles = build.Squeeze(angles, [shape.index(1, 1)])
        given = rotary.positions
        if given is not None and rank_of(root) == 2 and self._rank(given) == 1:
            angles = build.Unsqueeze(angles, [0])
        if width == rotary.width and rotary.interleaved:
            angles = build.Slice(angles, [0], [_END], [-1], [2])
        elif width == rotary.width:
            angles = build.Slice(angles, [0], [rotary.width // 2], [-1])
        same = dtype_of(root) == dtype and not wide
        return angles if same else build.Cast(angles, to=dtype)

    def _widen(self, angle: ir.Value, positions: ir.Value) -> None:
        """Compute an angle in float32, and round it where it is read.

        In half precision it would be off by a multiple of its position. Runtimes often leave such
        roundings out, so that nobody notices, but not around every node.
        """
        node, readers = angle.producer(), list(angle.uses())
        assert node is not None
        build = builder_before(self._model, node, f"{angle.name}/wide")
        (exact,) = repeat_on(build, [angle], positions, positions, wide=True)
        rounded = build.Cast(exact, to=dtype_of(angle))
        for reader, index in readers:
            reader.replace_input_with(index, rounded)


def _rows(given: ir.Value, rank: int) -> int | ir.SymbolicDim | str:
    """The axis of the batch of positions, as the exporter has it if there is one."""
    return "batch_size" if rank == 1 or given.shape is None else given.shape[0]


def _follows(positions: ir.Value, mask: ir.Value | None) -> bool:
    """Whether positions come from integers of the caller, or from the mask; else from lengths."""
    return any(
        value is mask or (value.is_graph_input() and value.dtype in INTEGERS)
        for value in sources_of(positions)
    )
