"""Rows in another basis: what it does to the weights on both sides, and to rounding."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg

__all__ = ["Basis"]

_ROUNDED = 3  # the rows, the weights that write them, the weights that read them

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Another basis of the rows between linear layers: `x T` is kept in place of `x`.

    Attributes:
        matrix: T [D, D] float64; or its inverse, which may be any [N, D] where nothing but the one
            layer that it belongs to writes the rows.
        inverse: Whether `matrix` is the inverse of T.
    """

    matrix: Array
    inverse: bool = False

    def write(self, rows: Array, shift: Array | None = None) -> Array:
        """Rows [M, D] of what writes them, in the new basis: `rows @ T`, perhaps `+ shift`."""
        written = self._solve(rows, 1) if self.inverse else rows @ self.matrix
        return written if shift is None else written + shift

    def read(self, columns: Array) -> Array:
        """Columns of what reads the rows, as rows [F, D]: those of `T^-1 @ columns`."""
        return columns @ self.matrix.T if self.inverse else self._solve(columns, 0)

    @functools.cached_property
    def _factors(self) -> tuple[Array, Array]:
        with warnings.catch_warnings():
            # A singular matrix gives infinities, which are felt without end.
            warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
            lower, order = scipy.linalg.lu_factor(self.matrix, check_finite=False)
        return lower, order

    def _solve(self, rows: Array, transposed: int) -> Array:
        solved: Array = scipy.linalg.lu_solve(self._factors, rows.T, transposed).T
        return solved

    def felt(self, rows: Array, readers: Sequence[Array], shift: Array) -> tuple[float, float]:
        """How much rounding is felt behind the layers that read the rows.

        In the present basis the rows are rounded, and what is read from them. In the new one so are
        the weights that have been multiplied, on both sides: each by as much as the rows.

        Args:
            rows: [M, D] float64, in the present basis.
            readers: Weights [D, F] float64.
            shift: [D] or a number, what is added to the rows in the new basis.

        Returns:
            The error of what the worst reader computes, as a multiple of that in the present basis;
            and relative to its size, as a multiple of the error of rounding.
        """
        before, kept = _sizes(rows), _sizes(self.write(rows, shift))
        tiny = np.finfo(np.float64).tiny
        found = []
        for weight in readers:
            new = self.read(weight.T)
            offset = np.broadcast_to(shift, kept.shape) @ new.T
            size = np.linalg.norm(_sizes(rows @ weight))
            inputs = np.linalg.norm(new * kept), np.linalg.norm(offset)
            noise = np.sqrt(_ROUNDED * inputs[0] ** 2 + inputs[1] ** 2 + size**2)
            present = np.hypot(np.linalg.norm(weight.T * before), size)
            found.append((noise / max(present, tiny), noise / max(size, tiny)))
        growth, error = np.max(found, axis=0)
        return float(growth), float(error)


def _sizes(rows: Array) -> Array:
    """The root mean square of each channel."""
    return np.asarray(np.sqrt(np.square(rows).mean(axis=0)))
