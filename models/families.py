"""Models with random weights: a tiny one for each family that Transformers knows, and a large one.

The tiny sizes are odd and all different, so that a mistaken axis shows as a shape error. Every norm
gain and every bias is random, so that losing one changes the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from onnx_tricks.errors import UsageError

__all__ = ["FAMILIES", "Family", "llama_2gb", "tiny"]

_CAUSAL = "text-generation-with-past"
_MASKED = "fill-mask"
_TRANSLATE = "text2text-generation-with-past"
_TRANSCRIBE = "automatic-speech-recognition-with-past"
_CLASSIFY = "image-classification"

# Width 48 in 4 heads, 80 inside the feed-forward block, 97 tokens, 64 positions, 2 layers.
_SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = {"num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 14}  # heads that do not add up to the width
_GPT = {"vocab_size": 97, "n_embd": 48, "n_inner": 80, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2}
_BOTH_SIDES = {
    "vocab_size": 97,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 72,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family and the arguments of its tiny model.

    Attributes:
        name: The class name in Transformers without its ending, as in ``Llama``.
        head: The ending of the model class, as in ``ForCausalLM``.
        task: The task under which Optimum exports the model.
        sizes: Arguments of the configuration class.
    """

    name: str
    head: str
    task: str
    sizes: Mapping[str, Any]


def _causal(name: str, *sizes: Mapping[str, Any], head: str = "ForCausalLM", **own: Any) -> Family:
    merged = {key: value for part in sizes or (_SIZES,) for key, value in part.items()}
    return Family(name, head, _CAUSAL, {**merged, "pad_token_id": 0, **own})


def _masked(name: str, **own: Any) -> Family:
    return Family(name, "ForMaskedLM", _MASKED, {**_SIZES, **own})


FAMILIES = {
    "llama": _causal("Llama", _SIZES, _GROUPED),
    "mistral": _causal("Mistral", _SIZES, _GROUPED, sliding_window=None),
    "qwen2": _causal("Qwen2", _SIZES, _GROUPED),
    "qwen3": _causal("Qwen3", _SIZES, _WIDE),
    "gemma": _causal("Gemma", _SIZES, _WIDE),
    "gemma_wide": _causal("Gemma", _SIZES, num_key_value_heads=4, head_dim=14),
    "gemma2": _causal("Gemma2", _SIZES, _WIDE, sliding_window=16),
    "gemma3": _causal("Gemma3", _SIZES, _WIDE, sliding_window=16),
    "phi": _causal("Phi"),
    "phi3": _causal("Phi3", _SIZES, _GROUPED),
    "phi3_heads": _causal("Phi3", _SIZES),
    "gpt2": _causal("GPT2", _GPT, head="LMHeadModel"),
    "gpt_neox": _causal("GPTNeoX", rotary_pct=0.5),
    "gptj": _causal("GPTJ", _GPT, rotary_dim=8),
    "codegen": _causal("CodeGen", _GPT, rotary_dim=8),
    "opt": _causal("OPT", _SIZES, word_embed_proj_dim=48, ffn_dim=80),
    "bloom": _causal("Bloom", vocab_size=97, hidden_size=48, n_layer=2, n_head=4),
    "falcon": _causal("Falcon", _SIZES, bias=True, new_decoder_architecture=False),
    "mpt": _causal("Mpt", vocab_size=97, d_model=48, n_layers=2, n_heads=4, max_seq_len=64),
    "olmo": _causal("Olmo", _SIZES, _GROUPED),
    "olmo_heads": _causal("Olmo", _SIZES),
    "olmo2": _causal("Olmo2", _SIZES, _GROUPED),
    "cohere": _causal("Cohere", _SIZES, _GROUPED),
    "stablelm": _causal("StableLm", _SIZES, _GROUPED, partial_rotary_factor=0.5),
    "stablelm_heads": _causal("StableLm", _SIZES, num_key_value_heads=4, partial_rotary_factor=0.5),
    "granite": _causal("Granite", _SIZES, _GROUPED),
    "mixtral": _causal("Mixtral", _SIZES, _EXPERTS, num_local_experts=3),
    "qwen3_moe": _causal("Qwen3Moe", _SIZES, _EXPERTS, moe_intermediate_size=40, num_experts=3),
    "gpt_oss": _causal(
        "GptOss",
        _SIZES,
        _WIDE,
        _EXPERTS,
        num_local_experts=3,
        sliding_window=16,
        rope_scaling={"rope_type": "default"},
    ),
    "bert": _masked("Bert"),
    "roberta": _masked("Roberta"),
    "distilbert": _masked("DistilBert", dim=48, hidden_dim=80, n_layers=2, n_heads=4),
    "albert": _masked("Albert", embedding_size=32),
    "vit": Family(
        "ViT", "ForImageClassification", _CLASSIFY, {**_SIZES, "image_size": 24, "patch_size": 8}
    ),
    "t5": Family(
        "T5",
        "ForConditionalGeneration",
        _TRANSLATE,
        {"vocab_size": 97, "d_model": 48, "d_kv": 14, "d_ff": 80, "num_layers": 2, "num_heads": 4},
    ),
    "t5_wide": Family(
        "T5",
        "ForConditionalGeneration",
        _TRANSLATE,
        {"vocab_size": 97, "d_model": 48, "d_kv": 96, "d_ff": 80, "num_layers": 2, "num_heads": 4},
    ),
    "bart": Family("Bart", "ForConditionalGeneration", _TRANSLATE, _BOTH_SIDES),
    "marian": Family("Marian", "MTModel", _TRANSLATE, {**_BOTH_SIDES, "decoder_start_token_id": 0}),
    "pegasus": Family("Pegasus", "ForConditionalGeneration", _TRANSLATE, _BOTH_SIDES),
    "m2m_100": Family("M2M100", "ForConditionalGeneration", _TRANSLATE, _BOTH_SIDES),
    "whisper": Family(
        "Whisper",
        "ForConditionalGeneration",
        _TRANSCRIBE,
        {**_BOTH_SIDES, "num_mel_bins": 20, "max_target_positions": 64},
    ),
}
"""The families by their model type in Transformers."""


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """Builds the tiny model of a family.

    Args:
        name: A key of `FAMILIES`.
        seed: Another seed gives other weights.

    Returns:
        The fp32 model in evaluation mode.

    Raises:
        UsageError: There is no such family.
    """
    if name not in FAMILIES:
        raise UsageError(f"There is no family {name!r}. Choose one of: {', '.join(FAMILIES)}.")
    row = FAMILIES[name]
    suffix = "TextConfig" if name == "gemma3" else "Config"
    config = getattr(transformers, row.name + suffix)(**row.sizes)
    model = getattr(transformers, row.name + row.head)(config)
    _randomise(model, seed)
    return model.eval()


def llama_2gb() -> LlamaForCausalLM:
    """A Llama of 2.2 GB for benchmarks of memory and time: D 1536, F 4096, 16 layers, fp32."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=24,
    )
    model = LlamaForCausalLM(config)
    _randomise(model, seed=0)
    return model.eval()


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Fills all parameters: gains in [0.5, 1.5], biases of size 0.2, matrices that keep size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied ones come once
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
