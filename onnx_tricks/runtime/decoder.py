"""A decoder and its caches, run step by step in ONNX Runtime."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_tricks.errors import ModelError, UsageError
from onnx_tricks.graph.interface import Input, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.phases import MERGED, PROMPT, STEP
from onnx_tricks.operators.signature import STATE_KEY
from onnx_tricks.runtime.buffers import Buffers
from onnx_tricks.runtime.library import find_library
from onnx_tricks.runtime.rows import RowPicker
from onnx_tricks.runtime.sessions import (
    Array,
    load_runtime,
    read_value,
    running,
    session_options,
)

__all__ = ["Decoder", "find_decoder"]

Tokens = npt.NDArray[np.int64]
_FILES = (("model.onnx",), (MERGED,), (PROMPT, STEP), (PROMPT,))
_ENCODER_MASK = "encoder_attention_mask"


class Decoder:
    """A decoder with whatever caches its file declares: as exported, or slim.

    What a step appends to the caches stays in ONNX Runtime's memory, on the device: outputs of one
    step are bound as inputs of the next.

    Args:
        model: The .onnx file; or a folder with a model.onnx, a decoder_model_merged.onnx, or a
            decoder_model.onnx, which a decoder_with_past_model.onnx may follow in the steps.
        providers: ONNX Runtime's execution providers; the first that is available is used.
        options: ONNX Runtime's session options; None for those of `session_options`.

    Attributes:
        length: Number of tokens in the caches.
        seconds: How long ONNX Runtime took for the last step, making its outputs included.

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
        native = options is None and find_library() is not None
        self._phases = _open(
            find_decoder(Path(model)), options or session_options(), list(providers)
        )
        self._inputs = {name: one for phase in self._phases for name, one in phase.inputs.items()}
        session = self._phases[0].session
        provider = session.get_providers()[0]
        settings = session.get_provider_options()[provider]
        kind = "cuda" if provider.startswith(("CUDA", "Tensorrt")) else "cpu"
        self._device = kind, int(settings.get("device_id", 0))
        self._pick = RowPicker(provider, self._device)
        shared = self._phases[-1].shared if native else {}
        self._buffers = Buffers(shared, self._pick, self._device)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens, and what was given with them."""
        self.length, self.seconds = 0, 0.0
        self._reserved = 0
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
        return read_value(self.run(tokens, mask, **others))

    def run(
        self, tokens: npt.ArrayLike, mask: npt.ArrayLike | None = None, **others: npt.ArrayLike
    ) -> Any:
        """Do what `step` does, and return the `OrtValue` of the logits, which need not be read."""
        ids = np.asarray(tokens, dtype=np.int64)
        new = np.ones_like(ids) if mask is None else np.asarray(mask, dtype=np.int64)
        if ids.ndim != 2 or new.shape != ids.shape:
            raise UsageError(f"tokens {ids.shape} and mask {new.shape} are both to be [B, T]")
        if self._mask is not None and len(self._mask) != len(ids):
            raise UsageError(f"{len(ids)} rows of tokens, but {len(self._mask)} in the caches")
        self._give(others)
        seen = new if self._mask is None else np.concatenate([self._mask, new], axis=1)
        phase = self._phases[-1 if self.length else 0]
        with running():
            results = self._run(phase, ids, seen)
        self._caches = self._caches | {
            past: results[present]
            for past, present in phase.presents.items()
            # A merged decoder computes cross caches once, and returns empty ones after that.
            if not self.length or ".encoder." not in past
        }
        self._mask = seen
        self.length += ids.shape[1]
        return results[phase.outputs[0]]

    def reserve(self, length: int) -> None:
        """Make room for a number of tokens in all, where caches are buffers; else do nothing.

        Caches are buffers, to which a step appends without a copy of what is there, in a slim
        model that allows it, run by the native operators.
        """
        self._reserved = length

    def resume(
        self, caches: Mapping[str, npt.ArrayLike], mask: npt.ArrayLike, **others: npt.ArrayLike
    ) -> None:
        """Begin behind tokens whose caches are there already, instead of with a prompt.

        Args:
            caches: All of them, [B, ...], by the names of the inputs.
            mask: [B, P], 1 for tokens and 0 for padding.
            **others: As for `step`.
        """
        self.reset()
        self._give(others)
        self._caches = {
            name: self._value(np.asarray(array), self._inputs[name])
            for name, array in caches.items()
        }
        self._mask = np.asarray(mask, dtype=np.int64)
        self.length = self._mask.shape[1]

    def fork(self) -> Self:
        """Another decoder with the same tokens behind it; sessions are shared."""
        other = copy.copy(self)
        # A step replaces the state and never changes it, but for buffers.
        self._caches = self._buffers.copied(self._caches, self.length)
        return other

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
            value = self._value(np.asarray(array), self._inputs[name])
            self._given = {**self._given, name: value}

    def _run(self, phase: _Phase, ids: Tokens, mask: Tokens) -> dict[str, Any]:
        binding = phase.session.io_binding()
        # The binding refers to memory that these hold.
        feeds = {name: self._feed(like, ids, mask) for name, like in phase.inputs.items()}
        feeds |= self._buffers.fitting(
            self._caches, len(ids), self.length, ids.shape[1], reserved=self._reserved
        )
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        appended = {phase.presents[name]: feeds[name] for name in self._buffers.inputs}
        for name in phase.outputs:
            if name in appended:
                binding.bind_ortvalue_output(name, appended[name])
            else:
                # The runtime makes new memory, for longer caches too.
                device = self._device if name != phase.outputs[0] else ("cpu", 0)
                binding.bind_output(name, *device)
        start = time.perf_counter()
        phase.session.run_with_iobinding(binding)
        self.seconds = time.perf_counter() - start
        return dict(zip(phase.outputs, binding.get_outputs(), strict=True))

    def _feed(self, like: Input, ids: Tokens, mask: Tokens) -> Any:
        """The value of an input, as the runtime holds it."""
        if like.name in self._given:
            return self._given[like.name]
        if like.name in self._caches:
            return self._caches[like.name]
        if like.role == "ids":
            return self._value(ids, like)
        if like.role == "mask" and like.name != _ENCODER_MASK:
            return self._value(mask, like)
        if like.role == "positions":
            return self._value(like.places(mask, ids.shape[1]), like)
        if like.role == "branch":
            return self._value(np.array([self.length > 0]), like)
        if like.role == "cache":
            return self._runtime.OrtValue.ortvalue_from_shape_and_type(
                like.sized(len(ids)), int(like.dtype), *self._device
            )
        raise UsageError(f"the model needs a value for its input {like.name}")

    def _value(self, array: Array, like: Input) -> Any:
        """An array as the runtime holds it, in the type of an input."""
        typed = np.asarray(array, dtype=like.dtype.numpy(), order="C")  # which keeps a number one
        if like.dtype != ir.DataType.BFLOAT16:
            return self._runtime.OrtValue.ortvalue_from_numpy(typed, *self._device)
        # The runtime reads the array's own memory, so that must live as long.
        self._held = [*self._held, typed]
        return self._runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            typed.view(np.uint16), int(like.dtype)
        )


@dataclasses.dataclass(frozen=True)
class _Phase:
    """What runs a prompt, or a step, or both: a session, and how its outputs feed the caches."""

    session: Any
    inputs: Mapping[str, Input]
    presents: Mapping[str, str]
    shared: Mapping[str, Input] = dataclasses.field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        return [output.name for output in self.session.get_outputs()]


def _open(paths: Sequence[Path], options: Any, providers: list[str]) -> list[_Phase]:
    """Open the one file of a decoder, or that of the prompt and that of the steps."""
    models = [load_model(path).model for path in paths]
    interfaces = [read_interface(model) for model in models]
    if not interfaces[0].role("ids"):
        raise ModelError(f"{paths[0]}: no input takes token ids, so it is no decoder")
    phases = []
    for path, model, interface in zip(paths, models, interfaces, strict=True):
        with running():
            session = load_runtime().InferenceSession(os.fspath(path), options, providers=providers)
        layout = json.loads(model.metadata_props.get(STATE_KEY, "{}"))
        states = interface.role("cache") if layout.get("shared_buffers") else ()
        inputs, shared = ({o.name: o for o in some} for some in (interface.inputs, states))
        phases.append(_Phase(session, inputs, interface.presents, shared))
    if len(phases) > 1:
        # The prompt takes no caches, and returns all that the steps take.
        names = [one.name for one in interfaces[1].role("cache")]
        presents = {name: name.replace("past_key_values", "present") for name in names}
        phases[0] = dataclasses.replace(phases[0], presents=presents)
    return phases


def find_decoder(path: Path) -> Sequence[Path]:
    """Find the file of a decoder, or that of the prompt and that of the steps.

    Args:
        path: A file, which is taken as it is, or a folder as exporters write it.

    Raises:
        ModelError: The folder holds no decoder.
    """
    if not path.is_dir():
        return [path]
    for folder in (path, path / "onnx"):
        for names in _FILES:
            if all((folder / name).is_file() for name in names):
                return [folder / name for name in names]
    known = ", ".join(names[0] for names in _FILES[:-1])
    raise ModelError(f"{path}: the folder holds none of {known}")
