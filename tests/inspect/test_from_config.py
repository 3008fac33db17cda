"""Dimensions from config.json files: families, nesting, and what is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onnx_tricks.errors import ModelError
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.sizes import measure
from onnx_tricks.inspect.dimensions import Dimensions
from onnx_tricks.inspect.families import FAMILIES
from onnx_tricks.inspect.from_config import read_config
from onnx_tricks.models import demo_path
from tests.conftest import import_recipes

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}


def read(tmp_path: Path, **changes: Any) -> Dimensions:
    data = {key: value for key, value in {**LLAMA, **changes}.items() if value is not ...}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    return read_config(path)


def test_the_weights_of_the_demo_are_those_of_its_file() -> None:
    stated = read_config(demo_path() / "config.json")
    stored = measure(load_model(demo_path() / "model.onnx").model)
    assert stated.parameters < stored.parameters < 1.001 * stated.parameters  # norms, rotary tables
    assert stated.traffic.cache_per_token("self").values == stored.cache_values_per_token


# Matrices that the papers do not count: tables beside that of the tokens, routers, task heads.
NOT_COUNTED = (
    *("position", "wpe", "token_type", "cls_token", "patch", "conv", "bias"),
    *("router", "gate.weight", ".transform.", "vocab_transform", "lm_head.dense", "classifier"),
)

COUNTED = [
    *"llama mistral qwen2 qwen3 gemma gemma_wide gemma2 gemma3 phi phi3 phi3_heads gpt2".split(),
    *"gpt_neox gptj codegen opt bloom falcon mpt olmo olmo_heads olmo2 cohere stablelm".split(),
    *"stablelm_heads granite qwen3_moe bert roberta distilbert vit t5 t5_wide bart marian".split(),
    *"pegasus m2m_100 whisper mixtral gpt_oss".split(),
]


def test_every_reference_family_is_counted_as_transformers_counts_it(tmp_path: Path) -> None:
    families = import_recipes().families
    for name in COUNTED:
        model = families.tiny(name)
        model.config.save_pretrained(tmp_path)
        stated = read_config(tmp_path / "config.json")
        matrices = {key: p.numel() for key, p in model.named_parameters() if p.ndim > 1}
        counted = [key for key in matrices if not any(part in key for part in NOT_COUNTED)]
        assert stated.parameters == sum(matrices[key] for key in counted), name


def test_grouped_and_multi_query_heads_are_told_apart(tmp_path: Path) -> None:
    assert read(tmp_path).attention.kv_heads == 4
    assert read(tmp_path, num_key_value_heads=2).attention.kv_heads == 2
    assert read(tmp_path, model_type="falcon").attention.kv_heads == 1
    falcon = {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2}
    assert read(tmp_path, **falcon).attention.kv_heads == 2
    assert read(tmp_path, model_type="falcon", multi_query=False).attention.kv_heads == 4


def test_parallel_blocks_are_what_the_config_says(tmp_path: Path) -> None:
    assert not read(tmp_path).parallel
    assert read(tmp_path, model_type="gpt_neox").parallel
    assert not read(tmp_path, model_type="gpt_neox", use_parallel_residual=False).parallel
    assert read(tmp_path, model_type="stablelm", use_parallel_residual=True).parallel
    assert not read(tmp_path, model_type="falcon", parallel_attn=False).parallel


def test_positions_are_what_the_config_says(tmp_path: Path) -> None:
    assert read(tmp_path, model_type="falcon", alibi=True).attention.position == "alibi"
    assert read(tmp_path, model_type="falcon", alibi=False).attention.position == "rope"
    mpt = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 3}
    assert read(tmp_path, **mpt).attention.position == "alibi"
    learned = read(tmp_path, **mpt, attn_config={"alibi": False})
    assert learned.attention.position == "learned"


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, 3),
        ({"model_type": "gemma2", "sliding_window": 8}, 2),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False}, 0),
        ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, 1),
        ({"model_type": "mistral", "sliding_window": None}, 0),
    ],
)
def test_a_sliding_window_bounds_the_cache(tmp_path: Path, changes, layers: int) -> None:
    dims = read(tmp_path, **changes)
    one = 2 * dims.attention.key_width
    kept = dims.traffic.cache(100).values
    assert kept == one * (8 * layers + 100 * (3 - layers))


def test_a_mixture_counts_all_experts_and_reads_the_chosen_ones(tmp_path: Path) -> None:
    mixture = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    dims, dense = read(tmp_path, **mixture), read(tmp_path)
    assert dims.ffn_weights == 8 * dense.ffn_weights
    traffic, one = dims.traffic, 3 * dense.ffn_weights
    assert traffic.per_step(1, 0).values == traffic.weights.values + 2 * one + 64
    assert traffic.per_step(10_000, 0).values - 10_000 * 64 == traffic.weights.values + 8 * one


def test_types_give_the_bytes(tmp_path: Path) -> None:
    assert read(tmp_path).weight_bytes == 4
    assert read(tmp_path, torch_dtype="bfloat16").cache_bytes == 2
    assert read(tmp_path, dtype="float8_e4m3fn").weight_bytes == 1


def test_the_language_model_of_a_larger_one_is_read(tmp_path: Path) -> None:
    outer = {"model_type": "llava", "torch_dtype": "float16", "text_config": LLAMA}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    dims = read_config(tmp_path / "config.json")
    assert (dims.model_type, dims.width, dims.weight_bytes) == ("llama", 64, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, "'hidden_size' or 'n_embd' or 'd_model' or 'dim' is missing"),
        ({"vocab_size": ...}, "'vocab_size' is missing; add it, or inspect the exported model"),
        ({"hidden_size": "64"}, "'hidden_size' is '64', not a positive whole number"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0, not a positive"),
        ({"num_attention_heads": True}, "'num_attention_heads' is True"),
        ({"model_type": "mamba"}, "the model_type 'mamba' is not known; inspect the exported"),
        ({"model_type": ...}, "the key 'model_type' is missing"),
        ({"model_type": 3}, "the key 'model_type' is missing"),
        ({"kv_lora_rank": 16}, "multi-head latent attention"),
        ({"dtype": "int3"}, "'dtype' is 'int3', not one of float64"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "'num_experts_per_tok' is missing"),
        (
            {"model_type": "qwen3_moe", "num_experts": 8, "mlp_only_layers": [0]},
            "layers with and without experts are mixed",
        ),
    ],
)
def test_a_wrong_config_says_which_key_and_what_to_do(tmp_path, changes, message: str) -> None:
    with pytest.raises(ModelError, match=r"config\.json: ") as caught:
        read(tmp_path, **changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("[]", "is not a")])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path / "config.json")


def test_each_family_reads_a_plain_config(tmp_path: Path) -> None:
    for name in FAMILIES:
        dims = read(tmp_path, model_type=name, num_layers=3)
        assert dims.traffic.per_step(1, 8).bytes > 0
        assert dims.parameters > 0
