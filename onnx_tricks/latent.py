"""The algebra of slim attention: values rebuilt from cached keys and a thin residual.

Of rows `x` of the attention input a cache holds `K = (x - c) W_K` and `R = (x - c) W_R`, and

    K A + R B + d == x W_V + b_V

exactly, for any rank of the residual. Rounding of the cached keys reaches the values through `A`,
which would be huge for `A = W_K^-1 W_V`: trained key weights have condition numbers up to 1e7.
Rounding is relative to the size of a channel, so what counts is `S A`, with `S` the sizes of the
channels of K. `B` takes the r directions in which `S W_K^-1 W_V` is largest and leaves the rest to
`A`, which is the least error possible at rank r (Eckart and Young). Centring by `c`, the mean of
the inputs, makes the channels smaller and their rounding with them: worth about twice the rank.

In half precision three errors of like size remain. Attention averages the rounding of the cache
over the keys. That of `A` falls to a quarter by `round_jointly`, so A need not be wider. That of
`p K` is not averaged: keep it in float32 until it meets A. `benchmarks/slim_error.py` measures all.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import scipy.linalg

from onnx_tricks.inverse import ScaledInverse
from onnx_tricks.rounding import storage_error

__all__ = [
    "UnrecoverableError",
    "ValueBasis",
    "ValueSpectrum",
    "value_spectrum",
]

Array = np.ndarray[Any, np.dtype[np.float64]]


class UnrecoverableError(ValueError):
    """The values are no function of the keys.

    Attributes:
        width: D, the width of the attention input.
        keys: E, the width of the keys.
        rank: How many directions of the input the keys determine.
    """

    def __init__(self, reason: str, *, width: int, keys: int, rank: int) -> None:
        super().__init__(reason)
        self.width, self.keys, self.rank = width, keys, rank


@dataclasses.dataclass(frozen=True)
class ValueBasis:
    """What to cache and how to read it, with a residual of r numbers.

    Attributes:
        center: c [D], subtracted from the attention input; exact in fp16, bf16 and fp32.
        residual_weight: W_R [D, r].
        key_to_value: A [E, Ev].
        residual_to_value: B [r, Ev], with orthonormal rows.
        key_bias: [E], what a cached key lacks, to be added before its rotation: `c W_K + b_K`.
        value_bias: d [Ev], what a value lacks: `c W_V + b_V`. Where attention weights sum to one,
            it can be added to the output of the heads instead.
        moment: [E + r, E + r], the second moment of a cached row (key, residual), for
            `round_jointly`.
        amplification: The predicted error of the values when the cache is rounded, as a multiple
            of the error of rounding the values themselves.
    """

    center: Array
    residual_weight: Array
    key_to_value: Array
    residual_to_value: Array
    key_bias: Array
    value_bias: Array
    moment: Array
    amplification: float

    @property
    def rank(self) -> int:
        """How many numbers are cached per token beside the key."""
        return int(self.residual_weight.shape[1])

    def predicted_error(self, dtype: Any) -> float:
        """The error of the values relative to their size, from a cache of this type."""
        return self.amplification * storage_error(dtype)


@dataclasses.dataclass(frozen=True)
class ValueSpectrum:
    """One attention block factorised: what each rank of the residual gives.

    Attributes:
        amplification: [Ev + 1], for each rank as in `ValueBasis`; infinite where the rank is too
            small to determine the values at all.
    """

    amplification: Array
    _w_k: Array
    _w_v: Array
    _b_k: Array
    _b_v: Array
    _center: Array
    _moment: Array  # [D, D], of the centred inputs
    _inverse: ScaledInverse
    _directions: Array  # [Ev, Ev], rows in the order in which the residual takes them

    def least_rank(self, tolerance: float, multiple: int = 1) -> int | None:
        """The least rank whose amplification is at most `tolerance`.

        Args:
            tolerance: As a multiple of the error of rounding the values themselves; finite.
            multiple: Of which number the rank is to be a multiple.

        Returns:
            The rank, or None if no rank meets the tolerance.
        """
        ranks = np.arange(0, len(self.amplification), multiple)
        good = ranks[self.amplification[ranks] <= tolerance]
        return int(good[0]) if len(good) else None

    def basis(self, rank: int) -> ValueBasis:
        """The weights at one rank, in float64.

        Raises:
            ValueError: The rank is negative, above Ev, or too small to determine the values.
        """
        if not 0 <= rank < len(self.amplification) or np.isinf(self.amplification[rank]):
            raise ValueError(
                f"A residual of {rank} values is not possible: at least "
                f"{np.isinf(self.amplification).sum()}, at most {self._w_v.shape[1]}."
            )
        kept = self._directions[:rank]
        residual_weight = self._w_v @ kept.T
        cached = np.concatenate([self._w_k, residual_weight], axis=1)
        return ValueBasis(
            center=self._center,
            residual_weight=residual_weight,
            key_to_value=self._inverse.solve(self._w_v - residual_weight @ kept),
            residual_to_value=kept,
            key_bias=self._center @ self._w_k + self._b_k,
            value_bias=self._center @ self._w_v + self._b_v,
            moment=cached.T @ self._moment @ cached,
            amplification=float(self.amplification[rank]),
        )


def value_spectrum(
    w_k: Array,
    w_v: Array,
    *,
    b_k: Array | None = None,
    b_v: Array | None = None,
    inputs: Array | None = None,
) -> ValueSpectrum:
    """Factorises the key and value projections of an attention block.

    Args:
        w_k: [D, E] float64, as applied to the attention input: a gain in front is folded in.
        w_v: [D, Ev] float64, likewise.
        b_k: [E]; cached keys do not contain it.
        b_v: [Ev]; the residual does not contain it.
        inputs: [N, D] rows of the attention input, to learn their mean and the sizes of the
            channels from. Without them the inputs are taken as white: of mean zero and size one.

    Returns:
        The spectrum, from which `ValueSpectrum.basis` makes the weights.

    Raises:
        UnrecoverableError: E < D, or repeated key heads, as in grouped queries spelt out.
    """
    width = len(w_k)
    b_k = np.zeros(w_k.shape[1]) if b_k is None else b_k
    b_v = np.zeros(w_v.shape[1]) if b_v is None else b_v
    rows = np.eye(width) * np.sqrt(width) if inputs is None else inputs
    center = np.zeros(width) if inputs is None else _short(rows.mean(axis=0))
    value_size = np.square(rows @ w_v + b_v).sum(axis=1).mean()
    rows = rows - center

    inverse = ScaledInverse.of(w_k, np.sqrt(np.square(rows @ w_k).mean(axis=0)))
    _require_keys(w_k, inverse.rank)
    # What the keys do not see at all comes first, then what they would amplify most.
    unseen = inverse.unseen(w_v)
    others = scipy.linalg.null_space(unseen) if len(unseen) else np.eye(w_v.shape[1])
    noise = inverse.scale[:, None] * inverse.solve(w_v @ others)
    _, sizes, directions = scipy.linalg.svd(noise)
    directions = np.concatenate([unseen, directions @ others.T])

    tail = np.zeros(len(directions) + 1)
    tail[len(unseen) : len(unseen) + len(sizes)] = np.cumsum(np.square(sizes)[::-1])[::-1]
    tail[: len(unseen)] = np.inf
    stored = np.square(rows @ (w_v @ directions.T)).mean(axis=0)
    return ValueSpectrum(
        amplification=np.sqrt((tail + np.cumsum([0.0, *stored])) / value_size),
        _w_k=w_k,
        _w_v=w_v,
        _b_k=b_k,
        _b_v=b_v,
        _center=center,
        _moment=rows.T @ rows / len(rows),
        _inverse=inverse,
        _directions=directions,
    )


def _require_keys(w_k: Array, rank: int) -> None:
    """Refuses keys that leave at least half of the attention input undetermined."""
    width, keys = w_k.shape
    if keys < width:
        reason = f"{keys} key channels cannot determine an input of {width}"
    elif 2 * rank <= width:
        reason = f"{keys} key channels determine only {rank} of {width}: repeated key heads"
    else:
        return
    raise UnrecoverableError(reason, width=width, keys=keys, rank=rank)


def _short(row: Array) -> Array:
    """The nearest numbers that fp16, bf16 and fp32 all hold exactly."""
    short: Array = row.astype(ml_dtypes.bfloat16).astype(np.float64)
    short[np.abs(short) < float(np.finfo(np.float16).smallest_normal)] = 0
    return short
