"""Peak memory and time of optimizers on one large model, each in a process of its own.

The floor is `onnx_ir` loading the model and saving it with external data; all other tools are what
a user would type. Runs alternate between the tools, and each is compared with the floor of its
round, so that a slow minute of the machine hits both.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from onnx_tricks.graph.external import external_locations

__all__ = ["TOOLS", "Run", "Tool", "main"]

_GB = 1e9
_MOST_BYTES = 0.6 * _GB
_MOST_TIMES_FLOOR = 2.5
_FLOOR, _OURS = "onnx_ir load + save", "onnx-tricks --no-verify"

_LOAD = """
import onnx_ir, sys
_, source, target = sys.argv
model = onnx_ir.load(source)
"""
_FUSE = """
from onnxscript.rewriter.ort_fusions import optimize_for_ort
optimize_for_ort(model)
"""
_SAVE = """
onnx_ir.save(model, target, external_data="model.onnx.data")
"""


@dataclasses.dataclass(frozen=True)
class Tool:
    """An optimizer.

    Attributes:
        package: The distribution that holds it.
        options: What follows `python`; SOURCE, TARGET and REPORT stand for files.
        code: Python code to run, where a module is not enough.
    """

    package: str
    options: str
    code: str = ""

    @property
    def version(self) -> str | None:
        """The installed version; None if the tool is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def command(self, files: Mapping[str, Path]) -> list[str]:
        """The command line, with the files in their places."""
        words = [str(files.get(word, word)) for word in self.options.split()]
        return [sys.executable, *(["-c", self.code] if self.code else []), *words]


TOOLS = {
    _FLOOR: Tool("onnx-ir", "SOURCE TARGET", _LOAD + _SAVE),
    _OURS: Tool(
        "onnx-tricks",
        "optimize SOURCE TARGET --no-verify --report REPORT",
        "from onnx_tricks.cli import main; main()",
    ),
    "onnxscript optimize_for_ort": Tool("onnxscript", "SOURCE TARGET", _LOAD + _FUSE + _SAVE),
    "OnnxSlim": Tool("onnxslim", "-m onnxslim SOURCE TARGET --save-as-external-data"),
    "onnxsim": Tool("onnxsim", "-m onnxsim SOURCE TARGET --save-as-external-data"),
    "ONNX Runtime transformers": Tool(
        "onnxruntime",
        "-m onnxruntime.transformers.optimizer --input SOURCE --output TARGET "
        "--model_type qwen3 --opt_level 0 --use_external_data_format",
    ),
}
"""The tools by the names under which they are printed, the floor first."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of one tool.

    Attributes:
        status: Exit status; negative for a signal.
        seconds: Wall time of the whole process, imports included.
        cpu_seconds: User and system time.
        peak_bytes: The most memory that was resident, pages of mapped files included.
        written_bytes: Size of the result.
        norms: How many norms onnx-tricks has folded; None for other tools.
        message: The last line of what a failed tool wrote.
    """

    status: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    written_bytes: int
    norms: int | None
    message: str


def main(
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="An .onnx file; else the recipe llama-2gb, by Optimum.",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each tool.")] = 3,
    tools: Annotated[str | None, typer.Option(help="Parts of names, comma-separated.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where results are written.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds after which a run is stopped.")] = 900,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all runs here.")] = None,
    check: Annotated[
        bool,
        typer.Option(help="Fail where onnx-tricks takes over 0.6 GB or 2.5 times the floor."),
    ] = False,
) -> None:
    """Measure optimizers on one model."""
    source = model or _recipe()
    read = [source, *(source.parent / name for name in external_locations(source))]
    read_bytes = sum(path.stat().st_size for path in read)
    chosen = {name: tool for name, tool in TOOLS.items() if _is_chosen(name, tools)}
    runs: dict[str, list[Run]] = {name: [] for name, tool in chosen.items() if tool.version}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for number in range(rounds):
            for name, done in runs.items():
                print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr)
                done.append(_measure(chosen[name], source, Path(scratch), limit))
    console = Console(width=120)
    console.print(_heading(source, read_bytes, rounds), highlight=False)
    console.print(_table(chosen, runs, read_bytes))
    for name, done in runs.items():
        for text in _remarks(name, done):
            console.print(text, highlight=False)
    if json_file:
        rows = {name: [dataclasses.asdict(run) for run in done] for name, done in runs.items()}
        versions = {name: chosen[name].version for name in rows}
        content = {"model_bytes": read_bytes, "versions": versions, "runs": rows}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if check:
        broken = _broken_bounds(runs)
        console.print(*(broken or ["bounds kept"]), sep="\n", highlight=False)
        raise typer.Exit(1 if broken else 0)


def _is_chosen(name: str, tools: str | None) -> bool:
    if tools is None or name == _FLOOR:
        return True
    return any(part.strip().lower() in name.lower() for part in tools.split(","))


def _recipe() -> Path:
    """The large Llama of onnx_tricks.models, exported on the first call."""
    # A child inherits the peak memory of its parent, so that PyTorch must not be loaded in here.
    code = "from onnx_tricks.models.recipes import exported; print(exported('llama-2gb'))"
    made = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    if made.returncode:
        raise typer.BadParameter("the recipe cannot be exported here: give a file with --model")
    return Path(made.stdout.splitlines()[-1]) / "model.onnx"


def _measure(tool: Tool, source: Path, scratch: Path, limit: float) -> Run:
    """Run a tool once; the result is removed."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder, tempfile.TemporaryFile() as output:
        files = {"SOURCE": source.absolute(), "TARGET": Path(folder) / "model.onnx"}
        files["REPORT"] = scratch / "report.json"
        os.sync()  # what earlier runs have left to be written is not this one's time
        start = time.perf_counter()
        process = subprocess.Popen(tool.command(files), stdout=output, stderr=subprocess.STDOUT)
        clock = threading.Timer(limit, process.kill)
        clock.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        clock.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines() or [""]
        return Run(
            status=process.returncode,
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            written_bytes=sum(path.stat().st_size for path in Path(folder).iterdir()),
            norms=_norms(files["REPORT"]) if "REPORT" in tool.options else None,
            message=lines[-1] if process.returncode else "",
        )


def _norms(report: Path) -> int | None:
    if not report.exists():
        return None
    passes = json.loads(report.read_text(encoding="utf-8"))["passes"]
    return sum(int(one["applied"]) for one in passes if one["name"] == "fold-norm")


def _heading(source: Path, read_bytes: int, rounds: int) -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    machine = platform.machine().replace("_", "-")
    return (
        f"{dt.datetime.now(dt.UTC).date()}, {os.cpu_count()} cores {machine}, "
        f"{memory:.0f} GB, Python {platform.python_version()}\n"
        f"{source.name} with its external data, {read_bytes / _GB:.2f} GB; {rounds} rounds in "
        "rotation: medians (least-most), the highest peak"
    )


def _table(chosen: dict[str, Tool], runs: dict[str, list[Run]], read_bytes: int) -> Table:
    table = Table()
    for name in ("tool", "version"):
        table.add_column(name, no_wrap=True)
    for name in ("peak GB", "wall s", "CPU s", "GB/s", "times the floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, tool in chosen.items():
        good = [run for run in runs.get(name, []) if run.status == 0]
        if not good:
            table.add_row(name, tool.version or "not installed", "failed" if tool.version else "")
            continue
        table.add_row(
            name,
            tool.version,
            f"{max(run.peak_bytes for run in good) / _GB:.2f}",
            _spread((run.seconds for run in good), 1),
            f"{statistics.median(run.cpu_seconds for run in good):.1f}",
            f"{statistics.median(_throughput(run, read_bytes) for run in good):.2f}",
            _spread(_ratios(runs, name), 2),
        )
    return table


def _throughput(run: Run, read_bytes: int) -> float:
    return (read_bytes + run.written_bytes) / run.seconds / _GB


def _remarks(name: str, runs: list[Run]) -> Iterable[str]:
    for run in runs:
        if run.status:
            yield f"{name} ended with status {run.status}: {run.message}"
            break
    if runs and runs[-1].norms is not None:
        yield f"{name}: {runs[-1].norms} norms folded, {runs[-1].written_bytes:,} bytes written"


def _ratios(runs: dict[str, list[Run]], name: str) -> list[float]:
    """Wall times of a tool as multiples of the floor, round by round."""
    pairs = zip(runs.get(name, []), runs.get(_FLOOR, []), strict=False)
    return [run.seconds / floor.seconds for run, floor in pairs if run.status == floor.status == 0]


def _spread(numbers: Iterable[float], digits: int) -> str:
    values = list(numbers)
    if not values:
        return ""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"


def _broken_bounds(runs: dict[str, list[Run]]) -> list[str]:
    ours, ratios = runs.get(_OURS, []), _ratios(runs, _OURS)
    if not ratios or any(run.status for run in ours):
        return ["onnx-tricks or the floor failed or was not run"]
    broken = []
    peak, ratio = max(run.peak_bytes for run in ours), statistics.median(ratios)
    if not ours[-1].norms:
        broken.append("no norm was folded")
    if peak > _MOST_BYTES:
        broken.append(f"peak memory {peak / _GB:.2f} GB is above {_MOST_BYTES / _GB} GB")
    if ratio > _MOST_TIMES_FLOOR:
        broken.append(f"{ratio:.2f} times the floor is above {_MOST_TIMES_FLOOR} times")
    return broken


if __name__ == "__main__":
    typer.run(main)
