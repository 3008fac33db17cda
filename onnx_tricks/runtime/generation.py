"""Writing on from a prompt, greedily or by sampling."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from onnx_tricks.errors import UsageError
from onnx_tricks.runtime.decoder import Decoder
from onnx_tricks.runtime.sessions import Array

__all__ = ["Sampling", "generate"]

Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: Logits are divided by it; above 0.
        top_k: Draw among so many most likely tokens; 0 for all.
        top_p: Draw among the most likely tokens that together have this probability, in (0, 1].
        seed: Another seed draws other tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"temperature is to be above 0, not {self.temperature}")
        if self.top_k < 0:
            raise UsageError(f"top_k is to be a number of tokens, or 0 for all, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is to be above 0 and at most 1, not {self.top_p}")


def generate(
    model: Decoder | str | os.PathLike[str],
    tokens: npt.ArrayLike,
    *,
    mask: npt.ArrayLike | None = None,
    max_new_tokens: int = 128,
    eos: int | Sequence[int] = (),
    pad: int | None = None,
    sampling: Sampling | None = None,
    **others: npt.ArrayLike,
) -> Tokens:
    """Write on from a batch of prompts; stops early once all rows have ended.

    Args:
        model: The decoder, or its file or folder.
        tokens: Token ids of the prompts, [B, T], padded on the left.
        mask: [B, T], 1 for tokens and 0 for padding; all tokens when None.
        max_new_tokens: How many tokens to write at most.
        eos: The token or tokens that end a row.
        pad: The token that fills a row that has ended; the first of `eos` when None.
        sampling: How to draw; None takes the most likely token.
        **others: Further inputs of the model, such as `encoder_hidden_states` [B, S, D].

    Returns:
        The new tokens without the prompts, [B, N], N at most `max_new_tokens`.

    Raises:
        ModelError: The model is broken, or no decoder.
        SessionError: ONNX Runtime fails.
        UsageError: An argument is wrong, or ONNX Runtime is not installed.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    ends = np.atleast_1d(np.asarray(eos, dtype=np.int64))
    filler = pad if pad is not None else int(ends[0]) if ends.size else 0
    if mask is not None and not np.asarray(mask)[:, -1].all():
        raise UsageError("the mask ends with padding; prompts are to be padded on the left")
    choose = _greedy if sampling is None else _Sampler(sampling)
    decoder.reset()
    given = np.asarray(tokens, dtype=np.int64)
    decoder.reserve(given.shape[-1] + max_new_tokens)
    ended = np.zeros(len(given), dtype=bool)
    written: list[Tokens] = []
    while len(written) < max_new_tokens and not ended.all():
        # What was given with the prompt holds for the tokens after it.
        first = not written
        logits = decoder.step(given, mask if first else None, **(others if first else {}))
        chosen = np.where(ended, filler, choose(logits[:, -1]))
        written.append(chosen)
        ended |= np.isin(chosen, ends)
        given = chosen[:, None]
    return np.stack(written, axis=1) if written else given[:, :0]


def _greedy(logits: Array) -> Tokens:
    best: Tokens = np.argmax(logits, axis=-1)
    return best


class _Sampler:
    """Draws a token for each row."""

    def __init__(self, how: Sampling) -> None:
        self._how = how
        self._random = np.random.default_rng(how.seed)

    def __call__(self, logits: Array) -> Tokens:
        """Draw from logits [B, V]."""
        scaled = logits.astype(np.float64) / self._how.temperature
        order = np.argsort(-scaled, axis=-1, kind="stable")
        scores = np.take_along_axis(scaled, order, axis=-1)
        weights = np.exp(scores - scores[:, :1])
        if self._how.top_k:
            weights[:, self._how.top_k :] = 0
        weights /= weights.sum(axis=-1, keepdims=True)
        before = np.cumsum(weights, axis=-1) - weights
        weights[before >= self._how.top_p] = 0
        reached = np.cumsum(weights, axis=-1)
        drawn = self._random.random((len(logits), 1)) * reached[:, -1:]
        ranks = np.argmax(reached > drawn, axis=-1)
        return np.take_along_axis(order, ranks[:, None], axis=-1)[:, 0]
