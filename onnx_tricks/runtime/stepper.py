"""One step of a decoder whose caches are PyTorch tensors, bound where they lie."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from onnx_tricks.errors import ModelError, UsageError
from onnx_tricks.graph.interface import Input, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.runtime.sessions import read_value

__all__ = ["States", "Stepper", "choose_rows"]

States = tuple[tuple[torch.Tensor, ...], ...]
"""The caches, for each layer those that it has; rows of the batch come first."""


class Stepper:
    """Runs a session of ONNX Runtime's; nothing but ids and logits is copied.

    Args:
        path: The .onnx file.
        session: A session with it.

    Attributes:
        has_states: Whether the model has caches, and returns them.

    Raises:
        ModelError: A cache enters, and does not leave again.
    """

    def __init__(self, path: Path, session: Any) -> None:
        interface = read_interface(load_model(path).model)
        self._session = session
        self._inputs = interface.inputs
        self._states = interface.role("cache")
        self._presents = interface.presents
        for state in self._states:
            if state.name not in self._presents:
                raise ModelError(f"{path}: no output continues the cache {state.name}")
        self._logits = session.get_outputs()[0].name
        self.has_states = bool(self._states)
        self._last: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        device: torch.device,
        ids: torch.Tensor,
        past: States | None,
        feeds: Mapping[str, torch.Tensor | None],
        *,
        keep: bool,
    ) -> tuple[torch.Tensor, States | None]:
        """Run new tokens.

        Args:
            device: Where the session runs.
            ids: Token ids, [B, T].
            past: What the step before returned; None for a prompt.
            feeds: Further inputs by name. A mask or positions that are not among them follow from
                the others; what the model does not have is left out.
            keep: Whether to return the caches.

        Returns:
            Logits [B, T, V], and the caches if they are wanted.

        Raises:
            UsageError: An input is missing.
        """
        caches = self._caches(past, ids, device)
        given = {name: tensor for name, tensor in feeds.items() if tensor is not None}
        values = [self._feed(one, ids, caches, given) for one in self._inputs]
        binding = self._session.io_binding()
        held = []
        for like, value in zip(self._inputs, values, strict=True):
            held.append(self._converted(like, value, device))
            _bind(binding.bind_input, like.name, like, held[-1])
        binding.bind_output(self._logits, "cpu")
        presents = {}
        for state in self._states if keep else ():
            shape = list(caches[state.name].shape)
            shape[state.growing] += ids.shape[1]
            presents[state.name] = torch.empty(shape, dtype=_dtype(state), device=device)
            _bind(binding.bind_output, self._presents[state.name], state, presents[state.name])
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        logits = torch.from_numpy(read_value(binding.get_outputs()[0])).to(device)
        return logits, self._by_layer(presents) if keep else None

    def _converted(self, like: Input, value: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A value in the type and place of an input; what comes again is not converted again."""
        before, after = self._last.get(like.name, (None, None))
        if after is None or before is not value or after.device != device:
            after = value.to(device, _dtype(like)).contiguous()
            if like.role == "other":  # the states of an encoder, the same in every step
                self._last[like.name] = value, after
        return after

    def _caches(
        self, past: States | None, ids: torch.Tensor, device: torch.device
    ) -> dict[str, torch.Tensor]:
        names = [state.name for state in self._states]
        if past is not None:
            return dict(zip(names, itertools.chain(*past), strict=True))
        return {
            state.name: torch.empty(state.sized(len(ids)), dtype=_dtype(state), device=device)
            for state in self._states
        }

    def _by_layer(self, tensors: Mapping[str, torch.Tensor]) -> States:
        """Tensors by the names of caches, as in `past_key_values.0.key`, layer by layer."""
        layers = itertools.groupby(tensors, key=lambda name: name.rpartition(".")[0])
        return tuple(tuple(tensors[name] for name in names) for _, names in layers)

    def _feed(
        self,
        like: Input,
        ids: torch.Tensor,
        caches: Mapping[str, torch.Tensor],
        given: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        if like.role == "ids":
            return ids
        if like.name in caches:
            return caches[like.name]
        if like.name in given:
            return given[like.name]
        seen = caches[self._states[0].name].shape[self._states[0].growing] if caches else 0
        total = seen + ids.shape[1]
        if like.role == "mask":
            encoded = given.get("encoder_hidden_states")
            length = total if encoded is None or "encoder" not in like.name else encoded.shape[1]
            return torch.ones(len(ids), length, device=ids.device)
        if like.role == "positions":
            mask = given.get("attention_mask")
            valid = torch.ones(len(ids), total) if mask is None else mask.cpu()
            return torch.from_numpy(like.places(valid.numpy(), ids.shape[1])).to(ids.device)
        raise UsageError(f"the model needs a value for its input {like.name}")


def choose_rows(states: States, rows: torch.Tensor) -> States:
    """Go on with some rows of the batch, as beam search does."""
    return tuple(
        tuple(state.index_select(0, rows.to(state.device)) for state in layer) for layer in states
    )


def _dtype(like: Input) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, like.dtype.numpy().name)
    return dtype


# The runtime wants an address even for a tensor without numbers.
_ANYWHERE = torch.zeros(1)


def _bind(bind: Any, name: str, like: Input, tensor: torch.Tensor) -> None:
    address = tensor.data_ptr() or _ANYWHERE.data_ptr()
    device = tensor.device
    bind(name, device.type, device.index or 0, int(like.dtype), tuple(tensor.shape), address)
