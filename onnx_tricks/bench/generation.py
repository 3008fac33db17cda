"""Timing a decoder: prompts, and steps that feed each other."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from onnx_tricks.bench.files import Files, cache_shape
from onnx_tricks.bench.workload import Settings, Workload
from onnx_tricks.errors import ModelError
from onnx_tricks.graph.interface import Input
from onnx_tricks.runtime.decoder import Decoder
from onnx_tricks.runtime.sessions import Array, SessionError

__all__ = ["Generation"]

_CHUNK = 512  # tokens that are run at a time to fill caches
_MOST_SECONDS = 20.0  # for filling them so
_BLOCK = 16


class Generation:
    """A decoder that is timed.

    Args:
        files: Its files.
        settings: How they were opened.
        decoder: The decoder, opened.
        given: What it takes from an encoder, for one row.
        by_chance: Whether to fill caches with random numbers and never by a prompt.
    """

    def __init__(
        self,
        files: Files,
        settings: Settings,
        decoder: Decoder,
        given: Mapping[str, Array],
        *,
        by_chance: bool,
    ) -> None:
        self._files, self._settings, self._decoder = files, settings, decoder
        self._given = given
        self._random = np.random.default_rng(0)
        self._written = decoder.fork()
        self._most = 0 if by_chance or not files.prompts else math.inf

    def prepare(self, work: Workload) -> _Prompt | _Steps:
        """Get ready for a workload; a call of the result runs it and returns seconds.

        Raises:
            ModelError: The model does not do it.
            SessionError: ONNX Runtime fails.
        """
        if work.cached:
            return _Steps(self._start(work), self._tokens(work.batch, 1))
        if not self._files.prompts:
            raise ModelError("another file fills the caches that it takes")
        given = self._rows(work.batch)
        return _Prompt(self._decoder.fork(), self._tokens(work.batch, work.new), given)

    def filled_by(self, work: Workload, /) -> str:
        """What fills the caches for a workload: "prompt", "random", or "" where there are none."""
        if not work.cached:
            return ""
        return "prompt" if work.cached <= self._most else "random"

    def _start(self, work: Workload) -> Decoder:
        """A decoder with full caches."""
        if work.cached <= self._most and not self._write(work.cached):
            self._most = work.cached - 1
        if work.cached <= self._most:
            start = self._written.fork()
            start.reorder(np.zeros(work.batch, np.int64))
            return start
        start = self._decoder.fork()
        caches = {one.name: self._random_cache(one, work) for one in self._files.caches}
        mask = np.ones((work.batch, work.cached), np.int64)
        start.resume(caches, mask, **self._rows(work.batch))
        return start

    def _write(self, length: int) -> bool:
        """Run one row up to a length; False where that fails or would take too long."""
        decoder = self._written
        if decoder.length > length:
            decoder.reset()
        begun, seconds = decoder.length, 0.0
        try:
            while decoder.length < length:
                tokens = self._tokens(1, min(_CHUNK, length - decoder.length))
                decoder.run(tokens, **({} if decoder.length else self._given))
                seconds += decoder.seconds
                if seconds * (length - begun) > _MOST_SECONDS * (decoder.length - begun):
                    return False
        except SessionError:
            return False
        return True

    def _random_cache(self, like: Input, work: Workload) -> Array:
        shape = cache_shape(like, work, self._settings.encoder)
        if like.dtype.is_floating_point():
            return self._random.standard_normal(shape, np.float32)
        return np.broadcast_to(np.arange(shape[-1]), shape)  # positions

    def _rows(self, batch: int) -> dict[str, Array]:
        return {name: np.repeat(value, batch, 0) for name, value in self._given.items()}

    def _tokens(self, batch: int, length: int) -> npt.NDArray[np.int64]:
        assert self._files.ids is not None
        return self._random.integers(0, self._files.ids.limit or 2, (batch, length))


class _Prompt:
    """Runs a prompt behind empty caches."""

    def __init__(self, decoder: Decoder, tokens: Array, given: Mapping[str, Array]) -> None:
        self._decoder, self._tokens, self._given = decoder, tokens, given

    def __call__(self) -> float:
        self._decoder.reset()
        self._decoder.run(self._tokens, **self._given)
        return self._decoder.seconds


class _Steps:
    """Runs steps, each behind the one before, and every now and then from the start again."""

    def __init__(self, start: Decoder, token: Array) -> None:
        self._start, self._current, self._token = start, start.fork(), token
        # Caches that have grown by much more would be those of another workload.
        self._longest = start.length + max(1, min(_BLOCK, start.length // 8))

    def __call__(self) -> float:
        if self._current.length >= self._longest:
            self._current = self._start.fork()
        self._current.run(self._token)
        return self._current.seconds
