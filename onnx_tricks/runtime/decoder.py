"""A decoder and its caches, run step by step in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_tricks.errors import ModelError, UsageError
from onnx_tricks.graph.interface import Input, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.runtime.rows import RowPicker
from onnx_tricks.runtime.sessions import (
    Array,
    load_runtime,
    read_value,
    running,
    session_options,
)

__all__ = ["Decoder"]

Tokens = npt.NDArray[np.int64]
_FILES = ("model.onnx", "decoder_model_merged.onnx", "decoder_model.onnx")
_ENCODER_MASK = "encoder_attention_mask"


class Decoder:
    """A decoder with whatever caches its file declares: as exported, or slim.

    What a step appends to the caches stays in ONNX Runtime's memory, on the device: outputs of one
    step are bound as inputs of the next.

    Args:
        model: The .onnx file, or a folder with a model.onnx or decoder_model.onnx.
        providers: ONNX Runtime's execution providers; the first that is available is used.
        options: ONNX Runtime's session options; None for those of `session_options`.

    Attributes:
        length: Number of tokens in the caches.

    Raises:
        ModelError: The model is broken, or no decoder.
        SessionError: ONNX Runtime refuses the model.
        UsageError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: Any = None,
    ) -> None:
        self._runtime = load_runtime()
        path = _find(Path(model))
        interface = read_interface(load_model(path).model)
        if not interface.role("ids"):
            raise ModelError(f"{path}: no input takes token ids, so it is no decoder")
        self._ids = interface.role("ids")[0].name
        self._inputs = {one.name: one for one in interface.inputs}
        self._presents = interface.presents
        with running():
            self._session = self._runtime.InferenceSession(
                os.fspath(path), options or session_options(), providers=list(providers)
            )
        self._outputs = [output.name for output in self._session.get_outputs()]
        provider = self._session.get_providers()[0]
        settings = self._session.get_provider_options()[provider]
        kind = "cuda" if provider.startswith(("CUDA", "Tensorrt")) else "cpu"
        self._device = kind, int(settings.get("device_id", 0))
        self._pick = RowPicker(provider, self._device)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens, and what was given with them."""
        self.length = 0
        self._mask: Tokens | None = None
        self._caches: dict[str, Any] = {}
        self._given: dict[str, Any] = {}
        self._held: list[Array] = []

    def step(
        self, tokens: npt.ArrayLike, mask: npt.ArrayLike | None = None, **others: npt.ArrayLike
    ) -> Array:
        """Run new tokens through the decoder, behind those in its caches.

        Args:
            tokens: Token ids, [B, T].
            mask: [B, T], 1 for tokens and 0 for padding; all tokens when None.
            **others: Further inputs of the model, such as `encoder_hidden_states`; each holds for
                all steps until it is given anew.

        Returns:
            The model's first output, its logits, [B, T, V]; float32 where it is bfloat16.

        Raises:
            SessionError: ONNX Runtime fails.
            UsageError: An input is missing or unknown, or shapes do not go together.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        new = np.ones_like(ids) if mask is None else np.asarray(mask, dtype=np.int64)
        if ids.ndim != 2 or new.shape != ids.shape:
            raise UsageError(f"tokens {ids.shape} and mask {new.shape} are both to be [B, T]")
        if self._mask is not None and len(self._mask) != len(ids):
            raise UsageError(f"{len(ids)} rows of tokens, but {len(self._mask)} in the caches")
        self._give(others)
        seen = new if self._mask is None else np.concatenate([self._mask, new], axis=1)
        with running():
            results = self._run(ids, seen)
        self._caches |= {
            past: results[present]
            for past, present in self._presents.items()
            # A merged decoder computes cross caches once, and returns empty ones after that.
            if not self.length or ".encoder." not in past
        }
        self._mask = seen
        self.length += ids.shape[1]
        return read_value(results[self._outputs[0]])

    def reorder(self, rows: npt.ArrayLike) -> None:
        """Go on with some rows of the batch, in any order and repeated, as beam search does.

        Args:
            rows: Indices of rows, [B'].
        """
        index = np.asarray(rows, dtype=np.int64)
        with running():
            self._caches = {name: self._pick(one, index) for name, one in self._caches.items()}
            self._given = {name: self._pick(one, index) for name, one in self._given.items()}
        self._mask = None if self._mask is None else self._mask[index]

    def _give(self, others: Mapping[str, npt.ArrayLike]) -> None:
        for name, array in others.items():
            if name not in self._inputs:
                known = ", ".join(n for n, one in self._inputs.items() if one.role != "cache")
                raise UsageError(f"the model has no input {name!r}; its inputs are {known}")
            self._given[name] = self._value(np.asarray(array), self._inputs[name])

    def _run(self, ids: Tokens, mask: Tokens) -> dict[str, Any]:
        binding = self._session.io_binding()
        for name, like in self._inputs.items():
            binding.bind_ortvalue_input(name, self._feed(like, ids, mask))
        for name in self._outputs:
            # The runtime makes new memory for the longer caches; an operator that appends in
            # place would be given theirs here.
            device = self._device if name != self._outputs[0] else ("cpu", 0)
            binding.bind_output(name, *device)
        self._session.run_with_iobinding(binding)
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def _feed(self, like: Input, ids: Tokens, mask: Tokens) -> Any:
        """The value of an input, as the runtime holds it."""
        if like.name in self._given:
            return self._given[like.name]
        if like.name in self._caches:
            return self._caches[like.name]
        if like.name == self._ids:
            return self._value(ids, like)
        if like.role == "mask" and like.name != _ENCODER_MASK:
            return self._value(mask, like)
        if like.role == "positions":
            positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
            in_row = np.arange(mask.shape[1]) if len(like.dims) == 1 else positions
            return self._value(in_row[..., -ids.shape[1] :], like)
        if like.role == "branch":
            return self._value(np.array([self.length > 0]), like)
        if like.role == "cache":
            shape = [len(ids), *(d if isinstance(d, int) else 0 for d in like.dims[1:])]
            return self._runtime.OrtValue.ortvalue_from_shape_and_type(
                shape, int(like.dtype), *self._device
            )
        raise UsageError(f"the model needs a value for its input {like.name}")

    def _value(self, array: Array, like: Input) -> Any:
        """An array as the runtime holds it, in the type of an input."""
        typed = np.ascontiguousarray(array, dtype=like.dtype.numpy())
        if like.dtype != ir.DataType.BFLOAT16:
            return self._runtime.OrtValue.ortvalue_from_numpy(typed, *self._device)
        # The runtime reads the array's own memory, so that must live as long.
        self._held.append(typed)
        return self._runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            typed.view(np.uint16), int(like.dtype)
        )


def _find(path: Path) -> Path:
    if not path.is_dir():
        return path
    for folder in (path, path / "onnx"):
        for name in _FILES:
            if (folder / name).is_file():
                return folder / name
    raise ModelError(f"{path}: the folder holds none of {', '.join(_FILES)}")
