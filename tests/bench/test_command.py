"""The command `onnx-tricks bench` as scripts see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from onnx_tricks.cli import app

TINY = ("--batch", "1,2", "--cached", "16", "--prompt", "8", "--rounds", "3", "--threads", "1")


def run(*arguments: object):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "80"})


def test_a_table_is_printed_and_json_written(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = run("demo", "demo", *TINY, "--no-memory", "--json", file)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "…" not in done.stdout
    for text in ("times faster", "step at 16", "prompt of 8", "0.197 → 0.197", "threads: 1"):
        assert text in done.stdout, text
    assert "peak" not in done.stdout
    data = json.loads(file.read_text())
    assert data["provider"] == "cpu"
    assert data["threads"] == 1
    assert {"processor", "cores", "onnxruntime", "onnx-tricks"} <= data["machine"].keys()
    assert [(one["kind"], one["batch"]) for one in data["workloads"]] == [
        *(("step", 1), ("step", 2)),
        *(("prompt", 1), ("prompt", 2)),
    ]
    step = data["workloads"][1]
    assert (step["new"], step["cached"], step["pairs"]) == (1, 16, 3)
    assert step["speedup"]["low"] <= step["speedup"]["median"] <= step["speedup"]["high"]
    assert step["candidate"].keys() == {
        *("milliseconds", "cache_bytes", "encoder_bytes", "caches", "peak_bytes")
    }
    assert step["candidate"]["cache_bytes"] == 2 * 16 * 1536 * 4
    assert step["candidate"]["peak_bytes"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "missing"], "missing: there is no such file"),
        (["empty", "demo"], "empty: the folder holds none of"),
        (["text.onnx", "demo"], "text.onnx"),
        (["demo", "demo", "--batch", "few"], "--batch takes whole numbers"),
        (["demo", "demo", "--cached", "0"], "cached takes numbers above 0"),
        (["demo", "demo", "--provider", "abacus"], "Invalid value for '--provider'"),
        (["demo", "demo", "--json", "/nowhere/x.json", "--no-memory"], "cannot be written"),
        (["demo"], "Missing argument"),
    ],
)
def test_bad_input_exits_2_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.onnx").write_text("this is not ONNX")
    (tmp_path / "empty").mkdir()
    rest = TINY[2 if "--batch" in arguments else 0 :]
    done = run(*rest, *arguments)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
