"""Models cut into graphs that `torch.onnx.export` takes: plain tensors in, plain tensors out."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from onnx_tricks.errors import UsageError
from onnx_tricks.models.preprocessors import image_size

__all__ = ["Graph", "graphs", "tensors_of"]

_BATCH, _LENGTH, _PAST = 2, 7, 5  # of the examples; all are dynamic in the export
_FRAMES, _SAMPLES = 40, 4000  # of sound

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
        model: A decoder, a model that is run once, or one with two sides that generates text.
        cache: For a decoder, take and return the key/value cache as ``past_key_values.{layer}.key``
            and ``present.{layer}.key``, each ``[batch, heads, length, head size]``.

    Returns:
        One graph ``model``, or ``encoder_model`` and ``decoder_model``.

    Raises:
        UsageError: A cache is asked for, and the model has none, or one that holds other states.
    """
    if model.config.is_encoder_decoder and model.can_generate():
        return [_encoder(model), _decoder(model)]
    return [_cached_text(model) if cache else _whole(model)]


class _Module(torch.nn.Module):
    """A function of a model and tensors, as a module."""

    def __init__(self, model: PreTrainedModel, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self.model, *inputs)


def _whole(model: PreTrainedModel) -> Graph:
    inputs, options = _inputs(model), {}
    if model.can_generate() and "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False

    def run(model: PreTrainedModel, *given: torch.Tensor) -> dict[str, torch.Tensor]:
        return tensors_of(model(**dict(zip(inputs, given, strict=True)), **options))

    def tensors(model: PreTrainedModel, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(run(model, *given).values())

    with torch.no_grad():
        names = list(run(model, *(example for example, _ in inputs.values())))
    return Graph("model", _Module(model, tensors), inputs, names)


def tensors_of(output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The outputs of a model that are tensors, or tensors of an answer in several parts."""
    found: dict[str, torch.Tensor] = {}
    for name, one in output.items():
        if isinstance(one, torch.Tensor):
            found[name] = one
        elif name == "logits":
            found |= {f"{name}.{index}": part for index, part in enumerate(one)}
    return found


def _inputs(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, _Axes]]:
    """Examples and their dynamic axes; the size of images and of windows in time is fixed."""
    config, dtype = model.config, model.dtype
    fixed: _Axes = {0: _BATCH_AXIS}
    longer: _Axes = {0: _BATCH_AXIS, 1: "length"}
    shape: tuple[int, ...]
    match model.main_input_name:
        case "pixel_values" as name:
            shape, axes = (3, *image_size(config)), fixed
        case "past_values" as name:
            shape, axes = (config.context_length, config.num_input_channels), fixed
        case "input_features" as name if hasattr(config, "num_mel_bins"):
            shape, axes = (config.num_mel_bins, 2 * config.max_source_positions), fixed
        case "input_features" as name:
            shape, axes = (_FRAMES, config.input_feat_per_channel), longer
        case "input_values" as name:
            shape, axes = (_SAMPLES,), longer
        case "flattened_patches" as name:  # each behind its row and column
            shape, axes = (_LENGTH, 2 + config.vision_config.patch_embed_hidden_size), longer
        case "states":
            widths = {"states": config.state_dim, "actions": config.act_dim, "returns_to_go": 1}
            return {
                name: (torch.zeros(_BATCH, _LENGTH, width, dtype=dtype), _TEXT)
                for name, width in widths.items()
            } | {"timesteps": (_tokens(_LENGTH), _TEXT)}
        case _:
            return {name: (_tokens(_LENGTH), _TEXT) for name in ("input_ids", "attention_mask")}
    return {name: (torch.zeros(_BATCH, *shape, dtype=dtype), axes)}


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
    inputs = _inputs(model)

    def states(model: PreTrainedModel, *given: torch.Tensor) -> torch.Tensor:
        return model.get_encoder()(**dict(zip(inputs, given, strict=True))).last_hidden_state

    return Graph("encoder_model", _Module(model, states), inputs, ["last_hidden_state"])


def _decoder(model: PreTrainedModel) -> Graph:
    def logits(
        model: PreTrainedModel,
        ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        states = BaseModelOutput(encoder_hidden_states)
        options = {} if mask is None else {"attention_mask": mask}
        output = model(decoder_input_ids=ids, encoder_outputs=states, use_cache=False, **options)
        return output.logits

    encoder = _encoder(model)
    with torch.no_grad():
        width = encoder.module(*(example for example, _ in encoder.inputs.values())).shape[-1]
    states = torch.zeros(_BATCH, _LENGTH, width, dtype=model.dtype)
    source: _Axes = {0: _BATCH_AXIS, 1: Dim("source")}
    inputs: dict[str, tuple[torch.Tensor, _Axes]] = {
        "input_ids": (_tokens(_PAST), {0: _BATCH_AXIS, 1: "sequence"}),
        "encoder_hidden_states": (states, source),
    }
    if "attention_mask" in encoder.inputs:
        inputs["encoder_attention_mask"] = (_tokens(_LENGTH), source)
    return Graph("decoder_model", _Module(model, logits), inputs, ["logits"])


def _tokens(length: int) -> torch.Tensor:
    return torch.ones(_BATCH, length, dtype=torch.long)
