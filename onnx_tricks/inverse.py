"""Inverses of weights whose condition numbers reach 1e7, as those of trained keys do."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.linalg

__all__ = ["ScaledInverse", "condition"]

Array = np.ndarray[Any, np.dtype[np.float64]]
_TINY = 1e-9


def condition(weight: Array) -> float:
    """The condition number of a weight [D, E], in the 2-norm; infinite where singular."""
    values = scipy.linalg.svdvals(weight)
    return float(values[0] / values[-1]) if _rank(values, weight.shape) == len(values) else np.inf


@dataclasses.dataclass(frozen=True)
class ScaledInverse:
    """The right inverse of a weight W [D, E] that amplifies rounding of what it computes least.

    `W A = M` has many solutions for E > D; the one for which `S A` is smallest is
    `S^-1 (W S^-1)^+ M`. For E = D it is `W^-1 M`, by singular values too: those of a
    deficient matrix can be left out.

    Attributes:
        scale: S [E], the sizes of the channels.
        left: [D, rank], the left singular vectors of `W S^-1`.
        values: [rank], its singular values.
        right: [rank, E], its right singular vectors.
    """

    scale: Array
    left: Array
    values: Array
    right: Array

    @classmethod
    def of(cls, weight: Array, scale: Array) -> ScaledInverse:
        """Invert a weight [D, E] whose channels have these sizes, [E]."""
        # A channel that is never used has no size; whatever it is given has no effect.
        scale = np.maximum(scale, _TINY * scale.max(initial=_TINY))
        left, values, right = scipy.linalg.svd(weight / scale, full_matrices=False)
        rank = _rank(values, weight.shape)
        return cls(scale, left[:, :rank], values[:rank], right[:rank])

    @property
    def rank(self) -> int:
        """How many directions of its input the weight determines."""
        return len(self.values)

    def solve(self, target: Array) -> Array:
        """The smallest A [E, F] with `W A = target` [D, F], as far as there is one."""
        solved = self.right.T @ ((self.left.T @ target) / self.values[:, None])
        return solved / self.scale[:, None]

    def unseen(self, target: Array) -> Array:
        """Directions in which `target` [D, F] lies outside the range of W: [r, F], orthonormal."""
        if self.rank == len(self.left):
            return target[:0]
        outside = target - self.left @ (self.left.T @ target)
        _, values, right = scipy.linalg.svd(outside, full_matrices=False)
        least = max(outside.shape) * np.finfo(np.float64).eps * np.linalg.norm(target)
        directions: Array = right[: np.count_nonzero(values > least)]
        return directions


def _rank(values: Array, shape: tuple[int, ...]) -> int:
    """How many singular values stand out of what float64 makes of zero."""
    return int(np.count_nonzero(values > max(shape) * np.finfo(np.float64).eps * values[0]))
