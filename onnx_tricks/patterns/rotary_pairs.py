"""Which channels of a head a rotation turns, and in which pairs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_tricks.patterns.arithmetic import Array, flat_heads
from onnx_tricks.patterns.dry_run import DryRun, Unknown
from onnx_tricks.patterns.rotary_angles import tables_of

__all__ = ["find_pairs"]


def find_pairs(
    run: DryRun, value: ir.Value, source: ir.Value, idle: Mapping[ir.Value, Array]
) -> tuple[int, int, int, bool] | None:
    """Read the pairs off labelled numbers.

    Args:
        run: The dry run of the model.
        value: The heads after the rotation.
        source: The heads before it.
        idle: Values at which nothing is turned: ones for cos, zeros for sin.

    Returns:
        Axis, first channel, number and pairing of the channels turned, as in `Rotary`; None where
        that is not what happens to the heads.
    """
    shape = run.shape(source)
    if shape is None or 0 in shape:
        return None
    labels = np.arange(1, np.prod(shape) + 1, dtype=np.float64).reshape(shape)
    whole = {one: array for one, array in idle.items() if array.dtype.kind == "i"}
    factors = {one: array for one, array in idle.items() if one not in whole}
    crossing = {one: 1 - array for one, array in factors.items()}
    neither = {one: 0 * array for one, array in factors.items()}
    try:
        kept, crossed, rest = (
            run.replay(value, {source: labels, **whole, **given})
            for given in (factors, crossing, neither)
        )
    except Unknown:
        return None
    if not np.array_equal(np.sort(kept, axis=None), labels.reshape(-1)):
        return None
    crossed = crossed - rest
    heads = _flat_heads(run, value)
    if heads is not None:
        kept, crossed = (one.reshape(*one.shape[:-1], heads, -1) for one in (kept, crossed))
    return _pairs(kept, crossed)


def _flat_heads(run: DryRun, value: ir.Value) -> int | None:
    """How many heads lie side by side in what a RotaryEmbedding operator turns, [B, S, H K]."""
    node, shape = value.producer(), run.shape(value)
    if node is None or node.op_type != "RotaryEmbedding" or shape is None or len(shape) != 3:
        return None
    tables = tables_of(node)
    width = None if tables is None else run.shape(tables[0])
    return None if width is None else flat_heads(node, shape[-1], width[-1])


def _pairs(kept: Array, crossed: Array) -> tuple[int, int, int, bool] | None:
    """Which channels each channel takes its sine part from."""
    if crossed.shape != kept.shape or not np.any(crossed):
        return None
    place = np.empty(kept.size + 1, np.int64)
    place[0] = 0
    place[kept.astype(np.int64).reshape(-1)] = np.arange(kept.size)
    taken = np.unravel_index(place[np.abs(crossed).astype(np.int64)], kept.shape)
    own = np.indices(kept.shape, sparse=True)
    turned = crossed != 0
    axes = [axis for axis in range(kept.ndim) if np.any((taken[axis] != own[axis]) & turned)]
    if len(axes) != 1:
        return None
    axis = axes[0]
    lines = np.moveaxis(crossed, axis, -1).reshape(-1, kept.shape[axis])
    others = np.moveaxis(taken[axis], axis, -1).reshape(lines.shape)
    places = np.flatnonzero(lines[0])
    start, width = int(places[0]), len(places)
    same = np.all(np.sign(lines) == np.sign(lines[0])) and np.all(
        others[:, places] == others[0][places]
    )
    expected = np.arange(width)
    if not same or not np.array_equal(places, start + expected):
        return None
    for interleaved in (False, True):
        partner = expected ^ 1 if interleaved else (expected + width // 2) % width
        first = expected % 2 == 0 if interleaved else expected < width // 2
        signs = np.where(first, -1, 1)
        if np.array_equal(others[0][places], start + partner) and np.array_equal(
            np.sign(lines[0][places]), signs
        ):
            return axis - kept.ndim, start, width, interleaved
    return None
