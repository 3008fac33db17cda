"""What a model is asked to do while it is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

__all__ = ["Provider", "Settings", "Workload", "plan"]

Provider = Literal["cpu", "cuda"]
"""Where models run."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One run of a model, or one of many alike.

    Attributes:
        batch: Number of rows.
        new: Number of new tokens in a row; 0 for a model that takes none.
        cached: Number of tokens in the caches before.
    """

    batch: int
    new: int
    cached: int = 0

    @property
    def kind(self) -> str:
        """What it is: "step" behind filled caches, "prompt" of tokens, or "forward" without."""
        if self.cached:
            return "step"
        return "prompt" if self.new else "forward"

    def __str__(self) -> str:
        if self.kind == "forward":
            return "forward"
        if self.kind == "step":
            return f"step at {self.cached:,}"
        return f"prompt of {self.new:,}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How models are opened and filled, the same for both.

    Attributes:
        threads: Threads of one operator; 0 lets ONNX Runtime choose.
        provider: Where they run.
        encoder: Number of positions of an encoder's output, for models that read one.
    """

    threads: int = 0
    provider: Provider = "cpu"
    encoder: int = 0


def plan(
    batches: Sequence[int], cached: Sequence[int], prompts: Sequence[int]
) -> Iterator[Workload]:
    """Yield decode steps by the length of their caches, then prompts.

    Args:
        batches: Numbers of rows.
        cached: Numbers of tokens in the caches.
        prompts: Lengths of prompts; 0 stands for a model that takes no tokens.
    """
    for length in sorted(cached):
        yield from (Workload(batch, 1, length) for batch in batches)
    for length in prompts:
        yield from (Workload(batch, length) for batch in batches)
