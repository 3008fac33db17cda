"""Heads that a linear layer projects.

Which column of the layer becomes which channel of which head is not matched but tried: labelled
numbers are sent through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.names import described
from onnx_tricks.graph.pasts import leaving
from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.cache import Cache, axes_behind
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.patterns.head_norm import HeadNorm, whole_norm
from onnx_tricks.patterns.head_path import Path, scale_between
from onnx_tricks.patterns.heads import Heads, Operand
from onnx_tricks.patterns.labels import Letters, Origin, head_table
from onnx_tricks.patterns.projection import Projection

__all__ = ["projected_heads"]

_Indices = np.ndarray[Any, np.dtype[np.int64]]
_Given = Mapping[ir.Value, Array | ir.Value]


def projected_heads(run: DryRun, operand: Operand, path: Path) -> Heads | str:
    """Read heads whose path ends in a layer or in rows; or say what stands in the way.

    Args:
        run: The dry run of the model.
        operand: What is multiplied as heads.
        path: The way back from it.

    Raises:
        Unknown: A shape, or an operator on the way, is not known.
    """
    if path.linear is None:
        origin, maker = Origin(run, path.end, path.end), repr(path.end.name)
    else:
        node = path.linear.node
        origin, maker = Origin(run, path.end, node.inputs[0]), described(node)
    if origin.source is None:
        return f"{maker} reads rows of a shape that cannot be told"
    given = {**path.given, path.end: origin.labels}
    labels = run.replay(operand.value, given)
    unpacked = operand.unpack(labels)
    order, table = head_table(*origin.decode(unpacked))
    if table is None:
        return f"{maker} does not give every token heads of its own"
    letters = Letters(origin, table)
    last = path.state if path.state is path.normed else None
    if last is not None and scale_between(run, operand.value, last) is None:
        # Whatever else every channel is put through belongs to the norm.
        path.state = path.normed = operand.value
    cache, kept = _cache(run, path, letters, given)
    held = kept or path.state or _bare(run, path, origin, table)
    held_labels = run.replay(held, given)
    scale = scale_between(run, operand.value, held)
    below = path.below or held
    below_labels = run.replay(below, given)
    affine = _affine(run, below, path.end, below_labels, table)
    if scale is None or affine is None:
        return f"{maker} makes heads that are more than scaled on their way"
    return Heads(
        operand.value,
        axes=letters.axes(labels),
        lead=letters.axes(unpacked)[:-2],
        order=order,
        state=cache.present if cache else held,
        state_axes=cache.axes if cache else letters.axes(held_labels),
        state_order=letters.order(held_labels),
        scale=scale,
        head_width=table.shape[1],
        cache=cache,
        rotary=path.rotary,
        rotated_last=path.rotated_last,
        norm=_norm(run, path, origin, table, given),
        projection=Projection(
            origin.source, path.linear, below, letters.axes(below_labels), table, *affine
        ),
    )


def _cache(
    run: DryRun, path: Path, letters: Letters, given: _Given
) -> tuple[Cache | None, ir.Value | None]:
    """What is appended to a past; or, without one, a view of the heads that leaves.

    And the value on the way whose view it is.
    """
    if path.appended is not None:
        past, new, node = path.appended
        present = node.outputs[0]
        found = leaving(present, run.parents)
        axes = letters.axes(run.replay(present, given), node.attributes["axis"].as_int())
        before, leaves = axes_behind(node.inputs[0], axes), found[1] if found else None
        return Cache(past, new, present, leaves, node, axes, before), path.state
    for value in path.views if path.state is None else [path.state]:
        found = leaving(value, run.parents)
        if found is not None:
            present, leaves = found
            axes = letters.axes(run.replay(present, given))
            return Cache(None, present, present, leaves, None, axes), value
    return None, None


def _bare(run: DryRun, path: Path, origin: Origin, table: _Indices) -> ir.Value:
    """The last value that holds every head once, before anything scales it."""
    count = origin.labels.size // origin.labels.shape[-1] * table.size
    for value in path.views:
        node, shape = value.producer(), run.shape(value)
        once = shape is not None and np.prod(shape) == count
        if once and node is not None and node.op_type not in ("Mul", "Div"):
            return value
    return path.views[-1]


def _norm(
    run: DryRun, path: Path, origin: Origin, table: _Indices, given: _Given
) -> HeadNorm | str | None:
    """The norm on a path, its gain and shift channel by channel."""
    if path.normed is None:
        return None
    place = np.full(origin.labels.shape[-1], -1)
    place[table] = np.arange(table.size).reshape(table.shape)

    def places(value: ir.Value) -> _Indices:
        found: _Indices = place[origin.decode(run.replay(value, given))[2]]
        return found

    norm = whole_norm(run, path.norms, path.normed, places, table.shape)
    if not path.rotated_first or isinstance(norm, str):
        return norm
    assert path.rotary is not None
    if norm.centered or np.any(norm.shift):
        return "are normalised after their rotation by more than their size and a gain"
    if not path.rotary.keeps_size:
        return "are normalised after a rotation of which nothing tells that it keeps their size"
    return dataclasses.replace(norm, turned=True)


def _affine(
    run: DryRun, below: ir.Value, output: ir.Value, labels: Array, table: _Indices
) -> tuple[Array, Array] | None:
    """Factor and term, [G, K] each, of what is cached, rotated or normalised.

    Args:
        run: The dry run of the model.
        below: That value.
        output: What the layer computes.
        labels: Those of `below`.
        table: The columns of every head, [G, K].
    """
    shape = run.shape(output)
    if below is output or run.shape(below) is None or shape is None:
        return np.ones(table.shape), np.zeros(table.shape)
    zeros = run.replay(below, {output: np.zeros(shape)})
    ones = run.replay(below, {output: np.ones(shape)})
    columns = labels.astype(np.int64) % shape[-1]
    found = []
    for array in (ones - zeros, zeros):
        row = np.full(shape[-1], np.nan)
        row[columns] = array
        if np.any(row[columns] != array):
            return None
        found.append(row[table])
    return None if np.any(np.isnan(found[0])) else (found[0], found[1])
