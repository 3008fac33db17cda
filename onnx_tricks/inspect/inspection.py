"""What was found out about a model: the tricks, and what each would change."""

from __future__ import annotations

import dataclasses
from typing import Literal

from onnx_tricks.inspect.cost import Change
from onnx_tricks.inspect.dimensions import Dimensions
from onnx_tricks.inspect.traffic import Amount, Traffic
from onnx_tricks.passes import PrecomputeFirstLayer
from onnx_tricks.rewrite import Skip

__all__ = ["Inspection", "Trick"]

# It changes the projections that slim attention needs, so the sum of both means nothing.
_APART = frozenset(("shrink-weights",))


@dataclasses.dataclass(frozen=True)
class Trick:
    """What one trick would do to the model.

    Attributes:
        name: The name of its pass.
        basis: "pass" where the pass itself was tried on the graph; "estimate" where the figures
            follow from the dimensions.
        applies: Whether it applies anywhere.
        removed: Stored weights that go: net for a pass.
        added: Stored weights that come: net for a pass.
        traffic: What a step reads afterwards.
        where: The nodes it rewrites, or the parts of the model in words.
        count: How many norms, blocks or layers it rewrites; None for an estimate.
        skipped: Where it does not apply, and why.
        otherwise: For a trick that does not apply: what it would change in a model of the same
            dimensions that qualified.
        notes: What one has to know to read the figures.
    """

    name: str
    basis: Literal["pass", "estimate"]
    applies: bool
    removed: Amount
    added: Amount
    traffic: Traffic
    where: tuple[str, ...] = ()
    count: int | None = None
    skipped: tuple[Skip, ...] = ()
    otherwise: Change | None = None
    notes: tuple[str, ...] = ()

    @property
    def growth(self) -> Amount:
        """What the files grow by; negative where they shrink."""
        return self.added - self.removed


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What the tricks would do to a model.

    Attributes:
        input: The model as given.
        basis: "graph" for ONNX files, "config" for a config.json.
        step: The file that a decode step runs; None for a config.json.
        dimensions: The dimensions, as far as they are known.
        stored: All weights of all files.
        traffic: What a step reads today.
        tricks: The tricks, in the order of the passes.
        combined: What a step reads after all that apply.
        batches: Numbers of sequences to report.
        context: Tokens of context to report.
        notes: What one has to know to read the figures.
    """

    input: str
    basis: Literal["graph", "config"]
    step: str | None
    dimensions: Dimensions | None
    stored: Amount
    traffic: Traffic
    tricks: tuple[Trick, ...]
    combined: Traffic
    batches: tuple[int, ...] = (1, 16, 256)
    context: int = 2048
    notes: tuple[str, ...] = ()

    def speedup(self, after: Traffic, batch: int, context: int | None = None) -> float:
        """How much faster a memory-bound system makes a step that reads `after` instead."""
        tokens = self.context if context is None else context
        reads = (one.per_step(batch, tokens).bytes for one in (self.traffic, after))
        before, now = reads
        return before / now if now else 1.0

    def outgrows(self, trick: Trick) -> bool:
        """Whether the files would grow by more than `optimize` allows unless it is told to."""
        return trick.growth.bytes > PrecomputeFirstLayer.max_growth / 100 * self.stored.bytes

    def joins(self, trick: Trick) -> bool:
        """Whether a trick is among those that are combined."""
        return trick.applies and trick.name not in _APART and not self.outgrows(trick)
