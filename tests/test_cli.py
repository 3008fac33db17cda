"""The command as scripts see it: arguments, exit status, what is written where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_tricks.models import demo_path
from tests import toys

COMMAND = [sys.executable, "-c", "from onnx_tricks.cli import main; main()"]
LN = "z = LayerNormalization(x, g, beta) y = MatMul(z, w)"
POST_NORM = "z = LayerNormalization(x, g) q = MatMul(z, w_square) y = Add(q, z)"


def command(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"COLUMNS": "120"},
        **options,
    )


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    path = tmp_path / "toy.onnx"
    onnx.save(toys.model(LN), path)
    return path


def test_optimize_writes_model_and_report_and_exits_0(toy: Path, tmp_path: Path) -> None:
    done = command("optimize", toy, tmp_path / "out.onnx", "--report", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    assert "fold-norm" in done.stdout
    assert "verification passed" in done.stdout
    assert done.stderr == ""
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passes"][0]["applied"] == 1
    assert report["output"] == str(tmp_path / "out.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))


def test_quiet_prints_nothing(toy: Path, tmp_path: Path) -> None:
    done = command("optimize", toy, tmp_path / "out.onnx", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_refusals_are_shown_with_their_reason(tmp_path: Path) -> None:
    onnx.save(toys.model(POST_NORM), tmp_path / "post.onnx")
    done = command("optimize", tmp_path / "post.onnx", tmp_path / "out.onnx", "--no-verify")
    assert done.returncode == 0
    assert "fold-norm skipped z: Add 'y' adds it to another value" in done.stdout
    assert "verification skipped" in done.stdout


def test_a_dry_run_writes_nothing(toy: Path, tmp_path: Path) -> None:
    done = command("optimize", toy, tmp_path / "out.onnx", "--dry-run")
    assert done.returncode == 0
    assert "nothing written" in done.stdout
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimize", "missing.onnx", "out.onnx"], "missing.onnx: there is no such file"),
        (["optimize", "toy.onnx", "out.onnx", "--passes", "nonsense"], "no pass 'nonsense'"),
        (["optimize", "text.onnx", "out.onnx"], "text.onnx"),
        (["optimize", "toy.onnx", "/dev/null"], "/dev/null"),
        (["optimize", ".", "toy.onnx"], "must be one too"),
        (["verify", "toy.onnx", "missing.onnx"], "missing.onnx"),
        (["optimize", "toy.onnx", "out.onnx", "--inputs", "no.npz"], "no.npz cannot be read"),
        (["optimize", "toy.onnx", "out.onnx", "--inputs", "z.npz"], "lacks inputs: x (float [b"),
        (["optimize", "toy.onnx", "out", "--inputs", "z.npz", "--no-verify"], "for the proof"),
        (["verify", "toy.onnx", "toy.onnx", "--inputs", "z.npz"], "It holds z."),
        (["optimize", "toy.onnx"], "Missing argument"),
        (["optimize", "toy.onnx", "out.onnx", "--frobnicate"], "No such option"),
    ],
)
def test_bad_usage_and_bad_input_exit_2_with_a_message(
    toy: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "text.onnx").write_text("this is not ONNX")
    np.savez(tmp_path / "z.npz", z=np.ones(3))
    before = sorted(path.name for path in tmp_path.iterdir())
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_verify_tells_equal_from_different(toy: Path, tmp_path: Path) -> None:
    spoilt = onnx.load(toy)
    (weight,) = (one for one in spoilt.graph.initializer if one.name == "w")
    array = onnx.numpy_helper.to_array(weight) * 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(array.astype("float32"), "w"))
    onnx.save(spoilt, tmp_path / "spoilt.onnx")
    assert command("verify", toy, toy).returncode == 0
    done = command("verify", toy, tmp_path / "spoilt.onnx", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["status"] == "failed"


def test_given_inputs_prove_what_no_inputs_are_found_for(tmp_path: Path) -> None:
    body = "s = Concat<axis=1>(v, v) x = Add(u, s) z = LayerNormalization(x, g) y = MatMul(z, w)"
    onnx.save(toys.model(body, inputs="u[b,s,D] v[b,t,D]"), tmp_path / "twice.onnx")
    for rows in (1, 2):
        u, v = np.ones((rows, 6, toys.D)), np.full((rows, 3, toys.D), 0.5)
        np.savez(tmp_path / f"{rows}.npz", u=u * np.arange(toys.D), v=v)
    asked = ("optimize", tmp_path / "twice.onnx", tmp_path / "out.onnx")
    unproven = command(*asked)
    assert unproven.returncode == 0
    assert "give inputs with --inputs FILE.npz" in unproven.stdout
    given = ("--inputs", tmp_path / "1.npz", "--inputs", tmp_path / "2.npz")
    done = command(*asked, *given, "--report", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    assert "against float64, 2 cases (2 given)" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())["verification"]
    assert (report["status"], report["cases"], report["given"]) == ("passed", 2, 2)
    again = command("verify", tmp_path / "twice.onnx", tmp_path / "out.onnx", *given)
    assert again.returncode == 0, again.stdout
    assert "2 cases (2 given)" in again.stdout


def test_list_names_every_pass() -> None:
    done = command("list")
    assert done.returncode == 0
    assert "fold-norm" in done.stdout


def test_version_is_printed() -> None:
    assert command("--version").stdout.startswith("onnx-tricks ")


def test_an_interrupted_run_leaves_the_old_file(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "model.onnx").write_bytes(b"old")
    script = (
        "import os, signal, onnx_tricks.run as r\n"
        "from onnx_tricks.cli import main\n"
        "r.verify_models = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "optimize", str(demo_path()), str(output)],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert (output / "model.onnx").read_bytes() == b"old"
    assert [path.name for path in output.iterdir()] == ["model.onnx"]


def test_a_pass_that_grows_the_file_is_enabled_by_name_within_a_limit(tmp_path: Path) -> None:
    asked = ("optimize", "demo", tmp_path / "out", "--enable", "precompute-first-layer")
    done = command(*asked, "--no-verify", "--max-growth", 1)
    assert done.returncode == 0, done.stderr
    assert "--max-growth 1 allows less" in " ".join(done.stdout.split())
    done = command(*asked, "--no-verify", "--report", tmp_path / "report.json")
    assert (done.returncode, done.stderr) == (0, "")
    passes = json.loads((tmp_path / "report.json").read_text())["passes"]
    assert {one["name"]: one["applied"] for one in passes}["precompute-first-layer"] == 1
