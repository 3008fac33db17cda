"""What one decode step reads from memory: weights, looked-up rows, key/value caches."""

from __future__ import annotations

import dataclasses
from typing import Literal

__all__ = ["Amount", "Cache", "Traffic"]


@dataclasses.dataclass(frozen=True)
class Amount:
    """Numbers and the bytes they take.

    Attributes:
        values: How many numbers.
        bytes: How many bytes they take in their own type.
    """

    values: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.values + other.values, self.bytes + other.bytes)

    def __sub__(self, other: Amount) -> Amount:
        return self + other * -1

    def __mul__(self, factor: float) -> Amount:
        return Amount(round(self.values * factor), round(self.bytes * factor))


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values that some layers keep.

    Attributes:
        kind: "self" grows with the tokens of the decoder, "cross" with those of the encoder.
        per_token: What all of these layers together keep for one token of one sequence.
        tokens: The number of tokens kept where it is fixed (Whisper's encoder); else None.
        window: The most tokens that are kept (sliding window); None where all are.
    """

    kind: Literal["self", "cross"]
    per_token: Amount
    tokens: int | None = None
    window: int | None = None

    def at(self, context: int) -> Amount:
        """What one sequence keeps, and so reads in each step, at a context of so many tokens."""
        kept = context if self.tokens is None else self.tokens
        return self.per_token * (kept if self.window is None else min(kept, self.window))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one step reads: one new token for each sequence of a batch.

    Attributes:
        weights: Read once a step, whatever the batch.
        experts: All routed experts of a mixture, of which a step reads those that are chosen.
        used: The share of the experts that one token chooses.
        rows: Looked up for each token (embeddings, precomputed rows).
        caches: Read for each sequence.
    """

    weights: Amount
    experts: Amount = Amount()
    used: float = 1.0
    rows: Amount = Amount()
    caches: tuple[Cache, ...] = ()

    def per_step(self, batch: int, context: int) -> Amount:
        """What a step of `batch` sequences with `context` tokens each reads.

        Experts are counted as if tokens chose them independently: a share of
        ``1 - (1 - used)^batch`` is read.
        """
        chosen = self.experts * (1 - (1 - self.used) ** batch)
        return self.weights + chosen + (self.rows + self.cache(context)) * batch

    def cache(self, context: int, kind: str | None = None) -> Amount:
        """What one sequence keeps at a context of so many tokens, in all caches or one kind."""
        kept = (one.at(context) for one in self.caches if kind in (None, one.kind))
        return sum(kept, start=Amount())

    def cache_per_token(self, kind: str) -> Amount:
        """What one more token of one sequence adds to the caches of a kind."""
        return sum((c.per_token for c in self.caches if c.kind == kind), start=Amount())
