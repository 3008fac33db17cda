"""Text decoders: families that continue a text, with self-attention alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnx_tricks.models.families.family import CAUSAL, EXPERTS, GPT, GROUPED, SIZES, Family

__all__ = ["DECODERS"]

_HEADS = {"num_key_value_heads": 4}  # as many as query heads
_WIDE = {**GROUPED, "head_dim": 16}  # heads that do not add up to the width

# ONNX Runtime's fused attention, which the genai builder writes, rotates multiples of 16 channels.
_FUSED = {**SIZES, "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}
_FUSED_HEADS = {**SIZES, "num_attention_heads": 3, "num_key_value_heads": 3}
_HALVED = {**_FUSED, "num_attention_heads": 3, "num_key_value_heads": 1}  # of 32, half rotated
_HALVED_HEADS = {**_HALVED, "num_key_value_heads": 3}
_BIASED = {"attention_bias": True, "mlp_bias": True}
_HALF = {"partial_rotary_factor": 0.5}
_LATENT = {
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
_MPT = {"vocab_size": 97, "d_model": 48, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}
_FALCON = {**SIZES, "ffn_hidden_size": 80, "bias": True}
_LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def _causal(model: str, *sizes: Mapping[str, Any], **own: Any) -> Family:
    merged = {key: value for part in sizes or (SIZES,) for key, value in part.items()}
    return Family(model, CAUSAL, {**merged, "pad_token_id": 0, **own})


_ROTARY = {
    "apertus": _causal("ApertusForCausalLM", SIZES, GROUPED, attention_bias=True),
    "apertus_heads": _causal("ApertusForCausalLM", SIZES, _HEADS),
    "arcee": _causal("ArceeForCausalLM", SIZES, GROUPED, _BIASED),
    "arcee_heads": _causal("ArceeForCausalLM", SIZES, _HEADS, _BIASED),
    "bitnet": _causal("BitNetForCausalLM", SIZES, GROUPED),
    "bitnet_heads": _causal("BitNetForCausalLM", SIZES, _HEADS),
    "codegen": _causal("CodeGenForCausalLM", GPT, rotary_dim=8),
    "cohere": _causal("CohereForCausalLM", SIZES, GROUPED, attention_bias=True),
    "cohere_heads": _causal("CohereForCausalLM", SIZES, _HEADS),
    "cohere_normed": _causal("CohereForCausalLM", SIZES, _HEADS, use_qk_norm=True),
    "cohere2": _causal("Cohere2ForCausalLM", SIZES, GROUPED, sliding_window=16),
    "cohere2_heads": _causal("Cohere2ForCausalLM", SIZES, _HEADS, sliding_window_pattern=2),
    "ernie4_5": _causal("Ernie4_5ForCausalLM", SIZES, GROUPED, head_dim=16, use_bias=True),
    "ernie4_5_heads": _causal("Ernie4_5ForCausalLM", _FUSED_HEADS, head_dim=16, use_bias=True),
    "exaone4": _causal("Exaone4ForCausalLM", SIZES, GROUPED, sliding_window=16),
    # Heads of its own come first: PyTorch cannot export the one that all heads share.
    "falcon_heads": _causal("FalconForCausalLM", _FALCON, multi_query=False),
    "falcon": _causal("FalconForCausalLM", _FALCON, new_decoder_architecture=False),
    "falcon_new": _causal(
        "FalconForCausalLM", _FALCON, new_decoder_architecture=True, num_kv_heads=2
    ),
    "falcon_new_heads": _causal(
        "FalconForCausalLM", _FALCON, new_decoder_architecture=True, num_kv_heads=4
    ),
    "falcon_serial": _causal("FalconForCausalLM", _FALCON, parallel_attn=False),
    "gemma": _causal("GemmaForCausalLM", SIZES, _WIDE, attention_bias=True),
    "gemma_wide": _causal("GemmaForCausalLM", SIZES, _HEADS, head_dim=16),
    "gemma2": _causal("Gemma2ForCausalLM", SIZES, _WIDE, sliding_window=16),
    "gemma2_heads": _causal("Gemma2ForCausalLM", _FUSED_HEADS, head_dim=16, sliding_window=16),
    "gemma3": _causal("Gemma3ForCausalLM", SIZES, _WIDE, sliding_window=16),
    "gemma3_heads": _causal("Gemma3ForCausalLM", _FUSED_HEADS, head_dim=16, sliding_window=16),
    "glm": _causal("GlmForCausalLM", SIZES, GROUPED, head_dim=12, attention_bias=True),
    "glm_heads": _causal("GlmForCausalLM", SIZES, _HEADS, head_dim=12, attention_bias=True),
    "glm4": _causal("Glm4ForCausalLM", SIZES, GROUPED, head_dim=12, attention_bias=True),
    "gpt_neox": _causal("GPTNeoXForCausalLM", rotary_pct=0.5),
    "gpt_neox_serial": _causal("GPTNeoXForCausalLM", rotary_pct=0.5, use_parallel_residual=False),
    "gpt_neox_japanese": _causal("GPTNeoXJapaneseForCausalLM", intermediate_multiple_size=2),
    "gptj": _causal("GPTJForCausalLM", GPT, rotary_dim=8),
    "granite": _causal(
        "GraniteForCausalLM",
        _FUSED,
        _BIASED,
        embedding_multiplier=12.0,
        attention_multiplier=0.25,
        residual_multiplier=0.22,
        logits_scaling=8.0,
    ),
    "granite_heads": _causal("GraniteForCausalLM", _FUSED_HEADS, embedding_multiplier=12.0),
    "helium": _causal("HeliumForCausalLM", SIZES, GROUPED, _BIASED, head_dim=12),
    "helium_heads": _causal("HeliumForCausalLM", SIZES, _HEADS, head_dim=12),
    "hunyuan_v1_dense": _causal("HunYuanDenseV1ForCausalLM", SIZES, GROUPED, head_dim=16),
    "lfm2": _causal(
        "Lfm2ForCausalLM",
        SIZES,
        GROUPED,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    "llama": _causal("LlamaForCausalLM", SIZES, _WIDE),
    "llama_biased": _causal("LlamaForCausalLM", SIZES, _WIDE, _BIASED),
    "llama_heads": _causal("LlamaForCausalLM", _FUSED_HEADS, _BIASED),
    "llama_tied": _causal("LlamaForCausalLM", SIZES, _WIDE, tie_word_embeddings=True),
    "ministral": _causal("MinistralForCausalLM", SIZES, GROUPED, head_dim=12, sliding_window=16),
    "mistral": _causal("MistralForCausalLM", SIZES, _WIDE, sliding_window=None),
    "mistral_window": _causal("MistralForCausalLM", _FUSED_HEADS, sliding_window=16),
    "modernbert-decoder": _causal(
        "ModernBertDecoderForCausalLM", attention_bias=True, mlp_bias=True, norm_bias=True
    ),
    "nemotron": _causal("NemotronForCausalLM", _HALVED, attention_bias=True),
    "nemotron_heads": _causal("NemotronForCausalLM", _HALVED_HEADS, _BIASED),
    "olmo": _causal("OlmoForCausalLM", _FUSED, attention_bias=True),
    "olmo_clipped": _causal("OlmoForCausalLM", _FUSED_HEADS, clip_qkv=0.5),
    "olmo_heads": _causal("OlmoForCausalLM", _FUSED_HEADS),
    "olmo2": _causal("Olmo2ForCausalLM", SIZES, GROUPED),
    "olmo2_heads": _causal("Olmo2ForCausalLM", SIZES),
    "olmo3": _causal("Olmo3ForCausalLM", SIZES, GROUPED, sliding_window=16),
    "persimmon": _causal("PersimmonForCausalLM", SIZES, _HALF),
    "phi": _causal("PhiForCausalLM", _HALVED_HEADS),
    "phi_grouped": _causal("PhiForCausalLM", _HALVED),
    "phi_normed": _causal("PhiForCausalLM", _HALVED_HEADS, qk_layernorm=True),
    "phi3": _causal("Phi3ForCausalLM", _FUSED, original_max_position_embeddings=64),
    "phi3_heads": _causal("Phi3ForCausalLM", _FUSED_HEADS, original_max_position_embeddings=64),
    "phi3_long": _causal(
        "Phi3ForCausalLM", _FUSED_HEADS, original_max_position_embeddings=32, rope_scaling=_LONG
    ),
    "qwen2": _causal("Qwen2ForCausalLM", _FUSED),
    "qwen2_heads": _causal("Qwen2ForCausalLM", _FUSED_HEADS),
    "qwen3": _causal("Qwen3ForCausalLM", SIZES, _WIDE, attention_bias=True),
    "qwen3_heads": _causal("Qwen3ForCausalLM", _FUSED_HEADS, head_dim=16),
    "seed_oss": _causal("SeedOssForCausalLM", SIZES, GROUPED, head_dim=12),
    "seed_oss_heads": _causal("SeedOssForCausalLM", SIZES, _HEADS, head_dim=12),
    "smollm3": _causal("SmolLM3ForCausalLM", _FUSED, _BIASED, no_rope_layers=[1, 0]),
    "smollm3_heads": _causal("SmolLM3ForCausalLM", _FUSED_HEADS, no_rope_layers=[1, 0]),
    "stablelm": _causal("StableLmForCausalLM", SIZES, GROUPED, _HALF, use_qkv_bias=True),
    "stablelm_heads": _causal("StableLmForCausalLM", SIZES, _HEADS, _HALF),
    "stablelm_normed": _causal(
        "StableLmForCausalLM", SIZES, _HEADS, _HALF, use_qkv_bias=True, qk_layernorm=True
    ),
    "stablelm_parallel": _causal(
        "StableLmForCausalLM", SIZES, _HEADS, _HALF, use_parallel_residual=True, use_qkv_bias=True
    ),
    "starcoder2": _causal("Starcoder2ForCausalLM", SIZES, GROUPED, sliding_window=None),
    "starcoder2_heads": _causal("Starcoder2ForCausalLM", SIZES, _HEADS, sliding_window=None),
    "vaultgemma": _causal("VaultGemmaForCausalLM", SIZES, _WIDE, sliding_window=16),
}

_DISTANCES = {  # positions as a bias on the scores
    "bloom": _causal("BloomForCausalLM", vocab_size=97, hidden_size=48, n_layer=2, n_head=4),
    "bloom_post": _causal(
        "BloomForCausalLM",
        vocab_size=97,
        hidden_size=48,
        n_layer=2,
        n_head=4,
        apply_residual_connection_post_layernorm=True,
    ),
    "falcon_alibi": _causal(
        "FalconForCausalLM", _FALCON, alibi=True, multi_query=False, parallel_attn=False
    ),
    "falcon_new_alibi": _causal(
        "FalconForCausalLM", _FALCON, alibi=True, new_decoder_architecture=True, num_kv_heads=4
    ),
    "mpt": _causal("MptForCausalLM", _MPT),
}

_ADDED = {  # positions as rows added to the embedding
    "biogpt": _causal("BioGptForCausalLM"),
    "ctrl": _causal("CTRLLMHeadModel", GPT, dff=80),
    "gpt2": _causal("GPT2LMHeadModel", GPT),
    "gpt2_scaled": _causal("GPT2LMHeadModel", GPT, scale_attn_by_inverse_layer_idx=True),
    "gpt_bigcode": _causal("GPTBigCodeForCausalLM", GPT, multi_query=True),
    "gpt_bigcode_heads": _causal("GPTBigCodeForCausalLM", GPT, multi_query=False),
    "gpt_neo": _causal(
        "GPTNeoForCausalLM",
        SIZES,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
    ),
    "openai-gpt": _causal("OpenAIGPTLMHeadModel", GPT),
    "opt": _causal("OPTForCausalLM", SIZES, word_embed_proj_dim=48, ffn_dim=80),
    "opt_bare": _causal(
        "OPTForCausalLM",
        SIZES,
        word_embed_proj_dim=48,
        ffn_dim=80,
        enable_bias=False,
    ),
    "opt_post": _causal(
        "OPTForCausalLM", SIZES, word_embed_proj_dim=32, ffn_dim=80, do_layer_norm_before=False
    ),
    "trocr_decoder": _causal(
        "TrOCRForCausalLM",
        vocab_size=97,
        d_model=48,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=80,
        max_position_embeddings=64,
    ),
    "imagegpt": Family(
        "ImageGPTForImageClassification", "image-classification", {**GPT, "num_labels": 67}
    ),
}

_EXPERTS = {
    "deepseek_v3": _causal(
        "DeepseekV3ForCausalLM",
        SIZES,
        _HEADS,
        _LATENT,
        attention_bias=True,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
    ),
    "dots1": _causal(
        "Dots1ForCausalLM",
        SIZES,
        EXPERTS,
        head_dim=12,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        sliding_window=None,
    ),
    "ernie4_5_moe": _causal(
        "Ernie4_5_MoeForCausalLM",
        SIZES,
        GROUPED,
        use_bias=True,
        moe_intermediate_size=40,
        moe_num_experts=4,
        moe_k=2,
    ),
    "flex_olmo": _causal("FlexOlmoForCausalLM", SIZES, EXPERTS, num_experts=3),
    "glm4_moe": _causal(
        "Glm4MoeForCausalLM",
        SIZES,
        EXPERTS,
        head_dim=12,
        attention_bias=True,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        n_routed_experts=4,
        n_shared_experts=1,
    ),
    "gpt_oss": _causal(
        "GptOssForCausalLM",
        SIZES,
        _WIDE,
        EXPERTS,
        num_local_experts=3,
        sliding_window=16,
    ),
    "mixtral": _causal("MixtralForCausalLM", SIZES, EXPERTS, num_local_experts=3),
    "olmoe": _causal("OlmoeForCausalLM", SIZES, EXPERTS, num_experts=3),
    "olmoe_heads": _causal("OlmoeForCausalLM", SIZES, EXPERTS, _HEADS, num_experts=3),
    "phimoe": _causal(
        "PhimoeForCausalLM",
        SIZES,
        EXPERTS,
        num_local_experts=3,
        attention_bias=True,
        lm_head_bias=True,
        sliding_window=None,
    ),
    "qwen2_moe": _causal(
        "Qwen2MoeForCausalLM",
        SIZES,
        EXPERTS,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=40,
        num_experts=3,
    ),
    "qwen3_moe": _causal(
        "Qwen3MoeForCausalLM",
        SIZES,
        EXPERTS,
        attention_bias=True,
        moe_intermediate_size=40,
        num_experts=3,
    ),
}

DECODERS = {**_ROTARY, **_DISTANCES, **_ADDED, **_EXPERTS}
"""The families by their model type in Transformers; a suffix tells a variant."""
