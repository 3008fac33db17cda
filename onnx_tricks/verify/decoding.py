"""Run a case: a prompt, then step by step, the present caches of one step feeding the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from onnx_tricks.runtime.sessions import Array, Session
from onnx_tricks.verify.inputs import Case, Step

__all__ = ["decode"]


def decode(
    session: Session,
    case: Case,
    presents: Mapping[str, str],
    caches: Mapping[str, Array] | None = None,
) -> Iterator[tuple[Step, dict[str, Array]]]:
    """Run the steps of a case.

    The tokens of every step are given, so that two models see the same text even where their
    choice of the next token would differ.

    Args:
        session: The model.
        case: What to run.
        presents: For each cache input, the output that continues it.
        caches: What the caches of the model hold first, where they are not those of the case.

    Yields:
        Each step with the outputs of the model, by name.

    Raises:
        SessionError: ONNX Runtime fails.
    """
    caches = dict(case.caches if caches is None else caches)
    for step in case.steps:
        outputs = session.run({**caches, **step.feeds})
        for past, present in presents.items():
            # A merged decoder returns empty encoder caches once they are filled.
            filled = ".encoder." in past and caches[past].size > 0
            if present in outputs and not filled:
                caches[past] = outputs[present]
        yield step, outputs
