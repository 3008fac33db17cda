"""Run the tricks on one export after the other, and keep what came of it."""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import onnx_tricks
from onnx_tricks.passes import (
    CancelNorm,
    CenterNorm,
    FoldNorm,
    PrecomputeFirstLayer,
    SlimAttention,
)
from onnx_tricks.rewrite import Pass

__all__ = ["TRICKS", "Cell", "Outcome", "kept", "look", "pairs", "survey"]

# Tiny models have large vocabularies for their size, so that any table is above the usual limit.
_TABLE = PrecomputeFirstLayer(max_growth=math.inf)
TRICKS: dict[str, tuple[Pass, ...]] = {
    "fold-norm": (FoldNorm(),),
    "precompute-first-layer": (_TABLE,),
    "slim-attention": (SlimAttention(),),
    "all": (CenterNorm(), FoldNorm(), CancelNorm(), SlimAttention(), _TABLE),
}
"""What is run on every export."""

# What brings an error of its own is verified, and made stricter where that fails, as for a user.
_VERIFIED = ("slim-attention", "all")

_CACHED = ("dynamo18-cache", "dynamo23-cache", "genai")
_EXPORTERS = ("optimum", "dynamo18", "dynamo23", *_CACHED)
_ROUNDING = float(np.finfo(np.float32).eps) / 3  # what rounding once may add
_HUGE = 1e30
_WRONG = 1e-3  # an export with this error computes something else than PyTorch does
_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Outcome:
    """What one trick did to one export.

    Attributes:
        applied: By pass, number of sites.
        skipped: By pass, for each site left out the reason.
        before: Relative error of the export, against PyTorch in float64.
        after: That of the result.
        cache: Cached values per token, before and after.
        problem: A wrong answer, a crash, a refused model; or "".
    """

    applied: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0
    cache: tuple[int | None, int | None] = (None, None)
    problem: str = ""


@dataclasses.dataclass
class Cell:
    """One family by one exporter.

    Attributes:
        family: A key of `FAMILIES`.
        exporter: One of `EXPORTERS`.
        code: Identifies the code that was surveyed.
        missing: Why there is nothing to survey: no export, or one that is itself wrong; or "".
        example: What was computed.
        norms: How many norms PyTorch runs.
        tricks: By name, what came of each.
    """

    family: str
    exporter: str
    code: str
    missing: str = ""
    example: str = ""
    norms: int = 0
    tricks: dict[str, Outcome] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, file: Path) -> Cell:
        """Read what `save` wrote."""
        data = json.loads(file.read_text())
        tricks = {name: Outcome(**one) for name, one in data.pop("tricks").items()}
        return cls(**data, tricks=tricks)

    def save(self, file: Path) -> None:
        """Write the cell, whole or not at all."""
        unfinished = file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(dataclasses.asdict(self), indent=1))
        unfinished.rename(file)


def pairs(
    families: Iterable[str] = (), exporters: Sequence[str] = _EXPORTERS
) -> list[tuple[str, str]]:
    """The families and exporters to survey.

    Optimum exports all of them; the others one family of each model class, since variants of one
    are spelled alike. Decoders are exported with their caches where an exporter can.

    Args:
        families: Keys of `FAMILIES`; all where none are named.
        exporters: Of `EXPORTERS`.
    """
    from onnx_tricks.models.families import AUDIO, DECODERS, FAMILIES, MULTIMODAL

    chosen = list(families) or list(FAMILIES)
    first = {FAMILIES[name].model: name for name in reversed(FAMILIES)}
    only_optimum = {*(set(FAMILIES) - set(first.values())), *AUDIO, *MULTIMODAL}
    fitting = {
        "optimum": set(FAMILIES),
        **dict.fromkeys(("dynamo18", "dynamo23"), set(FAMILIES) - only_optimum - set(DECODERS)),
        **dict.fromkeys(_CACHED, set(DECODERS) - only_optimum),
    }
    return [
        (family, exporter)
        for exporter in exporters
        for family in chosen
        if family in fitting[exporter]
    ]


def kept(folder: Path) -> list[Cell]:
    """The cells of all exports that were surveyed so far, in the order of `pairs`."""
    files = (folder / f"{'-'.join(pair)}.json" for pair in pairs())
    return [Cell.load(file) for file in files if file.exists()]


def survey(
    wanted: Sequence[tuple[str, str]],
    folder: Path,
    *,
    jobs: int = 2,
    told: Callable[[str], None] = lambda _: None,
) -> list[Cell]:
    """Survey exports in parallel, leaving out those that were surveyed with the same code.

    Args:
        wanted: Families and exporters.
        folder: Where the cells are kept.
        jobs: Number of processes.
        told: Told of each cell that is done.

    Returns:
        The cells in the given order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code = _code()
    files = {pair: folder / f"{'-'.join(pair)}.json" for pair in wanted}
    open_ones = [pair for pair, file in files.items() if not _is_current(file, code)]
    while open_ones:
        context = multiprocessing.get_context("spawn")
        with (
            contextlib.suppress(concurrent.futures.process.BrokenProcessPool),
            concurrent.futures.ProcessPoolExecutor(jobs, context, _prepare) as pool,
        ):
            running = {pool.submit(_survey, *p, code, files[p]): p for p in open_ones}
            for done in concurrent.futures.as_completed(running):
                told(done.result())
        _bury(files, code)
        open_ones = [pair for pair, file in files.items() if not _is_current(file, code)]
    return [Cell.load(files[pair]) for pair in wanted]


def _is_current(file: Path, code: str) -> bool:
    return file.exists() and Cell.load(file).code == code


def _bury(files: dict[tuple[str, str], Path], code: str) -> None:
    """Say of cells that took their process down that they did."""
    for (family, exporter), file in files.items():
        begun = file.with_suffix(".begun")
        if begun.exists():
            crash = Outcome(problem="the process crashed")
            Cell(family, exporter, code, tricks={"all": crash}).save(file)
            begun.unlink()


def _prepare() -> None:
    """Set up a process: one thread, no chatter."""
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")


def _survey(family: str, exporter: str, code: str, file: Path) -> str:
    """Survey one export in a process of its own; returns what to tell of it."""
    begun = file.with_suffix(".begun")
    begun.touch()
    cell = look(family, exporter, code)
    cell.save(file)
    begun.unlink()
    if cell.missing:
        return f"{family} {exporter}: {cell.missing}"
    problems = [f"{name}: {one.problem}" for name, one in cell.tricks.items() if one.problem]
    return f"{family} {exporter}: {'; '.join(problems) or 'right'}"


def look(family: str, exporter: str, code: str = "", tricks: Iterable[str] = tuple(TRICKS)) -> Cell:
    """Survey one export.

    Args:
        family: A key of `FAMILIES`.
        exporter: One of `EXPORTERS`.
        code: Put into the cell.
        tricks: Keys of `TRICKS`, tried one by one on what Optimum exports; elsewhere all at once.
    """
    from onnx_tricks.models.quiet import quietly
    from onnx_tricks.models.recipes import RECIPES, exported
    from tests.coverage.examples import examples

    cell = Cell(family, exporter, code)
    try:
        source = exported(family, exporter)
    except Exception as error:  # whatever an exporter throws
        cell.missing = f"not exported: {_line(error)}"
        return cell
    recipe = RECIPES[family]
    with quietly():
        for make in examples(recipe.build(), recipe.task, exporter, source):
            try:
                example = make()
                before = _errors(example.right, example.run(source))
            except Exception as error:  # whatever PyTorch or the export throw on this example
                cell.missing = f"cannot be run: {_line(error)}"
                continue
            if before and max(before.values()) < _WRONG:
                cell.missing = ""
                break
            cell.missing = f"the export itself is wrong: {before}"
        if cell.missing:
            return cell
        cell.example, cell.norms = example.name, example.norms
        for name in tricks if exporter == "optimum" else ["all"]:
            cell.tricks[name] = _try(name, TRICKS[name], source, example, before)
    return cell


def _try(
    name: str, passes: Sequence[Pass], source: Path, example: Any, before: dict[str, float]
) -> Outcome:
    """Run a trick on an export, and the result on the example."""
    outcome = Outcome(before=max(before.values()))
    with tempfile.TemporaryDirectory(prefix="coverage-") as scratch:
        out = Path(scratch) / "out"
        try:
            report = onnx_tricks.optimize(
                source, out, passes=passes, verify=name in _VERIFIED
            ).report
            for one in report.passes:
                outcome.applied[one.name] = one.applied
                outcome.skipped[one.name] = [skip.reason for skip in one.skipped]
            outcome.cache = (
                report.before.cache_values_per_token,
                report.after.cache_values_per_token,
            )
            if name in _VERIFIED and report.verification.status != "passed":
                outcome.problem = f"verification {report.verification.status}"
            after = _errors(example.right, example.run(out))
        except Exception as error:  # that is what the survey is there to find
            outcome.problem = f"{type(error).__name__}: {_line(error)}"
            return outcome
    outcome.after = max(after.values())
    wrong = [n for n, one in after.items() if not one <= max(2 * before[n], _ROUNDING)]
    if wrong:
        outcome.problem = f"wrong {wrong[0]}: {before[wrong[0]]:.1e} became {after[wrong[0]]:.1e}"
    return outcome


def _errors(right: Any, found: Any) -> dict[str, float]:
    """The relative error of each output, in the Euclidean norm."""
    return {name: _error(one, found[name]) for name, one in right.items() if name in found}


def _error(right: Any, found: Any) -> float:
    # Masked scores are infinite, or as large as their type allows.
    finite = np.abs(right) < _HUGE
    if right.shape != found.shape or (np.abs(found[~finite]) < _HUGE).any():
        return math.inf
    size = np.linalg.norm(right[finite]) or 1.0
    return float(np.linalg.norm(found[finite] - right[finite]) / size)


def _line(error: BaseException) -> str:
    """The first line of a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _code() -> str:
    """Identifies all code that a cell depends on."""
    digest = hashlib.sha256()
    rooms = [sorted((_ROOT / room).rglob("*")) for room in ("onnx_tricks", "passes", "models")]
    here = [Path(__file__).with_name(f"{name}.py") for name in ("examples", "reference", "survey")]
    for file in itertools.chain(*rooms, here):
        linked = file.is_relative_to(_ROOT / "onnx_tricks" / "passes")
        if file.suffix in {".py", ".cc", ".h"} and not linked:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
