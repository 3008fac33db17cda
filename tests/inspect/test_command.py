"""`onnx-tricks inspect` as people and scripts see it: the table, JSON, plots, exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onnx_tricks.cli import app

CONFIGS = Path(__file__).parent / "configs"
MISTRAL, WHISPER = (str(CONFIGS / f"{name}.json") for name in ("mistral-7b", "whisper-tiny"))


def run(*arguments: object, columns: int = 80):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": str(columns)})


def test_the_table_fits_a_terminal_and_gives_verdicts_first() -> None:
    done = run(CONFIGS / "phi-3-mini-128k.json")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    (slim,) = (line for line in lines if line.startswith(" slim-attention"))
    assert slim.split() == ["slim-attention*", "yes", "-", "-50", "%", "1.78x", "1.98x", "2.00x"]
    assert "…" not in done.output
    assert "slim-attention: 32 layers; 196,608 -> 98,304 cached values per token" in done.output
    assert "at 131,072 tokens of context" in done.output


def test_refusals_come_with_reasons_and_what_else_would_be() -> None:
    done = run(MISTRAL)
    assert "slim-attention not applicable: 8 key/value heads of 128 give E = 1024" in done.output
    assert "it would remove 15% of the weights, 1.17x" in done.output


def test_json_is_json_and_nothing_else() -> None:
    done = run(WHISPER, "--json", "--batch", "64", "--context", "448")
    data = json.loads(done.stdout)
    (slim,) = (one for one in data["tricks"] if one["name"] == "slim-attention")
    assert round(slim["reads"]["64"]["speedup"], 1) == 5.6
    assert data["batches"] == [64]
    assert data["cache"]["bytes"] == 4 * 5_984_256
    assert slim["cache"]["bytes"] == 4 * 688_128


@pytest.mark.parametrize(("name", "start"), [("plot.png", b"\x89PNG"), ("plot.svg", b"<?xml")])
def test_a_plot_is_drawn(tmp_path: Path, name: str, start: bytes) -> None:
    done = run(WHISPER, "--plot", tmp_path / name, "--batch", "1,64")
    assert done.exit_code == 0, done.output
    assert (tmp_path / name).read_bytes().startswith(start)


def test_a_plot_labels_its_lines(tmp_path: Path) -> None:
    run(CONFIGS / "pythia-6.9b.json", "--plot", tmp_path / "plot.svg", "--batch", "1")
    drawn = (tmp_path / "plot.svg").read_text()
    for text in ("today", "slim-attention", "precompute-first-layer", "all of them", "1.07x"):
        assert f"<!-- {text} -->" in drawn
    assert "<!-- tokens of context -->" in drawn
    assert "<!-- 10 GB -->" in drawn


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = run(WHISPER, "--plot", tmp_path / "plot.png")
    assert done.exit_code == 2
    assert 'pip install "onnx-tricks[plot]"' in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.onnx"], "missing.onnx: there is no such file or folder"),
        (["missing.json"], "missing.json: there is no such file or folder"),
        (["empty"], "the folder holds no .onnx file"),
        (["text.onnx"], "text.onnx"),
        (["text.json"], "cannot be read as JSON"),
        ([MISTRAL, "--batch", "many"], "--batch takes whole numbers"),
        ([MISTRAL, "--batch", "0"], "positive whole numbers"),
        ([MISTRAL, "--context", "0"], "positive whole numbers"),
        ([MISTRAL, "--plot", "plot.pdf"], "ends in .png or .svg"),
        ([MISTRAL, "--plot", "missing/plot.png"], "cannot be written"),
        (["bert.json", "--plot", "plot.png"], "keeps no key/value cache"),
    ],
)
def test_bad_input_exits_2_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("text.onnx", "text.json"):
        (tmp_path / name).write_text("this is neither")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    (tmp_path / "bert.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "plot.png").exists()
