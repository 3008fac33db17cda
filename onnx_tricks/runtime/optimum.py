"""Optimum's classes for generation, for folders with slim models.

They bear the names of those of `optimum.onnxruntime`, so that one import line changes:

    from onnx_tricks.runtime.optimum import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained("slim")
    model.generate(**inputs, num_beams=3)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx_tricks.errors import UsageError
from onnx_tricks.runtime.sessions import session_options

try:
    import torch
    from optimum.onnxruntime import modeling, modeling_decoder, modeling_seq2seq
    from optimum.onnxruntime.constants import (
        DECODER_ONNX_FILE_PATTERN,
        ONNX_DECODER_MERGED_NAME,
        ONNX_DECODER_NAME,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput
except ImportError as error:
    raise UsageError(
        "onnx_tricks.runtime.optimum needs Optimum and PyTorch, which are not installed: "
        "pip install onnx-tricks[cpu,optimum] (or onnx-tricks[gpu,optimum])"
    ) from error

from onnx_tricks.runtime.stepper import States, Stepper, choose_rows

__all__ = ["ORTModelForCausalLM", "ORTModelForSeq2SeqLM", "ORTModelForSpeechSeq2Seq"]


class _Slim(modeling.ORTModel):
    """What the classes have in common."""

    @classmethod
    def _from_pretrained(cls, model_id: str | Path, config: Any, **kwargs: Any) -> Any:
        if kwargs.get("session_options") is None:
            kwargs["session_options"] = session_options()
        return super()._from_pretrained(model_id, config, **kwargs)

    @classmethod
    def _export(cls, model_id: str | Path, *_: Any, **__: Any) -> Any:
        raise UsageError(
            f"{model_id}: export it first with onnx_tricks.export or `onnx-tricks export MODEL OUT`"
        )

    @staticmethod
    def _reorder_cache(past_key_values: States, beam_idx: torch.Tensor) -> States:
        return choose_rows(past_key_values, beam_idx)


class ORTModelForCausalLM(_Slim, modeling_decoder.ORTModelForCausalLM):
    """A decoder with whatever caches its file declares, for `generate()`.

    Arguments and methods are those of the class of the same name in `optimum.onnxruntime`.
    Inputs and outputs are always bound where they lie, so `use_io_binding` changes nothing.
    """

    def __init__(self, *, generation_config: Any = None, **kwargs: Any) -> None:
        # Optimum's own constructor knows keys and values only, and would warn of their absence.
        super(modeling_decoder.ORTModelForCausalLM, self).__init__(**kwargs)
        self.generation_config = generation_config
        self._stepper = Stepper(self.path, self.session)
        self.can_use_cache = self._stepper.has_states
        self.is_merged = False

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: States | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Run new tokens behind those in the caches.

        Args:
            input_ids: Token ids, [B, T].
            attention_mask: [B, P + T], 1 for tokens and 0 for padding.
            past_key_values: The caches, with P tokens.
            position_ids: [B, T]; counted by the mask when None.
            use_cache: Whether to return the caches; as the config says when None.

        Returns:
            Logits [B, T, V] and caches.
        """
        logits, states = self._stepper(
            self.device,
            input_ids,
            past_key_values,
            {"attention_mask": attention_mask, "position_ids": position_ids},
            keep=self.config.use_cache if use_cache is None else use_cache,
        )
        return CausalLMOutputWithPast(logits=logits, past_key_values=states)


class _Decoder(modeling_seq2seq.ORTDecoderForSeq2Seq):
    """The decoder of a model with two sides: one file for prompts and steps."""

    def __init__(self, config: Any, session: Any, use_io_binding: bool | None = None) -> None:
        self.config = config
        self.initialize_ort_attributes(session, use_io_binding)
        self._stepper = Stepper(self.path, session)
        self.can_use_cache = self._stepper.has_states
        self.is_merged = False

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: States | None = None,
        cache_position: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Seq2SeqLMOutput:
        logits, states = self._stepper(
            self.device,
            input_ids,
            past_key_values,
            {
                "attention_mask": attention_mask,
                "decoder_attention_mask": attention_mask,
                "encoder_hidden_states": encoder_hidden_states,
                "encoder_attention_mask": encoder_attention_mask,
                "cache_position": cache_position,
            },
            keep=bool(use_cache),
        )
        return Seq2SeqLMOutput(logits=logits, past_key_values=states)


class _OneDecoder(_Slim):
    """Models with two sides whose one decoder file stands where Optimum has up to three."""

    _ort_decoder_class = _Decoder

    @classmethod
    def _infer_file_path(cls, pattern: str, **kwargs: Any) -> Path:
        # Optimum looks for a merged decoder first, the only kind that it takes for both phases.
        if kwargs["standard_file_name"] == ONNX_DECODER_MERGED_NAME:
            pattern, kwargs["standard_file_name"] = DECODER_ONNX_FILE_PATTERN, ONNX_DECODER_NAME
        path: Path = super()._infer_file_path(pattern, **kwargs)
        return path


class ORTModelForSeq2SeqLM(_OneDecoder, modeling_seq2seq.ORTModelForSeq2SeqLM):
    """An encoder and a slim decoder for text, for `generate()`.

    Arguments and methods are those of the class of the same name in `optimum.onnxruntime`.
    """


class ORTModelForSpeechSeq2Seq(_OneDecoder, modeling_seq2seq.ORTModelForSpeechSeq2Seq):
    """An encoder and a slim decoder for speech, for `generate()`.

    Arguments and methods are those of the class of the same name in `optimum.onnxruntime`.
    """

    @classmethod
    def _from_pretrained(cls, model_id: str | Path, config: Any, **kwargs: Any) -> Any:
        # Optimum's own class would go on to Optimum's Whisper.
        chosen = _Whisper if config.model_type == "whisper" else cls
        return super(ORTModelForSpeechSeq2Seq, chosen)._from_pretrained(model_id, config, **kwargs)


class _Whisper(ORTModelForSpeechSeq2Seq, modeling_seq2seq.ORTModelForWhisper):
    """Whisper, which writes by rules of its own."""
