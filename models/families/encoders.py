"""Text encoders."""

from __future__ import annotations

from typing import Any

from onnx_tricks.models.families.family import SIZES, Family

__all__ = ["ENCODERS"]


def _masked(model: str, **own: Any) -> Family:
    return Family(model, "fill-mask", {**SIZES, **own})


def _labelled(model: str, **own: Any) -> Family:
    return Family(model, "token-classification", {**SIZES, **own})


_XLM = {"vocab_size": 97, "emb_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
_ESM = {"pad_token_id": 1, "mask_token_id": 96}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_NARROW = {"embedding_size": 32}  # the table is narrower than the stream
_MOBILE = {**_NARROW, "intra_bottleneck_size": 24, "num_feedforward_networks": 2}
_PAGE = {"max_2d_position_embeddings": 128}
_PERCEIVER = {
    "vocab_size": 97,
    "d_model": 40,
    "d_latents": 48,
    "num_latents": 6,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 2,
    "qk_channels": 32,
    "v_channels": 48,
    "max_position_embeddings": 64,
}

ENCODERS = {
    "bert": _masked("BertForMaskedLM"),
    "bert_classes": Family("BertForSequenceClassification", "text-classification", SIZES),
    "roberta": _masked("RobertaForMaskedLM"),
    "distilbert": _masked("DistilBertForMaskedLM", dim=48, hidden_dim=80, n_layers=2, n_heads=4),
    "albert": _masked("AlbertForMaskedLM", embedding_size=32),
    "big_bird": _masked("BigBirdForMaskedLM", attention_type="original_full"),
    "camembert": _masked("CamembertForMaskedLM"),
    "convbert": _masked("ConvBertForMaskedLM", **_NARROW, conv_kernel_size=5),
    "convbert_groups": _masked("ConvBertForMaskedLM", **_NARROW, conv_kernel_size=5, num_groups=2),
    "data2vec-text": _masked("Data2VecTextForMaskedLM"),
    "deberta": _masked("DebertaForMaskedLM", **_RELATIVE, position_biased_input=False),
    "deberta_absolute": _masked("DebertaForMaskedLM", type_vocab_size=2),
    "deberta-v2": _masked(
        "DebertaV2ForMaskedLM",
        **_RELATIVE,
        position_biased_input=False,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
    ),
    "deberta-v2_conv": _masked("DebertaV2ForMaskedLM", **_RELATIVE, conv_kernel_size=3),
    "electra": _masked("ElectraForMaskedLM", **_NARROW),
    "esm": _masked("EsmForMaskedLM", **_ESM, emb_layer_norm_before=True),
    "esm_rotary": _masked(
        "EsmForMaskedLM", **_ESM, position_embedding_type="rotary", token_dropout=True
    ),
    "flaubert": Family("FlaubertWithLMHeadModel", "fill-mask", _XLM),
    "flaubert_pre_norm": Family("FlaubertWithLMHeadModel", "fill-mask", {**_XLM, "pre_norm": True}),
    "ibert": _masked("IBertForMaskedLM"),
    "layoutlm": _masked("LayoutLMForMaskedLM", **_PAGE),
    "lilt": _labelled("LiltForTokenClassification", **_PAGE, channel_shrink_ratio=2),
    "longformer": _masked("LongformerForMaskedLM", attention_window=8, onnx_export=True),
    "markuplm": _labelled("MarkupLMForTokenClassification", xpath_unit_hidden_size=8, max_depth=5),
    "megatron-bert": _masked("MegatronBertForMaskedLM"),
    "mobilebert": _masked("MobileBertForMaskedLM", **_MOBILE),
    "mobilebert_layer_norm": _masked(
        "MobileBertForMaskedLM", **_MOBILE, normalization_type="layer_norm"
    ),
    "modernbert": _masked("ModernBertForMaskedLM", pad_token_id=0, local_attention=8),
    "modernbert_biases": _masked(
        "ModernBertForMaskedLM",
        pad_token_id=0,
        local_attention=8,
        global_attn_every_n_layers=2,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    ),
    "mpnet": _masked("MPNetForMaskedLM"),
    "nystromformer": _masked("NystromformerForMaskedLM", conv_kernel_size=5),
    "nystromformer_landmarks": _masked(
        "NystromformerForMaskedLM", conv_kernel_size=5, num_landmarks=4, segment_means_seq_len=16
    ),
    "perceiver": Family("PerceiverForMaskedLM", "fill-mask", _PERCEIVER),
    "perceiver_classes": Family(
        "PerceiverForSequenceClassification", "text-classification", _PERCEIVER
    ),
    "rembert": _masked("RemBertForMaskedLM", input_embedding_size=32, output_embedding_size=56),
    "roformer": _masked("RoFormerForMaskedLM", **_NARROW),
    "roformer_values": _masked("RoFormerForMaskedLM", embedding_size=48, rotary_value=True),
    "splinter": Family("SplinterForQuestionAnswering", "question-answering", SIZES),
    "squeezebert": _masked("SqueezeBertForMaskedLM", embedding_size=48),
    "xlm": Family("XLMWithLMHeadModel", "fill-mask", _XLM),
    "xlm-roberta": _masked("XLMRobertaForMaskedLM"),
}
"""The families by their model type in Transformers; a suffix tells a variant."""
