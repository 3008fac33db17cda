"""The algebra on weights: NumPy arrays in, NumPy arrays out, no graph in sight.

Everything is computed in float64 (or exactly) and rounded once, to the type of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np

__all__ = [
    "axis_mean",
    "center_in_turn",
    "change_rows",
    "folded_size",
    "rounding_loss",
    "row_product",
    "scale_axis",
    "subtract_mean",
]

Array = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 1 << 21  # elements


def scale_axis(
    weight: Array, gain: Array, axis: int, groups: int = 1, rows: slice = slice(None)
) -> Array:
    """Multiply a weight by one gain per input channel, rounding once.

    Args:
        weight: Any shape, of a floating type; not changed.
        gain: [D] float64, with D = `weight.shape[axis] * groups`.
        axis: The input-channel axis of the weight.
        groups: With groups, axis 0 of the weight is split into as many parts, and part j reads the
            j-th part of the channels (a grouped Conv).
        rows: Which entries of axis 0 to compute.

    Returns:
        A new array like `weight[rows]`: `weight * gain` along the axis, exact to half a
        unit in the last place.
    """
    factor = _along_axis(weight, gain, axis, groups)
    factor = factor[rows] if factor.shape[0] > 1 else factor
    weight = weight[rows]
    with np.errstate(over="ignore", under="ignore"):
        narrow: Array = factor.astype(weight.dtype)
        if np.array_equal(narrow.astype(np.float64), factor):
            # The product of two numbers of one type, rounded by the hardware, is rounded once.
            product: Array = np.multiply(weight, narrow)
            return product
        return _rounded_product(weight, np.broadcast_to(factor, weight.shape))


def _along_axis(weight: Array, gain: Array, axis: int, groups: int) -> Array:
    """The gain in a shape that broadcasts against the weight."""
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    if groups > 1:
        shape[0] = weight.shape[0]
        gain = np.repeat(gain.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    return gain.reshape(shape)


def _rounded_product(weight: Array, factor: Array) -> Array:
    """`weight * factor` in float64, rounded to the type of weight, block by block."""
    result = np.empty(weight.shape, dtype=weight.dtype)
    for block in _blocks(weight):
        result[block] = weight[block].astype(np.float64) * factor[block]
    return result


def _blocks(array: Array) -> Iterator[slice]:
    """Slices of the first axis that bound temporaries in float64 to 16 MiB."""
    step = max(1, _BLOCK * array.shape[0] // max(1, array.size))
    return (slice(start, start + step) for start in range(0, array.shape[0], step))


def axis_mean(weight: Array, axis: int, scale: Array | None = None) -> Array:
    """The mean of a weight over one axis, which stays with length 1.

    Args:
        weight: Any shape, of a floating type.
        axis: The axis, of length D.
        scale: [D] float64, what the weight is multiplied with first.

    Returns:
        float64.
    """
    scale = np.ones(weight.shape[axis]) if scale is None else scale
    factor = _along_axis(weight, scale / weight.shape[axis], axis, 1)
    if axis != 0:
        means = [
            (weight[b].astype(np.float64) * factor).sum(axis, keepdims=True)
            for b in _blocks(weight)
        ]
        return np.concatenate(means)
    total = np.zeros((1, *weight.shape[1:]))
    for block in _blocks(weight):
        total += (weight[block].astype(np.float64) * factor[block]).sum(0, keepdims=True)
    return total


def subtract_mean(
    weight: Array,
    mean: Array,
    axis: int,
    scale: Array | None = None,
    rows: slice = slice(None),
) -> Array:
    """Take the mean over one axis off a weight, rounding once.

    Args:
        weight: Any shape, of a floating type; not changed.
        mean: What `axis_mean` gives for the same arguments.
        axis: The axis, of length D.
        scale: [D] float64, what the weight is multiplied with first.
        rows: Which entries of axis 0 to compute.

    Returns:
        A new array like `weight[rows]`, exact to half a unit in the last place.
    """
    factor = _along_axis(weight, np.ones(weight.shape[axis]) if scale is None else scale, axis, 1)
    result = np.empty_like(weight[rows])
    given, parts = weight[rows], (factor, mean)
    factor, mean = (part[rows] if part.shape[0] > 1 else part for part in parts)
    factor, mean = (np.broadcast_to(part, given.shape) for part in (factor, mean))
    for block in _blocks(given):
        result[block] = given[block].astype(np.float64) * factor[block] - mean[block]
    return result


def center_in_turn(vectors: Sequence[Array], dtypes: Sequence[np.dtype[Any]]) -> list[Array]:
    """Take the means off vectors that are added up one after the other.

    What rounding takes from one vector goes into the next: however many are added up, their sum is
    as exact as the last of them. All rows feel a bias alike, so its error would not average out.

    Args:
        vectors: Each [D] float64.
        dtypes: The type to which each is rounded.

    Returns:
        The centred vectors, each [D] of its type.
    """
    carried: Array = np.zeros(())
    centred = []
    for vector, dtype in zip(vectors, dtypes, strict=True):
        wanted = vector - vector.mean() - carried
        centred.append(wanted.astype(dtype))
        carried = centred[-1].astype(np.float64) - wanted
    return centred


def rounding_loss(weight: Array, gain: Array, axis: int, groups: int = 1) -> float:
    """How much is lost because folded values leave the range of the weight's type.

    Args:
        weight: The weight, as for `scale_axis`.
        gain: [D] float64.
        axis: The input-channel axis of the weight.
        groups: As for `scale_axis`.

    Returns:
        The error made under the smallest normal number, relative to the size of the folded weight
        (Frobenius), as a multiple of the type's unit roundoff: below 1 it drowns in ordinary
        rounding. Infinite where a value overflows.
    """
    info = ml_dtypes.finfo(weight.dtype)
    factor = np.broadcast_to(_along_axis(weight, gain, axis, groups), weight.shape)
    # Half types are judged in float32, which holds their products exactly.
    wide = np.float32 if weight.dtype.itemsize <= 2 else np.float64
    subnormal, square = 0, 0.0
    for block in _blocks(weight):
        size = np.abs(weight[block].astype(wide) * factor[block].astype(wide))
        if np.any(size > float(info.max)) and np.all(np.isfinite(weight[block])):
            return float("inf")
        subnormal += int(np.count_nonzero((size < float(info.smallest_normal)) & (size > 0)))
        square += float(np.sum(np.square(size, dtype=np.float64)))
    # A value rounded to a grid is off by a twelfth of the spacing squared, in the mean.
    lost = float(info.smallest_subnormal) * np.sqrt(subnormal / 12)
    return 0.0 if lost == 0 else float(lost / (np.sqrt(square) * float(info.eps) / 2))


def folded_size(weight: Array, gain: Array, axis: int, groups: int = 1) -> float:
    """The Frobenius norm of a folded weight, without making it.

    That is also the size of what a linear layer makes of a normalised row, whose channels are of
    size one. Arguments as for `scale_axis`.
    """
    factor = np.broadcast_to(_along_axis(weight, gain, axis, groups), weight.shape)
    squares = (np.square(weight[b].astype(np.float64) * factor[b]).sum() for b in _blocks(weight))
    return float(np.sqrt(sum(squares)))


def row_product(row: Array, matrix: Array) -> Array:
    """`row @ matrix` in float64, whatever the type of the matrix.

    Args:
        row: [D] float64.
        matrix: [..., D, F], or [D].

    Returns:
        [..., F] float64 (a number for a matrix of one axis).
    """
    if matrix.ndim == 1:
        return np.asarray(row @ matrix.astype(np.float64))
    result = np.zeros((*matrix.shape[:-2], matrix.shape[-1]))
    step = max(1, _BLOCK // max(1, matrix.size // matrix.shape[-2]))
    for start in range(0, matrix.shape[-2], step):
        block = slice(start, start + step)
        result += row[block] @ matrix[..., block, :].astype(np.float64)
    return result


def change_rows(weight: Array, axis: int, change: Callable[[Array], Array]) -> Array:
    """Change a weight along one axis, in float64 and rounded once to its type.

    Args:
        weight: Any shape, of a floating type; not changed.
        axis: The axis, of length D.
        change: From rows [M, D] to rows [M, N], float64.
    """
    rows = np.moveaxis(weight, axis, -1)
    flat = rows.reshape(-1, rows.shape[-1])
    with np.errstate(over="ignore"):
        parts = [change(flat[b].astype(np.float64)).astype(weight.dtype) for b in _blocks(flat)]
    changed = np.concatenate(parts)
    return np.moveaxis(changed.reshape(*rows.shape[:-1], changed.shape[-1]), -1, axis)
