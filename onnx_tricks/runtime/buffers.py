"""Caches as buffers with room for more tokens, to which the native operators append in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnx_tricks.graph.interface import Input
from onnx_tricks.runtime.rows import RowPicker
from onnx_tricks.runtime.sessions import load_runtime

__all__ = ["Buffers"]

_SPARE = 4  # a buffer that nobody reserved is a quarter longer than is needed


class Buffers:
    """Gives every cache a buffer that is long enough.

    Args:
        inputs: The caches, by name.
        pick: Copies tensors on their device.
        device: Kind and number of the device.
    """

    def __init__(
        self, inputs: Mapping[str, Input], pick: RowPicker, device: tuple[str, int]
    ) -> None:
        self.inputs = inputs
        self._pick, self._device = pick, device

    def fitting(
        self, caches: Mapping[str, Any], batch: int, length: int, new: int, *, reserved: int
    ) -> dict[str, Any]:
        """The caches with room for new tokens, copied where they have none.

        Args:
            caches: What there is of them; a cache that is missing is empty.
            batch: B.
            length: Number of tokens in them.
            new: Number of tokens that are to follow.
            reserved: Number of tokens in all that a buffer is made for, if it is to be made.
        """
        needed = length + new
        room = reserved if needed <= reserved else needed + needed // _SPARE
        found = {}
        for name, like in self.inputs.items():
            cache = caches.get(name)
            if cache is None or not length:
                cache = load_runtime().OrtValue.ortvalue_from_shape_and_type(
                    like.sized(batch, room), int(like.dtype), *self._device
                )
            elif cache.shape()[like.growing] < needed:
                cache = self._copy(cache, like.growing, length, room)
            found[name] = cache
        return found

    def copied(self, caches: Mapping[str, Any], length: int) -> dict[str, Any]:
        """The caches, those that are buffers as copies."""
        found = dict(caches)
        for name, like in self.inputs.items():
            if name in found and length:
                size = found[name].shape()[like.growing]
                found[name] = self._copy(found[name], like.growing, length, size)
        return found

    def _copy(self, cache: Any, axis: int, length: int, room: int) -> Any:
        # Behind the tokens may stand anything: the last token again.
        return self._pick(cache, np.minimum(np.arange(room), length - 1), axis)
