"""Rounding to the types that weights and caches are stored in, and what is lost by it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import scipy.linalg

__all__ = ["round_jointly", "storage_error"]

Array = np.ndarray[Any, np.dtype[np.float64]]
_JITTER = 1e-6


def storage_error(dtype: Any) -> float:
    """The error of rounding to a floating type, relative to the size of what is rounded.

    It is the root mean square over numbers of all magnitudes: 0.42 times the unit roundoff.
    """
    return float(ml_dtypes.finfo(dtype).eps) / 2 / float(np.sqrt(8 * np.log(2)))


def round_jointly(weight: Array, moment: Array, dtype: Any) -> np.ndarray[Any, Any]:
    """Rounds a weight so that the errors of its rows cancel on the inputs it meets.

    Each row makes up for what the rows before it lost (the nearest-plane method of Babai), so that
    cached keys times a half-precision A come out as near as with A in float32.

    Args:
        weight: [C, F] float64.
        moment: [C, C], the second moment of the inputs of the weight.
        dtype: What to round to.

    Returns:
        [C, F] of `dtype`; infinite where a value is beyond its range.
    """
    jitter = _JITTER * np.trace(moment) / len(moment) * np.eye(len(moment))
    lower = scipy.linalg.cholesky(moment + jitter, lower=True)
    lower /= np.diagonal(lower)
    rounded = np.zeros(weight.shape, dtype)
    error = np.zeros_like(weight)
    with np.errstate(over="ignore", invalid="ignore"):
        for row in reversed(range(len(weight))):
            wanted = weight[row] - lower[row + 1 :, row] @ error[row + 1 :]
            rounded[row] = wanted.astype(dtype)
            error[row] = rounded[row].astype(np.float64) - weight[row]
    return rounded
