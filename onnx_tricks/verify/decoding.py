"""Decoding: a prompt, then step by step, the present caches of one step feeding the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from onnx_tricks.runtime.sessions import Array, Session
from onnx_tricks.verify.cases import Case, Step

__all__ = ["decode", "write_text"]


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
        caches = _continued(caches, outputs, presents)
        yield step, outputs


def write_text(
    session: Session,
    presents: Mapping[str, str],
    make: Callable[[Array, tuple[int, ...]], Case],
    scores: Array,
    length: int,
) -> Array:
    """Let a decoder write text: token by token, each drawn by its probability.

    Args:
        session: The decoder; its first output are logits, [B, T, V].
        presents: As for `decode`.
        make: Makes a case of tokens [B, T] and the lengths of the steps at their end.
        scores: Logits of the first tokens, [B, V].
        length: Number of tokens to write.

    Returns:
        The tokens, [B, length].

    Raises:
        SessionError: ONNX Runtime fails.
    """
    random = np.random.default_rng(0)
    tokens = np.empty((len(scores), 0), np.int64)
    caches: dict[str, Array] = {}
    while True:
        drawn = np.argmax(scores.astype(np.float64) + random.gumbel(size=scores.shape), axis=1)
        tokens = np.concatenate([tokens, drawn[:, None]], axis=1)
        if tokens.shape[1] == length:
            return tokens
        case = make(tokens, (1,) if caches else ())
        caches = caches or dict(case.caches)
        outputs = session.run({**caches, **case.steps[-1].feeds})
        caches = _continued(caches, outputs, presents)
        scores = next(iter(outputs.values()))[:, -1]


def _continued(
    caches: dict[str, Array], outputs: Mapping[str, Array], presents: Mapping[str, str]
) -> dict[str, Array]:
    """The caches after a step."""
    return caches | {
        past: outputs[present]
        for past, present in presents.items()
        # A merged decoder returns empty encoder caches once they are filled.
        if present in outputs and not (".encoder." in past and caches[past].size > 0)
    }
