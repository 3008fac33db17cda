"""What models are run on: cases, of one or several steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from onnx_tricks.runtime.sessions import Array

__all__ = ["Case", "Step"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One run of a model.

    Attributes:
        feeds: Inputs by name, without the caches.
        valid: Which positions hold tokens and not padding, [B, past + new], bool; None for
            models without tokens.
        new: Number of positions that are new in this step.
    """

    feeds: Mapping[str, Array]
    valid: Array | None = None
    new: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and the steps that decode after it, or a single run.

    Attributes:
        name: What a message calls it.
        batch: Number of rows.
        caches: What the caches hold before the first step, by input name.
        steps: The runs, in order.
        apart: Whether its errors are judged by themselves, not together with those of others.
        again: Makes the same case of other numbers, from a seed above 0; None where that cannot be.
        of: Makes the same case of other tokens, [N], repeated where they are too few.
    """

    name: str
    batch: int
    caches: Mapping[str, Array]
    steps: tuple[Step, ...]
    apart: bool = False
    again: Callable[[int], Case] | None = None
    of: Callable[[Array], Case] | None = None
