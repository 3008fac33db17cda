"""What a comparison finds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from onnx_tricks.bench.workload import Settings, Workload

__all__ = ["Comparison", "Measurement", "Refusal", "Side", "Spread", "spread"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """The middle of some numbers, and the quartiles around it."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Side:
    """What one model needs for a workload.

    Attributes:
        cache_bytes: Bytes of its caches before a run.
        encoder_bytes: Bytes of an encoder's output that a run reads; not among `cache_bytes`.
        caches: What filled them: "prompt" or "random", or "" where there are none.
        peak_bytes: The most memory of a process that does nothing else; None where unknown.
    """

    cache_bytes: int
    encoder_bytes: int
    caches: str
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One workload, timed in both models.

    Attributes:
        workload: What was done.
        times: Seconds of each pair of runs, reference first.
        reference: What the reference needs.
        candidate: What the candidate needs.
    """

    workload: Workload
    times: tuple[tuple[float, float], ...]
    reference: Side
    candidate: Side

    @property
    def seconds(self) -> tuple[float, float]:
        """The median of each model."""
        reference, candidate = zip(*self.times, strict=True)
        return statistics.median(reference), statistics.median(candidate)

    @property
    def speedup(self) -> Spread:
        """How many times faster the candidate is, pair by pair."""
        return spread([reference / candidate for reference, candidate in self.times])


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A workload that a model does not run.

    Attributes:
        workload: What was to be done.
        model: "reference" or "candidate".
        reason: What ONNX Runtime says.
    """

    workload: Workload
    model: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two models, timed side by side.

    Attributes:
        reference: Its path.
        candidate: Its path.
        settings: How both were opened.
        machine: What they ran on, and versions, by name.
        measurements: One for each workload that both run.
        refusals: One for each that one of them does not.
    """

    reference: Path
    candidate: Path
    settings: Settings
    machine: dict[str, str]
    measurements: tuple[Measurement, ...]
    refusals: tuple[Refusal, ...]


def spread(numbers: Sequence[float]) -> Spread:
    """The median and the quartiles of some numbers, one at least."""
    if len(numbers) == 1:
        return Spread(numbers[0], numbers[0], numbers[0])
    low, middle, high = statistics.quantiles(numbers, n=4, method="inclusive")
    return Spread(middle, low, high)
