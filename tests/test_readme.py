"""What the README shows is what happens."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def steady(text: str) -> str:
    """A report without what differs from run to run: times, memory, the last digits of errors."""
    text = re.sub(r"\d+\.\d+e-07", "ERROR", text)
    text = re.sub(r"\d\.\d\d (?=│$)", "TIME ", text, flags=re.MULTILINE)
    return re.sub(r"[\d.]+ s, peak memory [\d,]+ MiB", "COST", text)


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 150


def test_python_blocks_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, "README.md", "exec"), {})
        assert printed.getvalue().startswith("9 norms folded\npassed ")


def test_the_shown_run_prints_what_is_shown(tmp_path: Path) -> None:
    (block,) = blocks("console")
    command, _, expected = block.partition("\n")
    arguments = command.removeprefix("$ onnx-tricks ").split()
    done = subprocess.run(
        [sys.executable, "-c", "from onnx_tricks.cli import main; main()", *arguments],
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert steady(done.stdout) == steady(expected)


def test_every_set_up_command_is_a_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", "\n".join(blocks("")), re.MULTILINE)
    assert commands == ["demo", "test"]
    for name in commands:
        assert re.search(rf"^{name}:", makefile, re.MULTILINE)
