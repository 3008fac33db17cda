"""Rewriting again with less room for error, until the proof holds or nothing is left to try."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from onnx_tricks.rewrite import Pass, PassResult
from onnx_tricks.verify import Verification

__all__ = ["Attempt", "Prove", "Tried", "until_proven"]

# An error of this share of what is allowed is too close for a pass that is cautious.
_CLOSE = 0.9


class Tried(Protocol):
    """What an attempt gives.

    Attributes:
        results: What each pass did.
    """

    results: list[PassResult]


_Tried = TypeVar("_Tried", bound=Tried)
Prove = Callable[[], Verification | None]
"""Proves an attempt; None where no proof is asked for."""
Attempt = Callable[[Sequence[Pass]], tuple[_Tried, Prove]]
"""Rewrites a model with some passes, and says how to prove what came of it."""


def until_proven(
    attempt: Attempt[_Tried], passes: Sequence[Pass]
) -> tuple[_Tried, Verification | None]:
    """Rewrite with less and less room for error, while a pass leaves too much of it.

    Args:
        attempt: What to try; every call begins with the original.
        passes: With which to begin.

    Returns:
        The last attempt, and its proof: passed if any did.
    """
    close: tuple[Sequence[Pass], Verification] | None = None
    while True:
        tried, prove = attempt(passes)
        verification = prove()
        if verification is None:
            return tried, None
        failed, worse = verification.status == "failed", verification.status != "passed"
        if close is not None and (worse or verification.severity >= close[1].severity):
            # It is not this error that is close.
            tried, _ = attempt(close[0])
            return tried, close[1]
        applied = {result.name for result in tried.results if result.applied}
        if not failed and verification.severity <= _CLOSE:
            return tried, verification
        stricter = _stricter(passes, applied, cautious=not failed)
        if stricter is None:
            return tried, verification
        close = None if failed else (passes, verification)
        passes = stricter


def _stricter(
    passes: Sequence[Pass], applied: set[str], *, cautious: bool
) -> Sequence[Pass] | None:
    """Passes with less room for error; None where there are none that may help.

    Those that a user asked for on top come first: what every run does by default yields last.
    """
    for default in (False, True):
        found = [
            one.stricter()
            if one.name in applied and one.default is default and (one.cautious or not cautious)
            else None
            for one in passes
        ]
        if any(found):
            return [new or old for new, old in zip(found, passes, strict=True)]
    return None
