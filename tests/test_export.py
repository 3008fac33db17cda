"""From a checkpoint to a slim folder in one call, and in one command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_tricks.errors import ModelError, UsageError
from onnx_tricks.export import export
from onnx_tricks.passes.fold_norm import FoldNorm
from onnx_tricks.passes.slim_attention import SlimAttention
from onnx_tricks.runtime import generate
from tests.conftest import import_recipes
from tests.test_cli import command

import_recipes()  # or skip where the exporters, which bring Optimum, are not installed

import torch  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from onnx_tricks.models.families import tiny  # noqa: E402

PASSES = [FoldNorm(), SlimAttention(rank=32)]
PROMPT = [[5, 17, 80, 3, 44, 9]]


def llama() -> PreTrainedModel:
    """A Llama whose heads have keys and values of their own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # gains that a pass can fold
    return model.eval()


def greedy(model: PreTrainedModel, count: int = 20, **options: int) -> list[int]:
    prompt = torch.tensor(PROMPT)
    mask = torch.ones_like(prompt)
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    written = model.generate(
        prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, **options
    )
    return written[0, -count:].tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    llama().save_pretrained(folder)
    words = models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="w0")
    tokenizer.save_pretrained(folder)
    return folder


def test_a_checkpoint_becomes_a_slim_folder_that_writes_the_same(
    checkpoint: Path, tmp_path: Path
) -> None:
    result = export(checkpoint, tmp_path / "slim", passes=PASSES)
    assert result.report.input == str(checkpoint)
    assert [one.applied for one in result.report.passes] == [5, 2]
    assert result.report.verification.status == "passed"
    assert {"config.json", "generation_config.json", "model.onnx", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "slim").iterdir()
    }
    assert [file.name for file in tmp_path.iterdir()] == ["slim"]
    states = [value.name for value in result.model["model.onnx"].graph.inputs]
    assert "past_key_values.1.residual" in states
    assert "past_key_values.1.value" not in states
    written = generate(tmp_path / "slim", PROMPT, max_new_tokens=20)
    assert written[0].tolist() == greedy(llama())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_model_with_two_sides_gets_one_slim_decoder(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "slim"
    export(tiny(name), folder, passes=PASSES, verify=False)
    assert sorted(path.name for path in folder.glob("*.onnx")) == [
        "decoder_model.onnx",
        "encoder_model.onnx",
    ]
    model = tiny(name)  # anew, since Optimum changed the other
    states = model.get_encoder()(torch.tensor(PROMPT)).last_hidden_state.detach().numpy()
    given = {"encoder_hidden_states": states, "encoder_attention_mask": np.ones_like(PROMPT)}
    written = generate(folder, [[0]], max_new_tokens=20, **given)
    assert written[0].tolist() == greedy(model, decoder_start_token_id=0)


def test_a_model_in_memory_is_exported_in_the_type_asked_for(tmp_path: Path) -> None:
    result = export(llama(), tmp_path / "half", dtype="fp16", passes=PASSES, verify=False)
    assert result.report.input == "LlamaForCausalLM"
    inputs = {value.name: value.dtype for value in result.model["model.onnx"].graph.inputs}
    assert inputs["past_key_values.0.key"].numpy() == np.float16


def test_a_model_without_caches_is_exported_for_what_it_does(tmp_path: Path) -> None:
    result = export(tiny("distilbert"), tmp_path / "out", verify=False)
    assert [value.name for value in result.model["model.onnx"].graph.outputs] == ["logits"]


def test_bad_arguments_are_told_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no pass 'slim'"):
        export(checkpoint, tmp_path / "out", enable=["slim"])
    with pytest.raises(UsageError, match="there is no type 'int8'"):
        export(checkpoint, tmp_path / "out", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_told_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"no such folder, or no config\.json"):
        export(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ModelError, match=r"the model cannot be exported: .*image"):
        export(checkpoint, tmp_path / "out", task="image-classification")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "llama", "architectures": ["Nothing"]}')
    with pytest.raises(ModelError, match="Transformers has no class Nothing"):
        export(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_the_command_exports_and_reports(checkpoint: Path, tmp_path: Path) -> None:
    done = command("export", checkpoint, tmp_path / "out", "--enable", "slim-attention")
    assert done.returncode == 0, done.stderr
    assert "slim-attention" in done.stdout
    assert "verification passed" in done.stdout
    assert done.stderr == ""
    assert (tmp_path / "out/tokenizer.json").is_file()


def test_the_command_tells_what_is_no_checkpoint(tmp_path: Path) -> None:
    done = command("export", tmp_path / "absent", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such folder, or no config.json" in done.stderr
