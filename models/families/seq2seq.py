"""Families with two sides, an encoder and a decoder that attends to it, for text and speech."""

from __future__ import annotations

from typing import Any

from onnx_tricks.models.families.family import BOTH_SIDES, GPT, SIZES, Family

__all__ = ["SEQ2SEQ"]


def _translate(model: str, **sizes: Any) -> Family:
    return Family(model, "text2text-generation-with-past", sizes)


def _transcribe(model: str, **sizes: Any) -> Family:
    return Family(model, "automatic-speech-recognition-with-past", sizes)


def _describe(model: str, **sizes: Any) -> Family:
    return Family(model, "image-to-text-with-past", {**sizes, **_STARTS})


_STARTS = {"decoder_start_token_id": 0, "pad_token_id": 0}
_T5 = {
    "vocab_size": 97,
    "d_model": 48,
    "d_ff": 80,
    "d_kv": 14,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_SPARSE = {**_T5, "local_radius": 3, "global_block_size": 4}
_ATTENDS = {"is_decoder": True, "add_cross_attention": True}
_BERT = {**SIZES, "model_type": "bert"}
_BERT_DECODER = {**_BERT, **_ATTENDS}
_GPT_DECODER = {**GPT, **_ATTENDS, "model_type": "gpt2"}
_VIT = {**SIZES, "model_type": "vit", "image_size": 24, "patch_size": 8}
_SWIN = {
    "model_type": "donut-swin",
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_TROCR = {
    **_ATTENDS,
    "model_type": "trocr",
    "vocab_size": 97,
    "d_model": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 72,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
}
_MBART_DECODER = {**BOTH_SIDES, **_ATTENDS, "model_type": "mbart", "add_final_layer_norm": True}
_TARGETS = {"max_target_positions": 64, "decoder_start_token_id": 0}
_MOONSHINE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "encoder_num_hidden_layers": 2,
    "decoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "decoder_num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

SEQ2SEQ = {
    "t5": _translate("T5ForConditionalGeneration", **_T5),
    "t5_wide": _translate("T5ForConditionalGeneration", **{**_T5, "d_kv": 96}),
    "t5_gated": _translate(
        "T5ForConditionalGeneration",
        **_T5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "mt5": _translate("MT5ForConditionalGeneration", **_T5),
    "longt5": _translate("LongT5ForConditionalGeneration", **_SPARSE),
    "longt5_global": _translate(
        "LongT5ForConditionalGeneration", **_SPARSE, encoder_attention_type="transient-global"
    ),
    "bart": _translate("BartForConditionalGeneration", **BOTH_SIDES),
    "bart_scaled": _translate("BartForConditionalGeneration", **BOTH_SIDES, scale_embedding=True),
    "mbart": _translate("MBartForConditionalGeneration", **BOTH_SIDES),
    "marian": _translate("MarianMTModel", **BOTH_SIDES, decoder_start_token_id=0),
    "pegasus": _translate("PegasusForConditionalGeneration", **BOTH_SIDES),
    "bigbird_pegasus": _translate(
        "BigBirdPegasusForConditionalGeneration", **BOTH_SIDES, attention_type="original_full"
    ),
    "bigbird_pegasus_biases": _translate(
        "BigBirdPegasusForConditionalGeneration",
        **BOTH_SIDES,
        attention_type="original_full",
        use_bias=True,
    ),
    "blenderbot": _translate("BlenderbotForConditionalGeneration", **BOTH_SIDES),
    "blenderbot-small": _translate("BlenderbotSmallForConditionalGeneration", **BOTH_SIDES),
    "m2m_100": _translate("M2M100ForConditionalGeneration", **BOTH_SIDES),
    "encoder-decoder": _translate(
        "EncoderDecoderModel", encoder=_BERT, decoder=_GPT_DECODER, **_STARTS
    ),
    "encoder-decoder_bert": Family(  # whose decoder Optimum knows without a cache only
        "EncoderDecoderModel",
        "text2text-generation",
        {"encoder": _BERT, "decoder": _BERT_DECODER, **_STARTS},
    ),
    "whisper": _transcribe(
        "WhisperForConditionalGeneration", **BOTH_SIDES, num_mel_bins=20, max_target_positions=64
    ),
    "speech_to_text": _transcribe(
        "Speech2TextForConditionalGeneration",
        **BOTH_SIDES,
        **_TARGETS,
        input_feat_per_channel=20,
        conv_channels=40,
        max_source_positions=400,
    ),
    "moonshine": _transcribe("MoonshineForConditionalGeneration", **_MOONSHINE),
    "moonshine_biases": _transcribe(
        "MoonshineForConditionalGeneration", **_MOONSHINE, attention_bias=True
    ),
    "pix2struct": _describe(
        "Pix2StructForConditionalGeneration",
        text_config={
            "vocab_size": 97,
            "hidden_size": 48,
            "d_kv": 12,
            "d_ff": 80,
            "num_layers": 2,
            "num_heads": 4,
        },
        vision_config={
            "hidden_size": 48,
            "d_kv": 12,
            "d_ff": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "seq_len": 64,
        },
    ),
    "trocr": _describe("VisionEncoderDecoderModel", encoder=_VIT, decoder=_TROCR),
    "donut": _describe("VisionEncoderDecoderModel", encoder=_SWIN, decoder=_MBART_DECODER),
    "vit_gpt2": _describe("VisionEncoderDecoderModel", encoder=_VIT, decoder=_GPT_DECODER),
}
"""The families by their model type in Transformers; a suffix tells a variant."""
