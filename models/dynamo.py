"""Models cut into graphs that `torch.onnx.export` takes: plain tensors in, plain tensors out."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel

from onnx_tricks.errors import UsageError

__all__ = ["Graph", "graphs"]

_BATCH, _LENGTH, _PAST = 2, 7, 5  # of the examples; all are dynamic in the export

# A Dim ties the axes that carry it together; a plain name leaves its axis free.
_Axes = Mapping[int, Dim | str]
_BATCH_AXIS = Dim("batch")
_TEXT: _Axes = {0: _BATCH_AXIS, 1: Dim("sequence")}


@dataclasses.dataclass(frozen=True)
class Graph:
    """One graph to export.

    Attributes:
        name: The stem of the file.
        module: Takes the inputs in order, as ``*args``, and returns the outputs.
        inputs: By name an example and its dynamic axes.
        outputs: Names of the outputs.
    """

    name: str
    module: torch.nn.Module
    inputs: Mapping[str, tuple[torch.Tensor, _Axes]]
    outputs: list[str]


def graphs(model: PreTrainedModel, *, cache: bool = False) -> list[Graph]:
    """Cuts a model into its graphs.

    Args:
        model: A decoder, a text or image encoder, or a model with two sides.
        cache: For a decoder, take and return the key/value cache as ``past_key_values.{layer}.key``
            and ``present.{layer}.key``, each ``[batch, heads, length, head size]``.

    Returns:
        One graph ``model``, or ``encoder_model`` and ``decoder_model``.

    Raises:
        UsageError: A cache is asked for, and the model has none, or one that holds other states.
    """
    if model.config.is_encoder_decoder:
        return [_encoder(model), _decoder(model)]
    if model.main_input_name == "pixel_values":
        return [_image(model)]
    return [_cached_text(model) if cache else _text(model)]


class _Module(torch.nn.Module):
    """A function of a model and tensors, as a module."""

    def __init__(self, model: PreTrainedModel, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self.model, *inputs)


def _image(model: PreTrainedModel) -> Graph:
    def logits(model: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values).logits

    channels, size = model.config.num_channels, model.config.image_size
    example = torch.zeros(_BATCH, channels, size, size, dtype=model.dtype)
    inputs = {"pixel_values": (example, {0: _BATCH_AXIS})}
    return Graph("model", _Module(model, logits), inputs, ["logits"])


def _text(model: PreTrainedModel) -> Graph:
    options = {"use_cache": False} if model.can_generate() else {}

    def logits(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(ids, attention_mask=mask, **options).logits

    inputs = {"input_ids": (_tokens(_LENGTH), _TEXT), "attention_mask": (_tokens(_LENGTH), _TEXT)}
    return Graph("model", _Module(model, logits), inputs, ["logits"])


def _cached_text(model: PreTrainedModel) -> Graph:
    def step(
        model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, *past: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        output = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return (output.logits, *_cached(cache))

    past = _cached(_past(model))
    names = [f"{i // 2}.{('key', 'value')[i % 2]}" for i in range(len(past))]
    inputs: dict[str, tuple[torch.Tensor, _Axes]] = {
        "input_ids": (_tokens(_LENGTH), _TEXT),
        "attention_mask": (_tokens(_PAST + _LENGTH), {0: _BATCH_AXIS, 1: "total_sequence"}),
    }
    axes: _Axes = {0: _BATCH_AXIS, 2: "past"}
    inputs |= {
        f"past_key_values.{name}": (torch.zeros_like(one), axes)
        for name, one in zip(names, past, strict=True)
    }
    outputs = ["logits", *(f"present.{name}" for name in names)]
    return Graph("model", _Module(model, step), inputs, outputs)


def _past(model: PreTrainedModel) -> DynamicCache:
    """A cache with states of the shapes that the model makes."""
    takes = inspect.signature(model.forward).parameters
    with torch.no_grad():
        output = model(_tokens(_PAST), **({"use_cache": True} if "use_cache" in takes else {}))
    cache = output.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    if not isinstance(cache, DynamicCache):
        raise UsageError(f"{type(model).__name__} has no cache that holds keys and values alone.")
    return cache


def _cached(cache: DynamicCache) -> list[torch.Tensor]:
    """Keys and values of the layers, in turn."""
    return [one for layer in cache.layers for one in (layer.keys, layer.values)]


def _encoder(model: PreTrainedModel) -> Graph:
    def states(model: PreTrainedModel, source: torch.Tensor) -> torch.Tensor:
        return model.get_encoder()(source).last_hidden_state

    if model.main_input_name == "input_features":  # audio: the positions are fixed
        length = 2 * model.config.max_source_positions
        example = torch.zeros(_BATCH, model.config.num_mel_bins, length, dtype=model.dtype)
        inputs: dict[str, tuple[torch.Tensor, _Axes]] = {
            "input_features": (example, {0: _BATCH_AXIS})
        }
    else:
        inputs = {"input_ids": (_tokens(_LENGTH), _TEXT)}
    return Graph("encoder_model", _Module(model, states), inputs, ["last_hidden_state"])


def _decoder(model: PreTrainedModel) -> Graph:
    def logits(
        model: PreTrainedModel, ids: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        states = (encoder_hidden_states,)
        return model(decoder_input_ids=ids, encoder_outputs=states, use_cache=False).logits

    states = torch.zeros(_BATCH, _LENGTH, model.config.d_model, dtype=model.dtype)
    inputs: dict[str, tuple[torch.Tensor, _Axes]] = {
        "input_ids": (_tokens(_PAST), _TEXT),
        "encoder_hidden_states": (states, {0: _BATCH_AXIS, 1: "source"}),
    }
    return Graph("decoder_model", _Module(model, logits), inputs, ["logits"])


def _tokens(length: int) -> torch.Tensor:
    return torch.ones(_BATCH, length, dtype=torch.long)
