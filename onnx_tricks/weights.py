"""The algebra on weights: NumPy arrays in, NumPy arrays out, no graph in sight.

Everything is computed in float64 (or exactly) and rounded once, to the type of the weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["rounding_loss", "row_product", "scale_axis"]

Array = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 1 << 21  # elements; bounds the float64 temporaries to 16 MiB


def scale_axis(weight: Array, gain: Array, axis: int, groups: int = 1) -> Array:
    """Multiply a weight by one gain per input channel, rounding once.

    Args:
        weight: Any shape, of a floating type; not changed.
        gain: [D] float64, with D = `weight.shape[axis] * groups`.
        axis: The input-channel axis of the weight.
        groups: With groups, axis 0 of the weight is split into as many parts, and part j reads the
            j-th part of the channels (a grouped Conv).

    Returns:
        A new array like `weight`: `weight * gain` along the axis, exact to half a unit in the last
        place.
    """
    shape = [1] * weight.ndim
    if weight.ndim:
        shape[axis] = weight.shape[axis]
    if groups > 1:
        shape[0] = weight.shape[0]
        gain = np.repeat(gain.reshape(groups, -1), weight.shape[0] // groups, axis=0)
    factor: Array = gain.reshape(shape)
    with np.errstate(over="ignore", under="ignore"):
        narrow: Array = factor.astype(weight.dtype)
        if np.array_equal(narrow.astype(np.float64), factor):
            # The product of two numbers of one type, rounded by the hardware, is rounded once.
            product: Array = np.multiply(weight, narrow)
            return product
        return _rounded_product(weight, np.broadcast_to(factor, weight.shape))


def _rounded_product(weight: Array, factor: Array) -> Array:
    """`weight * factor` in float64, rounded to the type of weight, block by block."""
    result = np.empty(weight.shape, dtype=weight.dtype)
    if weight.ndim == 0 or weight.size <= _BLOCK:
        result[...] = weight.astype(np.float64) * factor
        return result
    step = max(1, _BLOCK // (weight.size // weight.shape[0]))
    for start in range(0, weight.shape[0], step):
        block = slice(start, start + step)
        result[block] = weight[block].astype(np.float64) * factor[block]
    return result


def rounding_loss(weight: Array, gain: Array, axis: int, groups: int = 1) -> float:
    """How much more a folded weight is rounded than one in the middle of its type's range.

    Args:
        weight: The weight, as for `scale_axis`.
        gain: [D] float64.
        axis: The input-channel axis of the weight.
        groups: As for `scale_axis`.

    Returns:
        The error of the folded weight, relative to its own size (Frobenius), as a multiple of the
        type's unit roundoff: below 1 where nothing is lost; large where products fall under the
        smallest normal number; infinite where one overflows.
    """
    folded = scale_axis(weight, gain, axis, groups).astype(np.float64)
    if not np.all(np.isfinite(folded)):
        return float("inf") if np.all(np.isfinite(weight)) else 0.0
    exact = scale_axis(weight.astype(np.float64), gain, axis, groups)
    size = float(np.linalg.norm(exact))
    unit = 2.0 ** -(np.finfo(weight.dtype).nmant + 1) if weight.dtype.kind == "f" else 2.0**-8
    return 0.0 if size == 0 else float(np.linalg.norm(folded - exact)) / size / unit


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
