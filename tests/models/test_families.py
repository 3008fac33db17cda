"""Every family exports, loads in ONNX Runtime and computes what PyTorch computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from tests.conftest import Export, import_recipes

recipes = import_recipes()
torch = recipes.export.torch
FAMILIES, tiny = recipes.families.FAMILIES, recipes.families.tiny
make_experts_dense = recipes.experts.make_experts_dense

LENGTH = 5  # not that of the export
PAST = {"past_sequence_length": 0, "past": 0}

BY_OPTIMUM = [name for name in FAMILIES if name != "mixtral"]  # which Optimum does not know
BY_DYNAMO = [
    ("llama", "dynamo18"),
    ("llama", "dynamo23"),
    ("llama", "dynamo18-cache"),
    ("gemma3", "dynamo23-cache"),
    ("gpt2", "dynamo23"),
    ("mixtral", "dynamo18"),
    ("bert", "dynamo18"),
    ("vit", "dynamo23"),
    ("bart", "dynamo23"),
    ("whisper", "dynamo18"),
]


def feeds(session: ort.InferenceSession, config: Any, batch: int) -> dict[str, np.ndarray]:
    """Seeded inputs for a whole prompt: no padding, caches empty."""
    rng = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {}
    for node in session.get_inputs():
        shape = [d if isinstance(d, int) else PAST.get(d, LENGTH) for d in node.shape]
        shape[0] = batch
        if node.name in {"input_ids", "decoder_input_ids"}:
            inputs[node.name] = rng.integers(3, config.vocab_size, (batch, LENGTH))
        elif node.name.endswith("attention_mask"):
            inputs[node.name] = np.ones((batch, LENGTH), np.int64)
        elif node.name == "position_ids":
            inputs[node.name] = np.tile(np.arange(LENGTH), (batch, 1))
        elif node.name == "token_type_ids":
            inputs[node.name] = np.zeros((batch, LENGTH), np.int64)
        elif node.name == "pixel_values":
            size = config.image_size
            inputs[node.name] = rng.standard_normal((batch, 3, size, size), np.float32)
        else:
            inputs[node.name] = rng.standard_normal(shape, np.float32)
    return inputs


def expected(model: Any, stem: str, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What PyTorch computes from the same inputs."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        if stem == "encoder_model":
            return model.get_encoder()(tensors[model.main_input_name]).last_hidden_state.numpy()
        if stem == "decoder_model":
            ids, states = tensors["input_ids"], tensors["encoder_hidden_states"]
            return model(decoder_input_ids=ids, encoder_outputs=(states,)).logits.numpy()
        return model(tensors[model.main_input_name]).logits.numpy()


def check(name: str, folder: Path, batch: int = 3) -> None:
    model = tiny(name)
    make_experts_dense(model)
    files = [
        f
        for f in sorted(folder.glob("*.onnx"))
        if f.stem in {"model", "encoder_model", "decoder_model"}
    ]
    assert len(files) == (2 if model.config.is_encoder_decoder else 1)
    for file in files:
        session = ort.InferenceSession(file)
        inputs = feeds(session, model.config, batch)
        result = session.run(None, inputs)[0]
        target = expected(model, file.stem, inputs)
        assert result.shape == target.shape
        assert np.abs(result - target).max() <= 1e-4 * np.abs(target).max()


@pytest.mark.parametrize("name", BY_OPTIMUM)
def test_a_family_exported_by_optimum_computes_the_same(name: str, export: Export) -> None:
    check(name, export(name, "optimum"))


@pytest.mark.parametrize(("name", "exporter"), BY_DYNAMO)
def test_a_family_exported_by_dynamo_computes_the_same(
    name: str, exporter: str, export: Export
) -> None:
    # The exporter writes the angles of RotaryEmbedding for one row, and ONNX Runtime insists.
    fused_rotary = exporter.startswith("dynamo23") and name in {"llama", "gemma3"}
    check(name, export(name, exporter), batch=1 if fused_rotary else 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_gains_and_biases_are_random(name: str) -> None:
    vectors = [p for p in tiny(name).parameters() if p.ndim == 1 and p.numel() > 1]
    assert all(p.std() > 0.05 for p in vectors)


def test_dense_experts_compute_what_sparse_ones_do() -> None:
    ids = torch.arange(3, 13).reshape(2, 5)
    for name in ("mixtral", "qwen3_moe"):
        model = tiny(name)
        before = model(ids).logits
        make_experts_dense(model)
        torch.testing.assert_close(model(ids).logits, before)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = tiny("bert", 1), tiny("bert", 1), tiny("bert", 2)
    ids = torch.arange(3, 13).reshape(2, 5)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert not torch.allclose(first(ids).logits, other(ids).logits)
