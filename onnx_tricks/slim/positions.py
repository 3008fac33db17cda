"""Rotation angles of cached keys, from the positions of all of them.

Exporters compute cos and sin for the new tokens alone, from their position ids. Keys that are
cached before rotation need them for every token of the context: the nodes between position ids and
angles are repeated on the positions of all keys.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.constants import is_constant
from onnx_tricks.graph.shapes import dim, dtype_of, rank_of
from onnx_tricks.patterns.attention import Attention
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.patterns.rotary import Rotary

__all__ = ["Angles", "all_positions", "find_mask", "is_computed_from", "repeat_on"]

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


def repeat_on(
    build: Builder, values: Iterable[ir.Value], source: ir.Value, new: ir.Value
) -> list[ir.Value]:
    """Repeat the nodes between a value and what is computed from it, on another value.

    Args:
        build: Makes the nodes.
        values: What is computed.
        source: What it is computed from; anything else that enters is shared.
        new: Takes the place of `source`.

    Returns:
        The counterparts of `values`.
    """
    dependent = _computed_from(source)
    known: dict[ir.Value, ir.Value] = {source: new}

    def counterpart(value: ir.Value) -> ir.Value:
        if value not in known:
            node = value.producer()
            if node is None or value not in dependent:
                return value
            inputs = [None if v is None else counterpart(v) for v in node.inputs]
            attributes = list(node.attributes.values())
            outputs = build.node(node.domain, node.op_type, inputs, attributes, len(node.outputs))
            known.update(zip(node.outputs, outputs, strict=True))
        return known[value]

    return [counterpart(value) for value in values]


def _computed_from(source: ir.Value) -> set[ir.Value]:
    found, pending = {source}, [source]
    while pending:
        for node in pending.pop().consumers():
            pending += [output for output in node.outputs if output not in found]
            found.update(node.outputs)
    return found


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
        roots = _root(rotary.cos), _root(rotary.sin)
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
        if given is None:
            # The operator counts by itself: along the mask, or all tokens.
            total = self._length(build, view.query.operand, 1, past)
            return all_positions(build, None if view.scores.lengths is None else mask, total)
        counted = _follows(given, mask)
        if counted and self._keep:
            return build.Cast(self._remembered(build, given), to=dtype_of(given))
        if mask is None:
            counted = False
        length = None
        if not counted:
            rank = rank_of(given)
            length = self._length(build, given, (rank or 1) - 1, past)
        positions = all_positions(build, mask if counted else None, length)
        if rank_of(given) == 1:
            positions = build.Squeeze(positions, [0])
        return build.Cast(positions, to=dtype_of(given) or ir.DataType.INT64)

    def _length(self, build: Builder, new: ir.Value, axis: int, past: ir.Value) -> ir.Value:
        """S as a scalar, where an axis of a value has the new tokens."""
        tokens = build.Slice(build.Shape(new), [axis], [axis + 1])
        return build.Squeeze(build.Add(build.Slice(build.Shape(past), [2], [3]), tokens), [0])

    def _remembered(self, build: Builder, given: ir.Value) -> ir.Value:
        """Positions of all keys, from a state that new ones are appended to."""
        if self._state is None:
            like = given.shape if given.shape is not None else ("batch_size", None)
            shape = [*like[:-1], "past_sequence_length"]
            past = ir.Value(
                name=_STATE[0], shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64)
            )
            self._model.graph.inputs.append(past)
            new = build.Cast(given, to=ir.DataType.INT64)
            self._state = past, build.Concat(past, new, axis=-1)
        return self._state[1]

    def declare(self) -> None:
        """Let the positions leave the model, where they are a state."""
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
        if is_constant(root):
            angles, width = build.Gather(root, positions), dim(root, -1)
        else:
            assert rotary.positions is not None
            (angles,) = repeat_on(build, [root], rotary.positions, positions)
            shape = self._run.shape(root) or ()
            width = shape[-1] if shape else None
            if len(shape) == 4:  # one for all heads
                angles = build.Squeeze(angles, [shape.index(1, 1)])
        given = rotary.positions
        if given is not None and rank_of(root) == 2 and rank_of(given) == 1:
            angles = build.Unsqueeze(angles, [0])
        if width == rotary.width and rotary.interleaved:
            angles = build.Slice(angles, [0], [_END], [-1], [2])
        elif width == rotary.width:
            angles = build.Slice(angles, [0], [rotary.width // 2], [-1])
        return angles if dtype_of(root) == dtype else build.Cast(angles, to=dtype)


def _root(value: ir.Value) -> ir.Value:
    """What an unsqueezed value was before."""
    while (node := value.producer()) is not None and node.op_type in ("Unsqueeze", "Identity"):
        assert node.inputs[0] is not None
        value = node.inputs[0]
    return value


def _follows(positions: ir.Value, mask: ir.Value | None) -> bool:
    """Whether positions are the caller's, or counted along the mask; else they are a range."""
    return any(
        value is mask or (value.is_graph_input() and "position" in (value.name or ""))
        for value in _sources(positions)
    )


def is_computed_from(value: ir.Value, source: ir.Value) -> bool:
    """Whether a value depends on the numbers, and not the shape alone, of another."""
    return source in _sources(value)


def _sources(value: ir.Value) -> set[ir.Value]:
    """Everything whose numbers a value depends on."""
    pending, seen = [value], {value}
    while pending:
        node = pending.pop().producer()
        if node is not None and node.op_type != "Shape":
            pending += [v for v in node.inputs if v is not None and v not in seen]
            seen.update(v for v in node.inputs if v is not None)
    return seen
