"""The run: load, rewrite, verify, save; and the report of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnx_tricks.errors import ParityError, UsageError
from onnx_tricks.graph.layout import DataLayout
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.plan import Output, Plan, make_plan
from onnx_tricks.graph.save import save_model
from onnx_tricks.graph.sizes import Sizes, measure
from onnx_tricks.graph.staging import Staging
from onnx_tricks.models import demo_path
from onnx_tricks.passes import PASSES
from onnx_tricks.report import PassReport, Report
from onnx_tricks.rewrite import Pass, Site, run_passes
from onnx_tricks.verify import Verification, load_runtime
from onnx_tricks.verify import verify as verify_models

__all__ = ["Optimized", "optimize", "select_passes"]

Model = ir.Model | onnx.ModelProto
Progress = Callable[[str], None]
"""Told in a few words what the run is doing."""


class Optimized(NamedTuple):
    """The result of `optimize`.

    Attributes:
        model: The optimised model: of the type that was given, or an `onnx_ir.Model` for a file,
            or one per file name for a folder.
        report: What was done.
    """

    model: Any
    report: Report


def optimize(
    model: str | os.PathLike[str] | Model,
    output: str | os.PathLike[str] | None = None,
    *,
    passes: Sequence[str | Pass] | None = None,
    enable: Sequence[str | Pass] = (),
    skip: Sequence[str] = (),
    verify: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Optimized:
    """Optimise a model: the same function from fewer numbers.

    Args:
        model: A .onnx file, a folder of them as Optimum and the genai builder write it, "demo" for
            the model that comes with the package, or a model in memory (which is not changed).
        output: Where the result goes: a file or a folder, like the input; it may be the input. None
            writes nothing.
        passes: Exactly these passes, by name or as objects with options; None for the default set.
        enable: Passes added to the default set.
        skip: Names of passes to leave out.
        verify: Prove that the result computes what the input computes, before it is written.
        dry_run: Report what would be done; write and verify nothing.
        progress: Told what the run is doing.

    Returns:
        The optimised model and the report.

    Raises:
        ModelError: The input is not a model, is broken, or its weights are missing.
        UsageError: Unknown passes, or an output that cannot be written.
        ParityError: Verification failed; nothing was written. `ParityError.report` tells more.
    """
    chosen = select_passes(passes, enable, skip)
    if verify and not dry_run:
        load_runtime()
    told = progress or (lambda _: None)
    if isinstance(model, (ir.Model, onnx.ModelProto)):
        run = _Run("", chosen, verify and not dry_run, told)
        return run.in_memory(model, None if dry_run else output)
    given = os.fspath(model)
    run = _Run(given, chosen, verify and not dry_run, told)
    source = Path(given)
    if given == "demo" and not source.exists():
        source = demo_path()
    return run.from_files(source, None if dry_run else output)


def select_passes(
    passes: Sequence[str | Pass] | None,
    enable: Sequence[str | Pass] = (),
    skip: Sequence[str] = (),
) -> tuple[Pass, ...]:
    """The passes of a run, in the order of the registry.

    Raises:
        UsageError: A name is not that of a pass.
    """
    known = {one.name: one for one in PASSES}
    asked = [one for one in (*(passes or ()), *enable, *skip) if isinstance(one, str)]
    for name in asked:
        if name not in known:
            raise UsageError(f"there is no pass {name!r}; there are: {', '.join(known)}")
    start = [name for name, one in known.items() if one.default] if passes is None else passes
    wanted = {one if isinstance(one, str) else one.name: one for one in (*start, *enable)}
    order = [name for name in known if name in wanted and name not in skip]
    order += [name for name in wanted if name not in known and name not in skip]
    return tuple(
        known[name]() if isinstance(wanted[name], str) else wanted[name]  # type: ignore[misc]
        for name in order
    )


@dataclasses.dataclass
class _Rewritten:
    """One file of a run: what it was, what it became."""

    model: ir.Model
    layout: DataLayout
    sites: list[Site]


class _Run:
    """One run over the files of one model."""

    def __init__(
        self, given: str, passes: Sequence[Pass], verify: bool, progress: Progress
    ) -> None:
        self.given, self.passes, self.verify, self.progress = given, passes, verify, progress
        self.start = time.perf_counter()
        self.reports = {one.name: PassReport(one.name) for one in passes}
        self.before: Sizes | None = None
        self.after: Sizes | None = None

    def from_files(self, source: Path, output: str | os.PathLike[str] | None) -> Optimized:
        with contextlib.ExitStack() as stack:
            target = output
            if target is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="onnx-tricks-"))
                target = f"{folder}/out" if source.is_dir() else f"{folder}/out.onnx"
            plan = make_plan(source, target)
            staging = None
            if output is not None or self.verify:
                staging = stack.enter_context(Staging(plan))
            found: list[Verification] = []
            models = [self._one_file(one, plan, staging, found) for one in plan.outputs]
            verification = Verification.worst(found) if found else _SKIPPED
            where = None if output is None else os.fspath(output)
            report = self._report(where, verification)
            if staging is not None and output is not None:
                staging.commit()
                models = [load_model(plan.folder / one.target).model for one in plan.outputs]
        if not source.is_dir():
            return Optimized(models[0], report)
        names = [str(one.target) for one in plan.outputs]
        return Optimized(dict(zip(names, models, strict=True)), report)

    def in_memory(self, model: Model, output: str | os.PathLike[str] | None) -> Optimized:
        original = ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
        rewritten = self._rewrite(original.clone(), DataLayout(), "")
        verification = _SKIPPED
        with contextlib.ExitStack() as stack:
            staging, staged, plan = None, None, None
            if output is not None:
                plan = make_plan(None, output)
                staging = stack.enter_context(Staging(plan))
                staged = staging.save(rewritten.model, plan.outputs[0], rewritten.layout)
            if self.verify:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                save_model(original, folder / "original.onnx")
                if staged is None:
                    staged = folder / "optimized.onnx"
                    save_model(rewritten.model, staged)
                self.progress("verifying")
                verification = verify_models(
                    folder / "original.onnx", staged, sites=rewritten.sites
                )
            where = None if output is None else os.fspath(output)
            report = self._report(where, verification)
            if staging is not None and plan is not None:
                staging.commit()
                rewritten.model = load_model(plan.folder / plan.outputs[0].target).model
        if isinstance(model, onnx.ModelProto):
            return Optimized(ir.to_proto(rewritten.model), report)
        return Optimized(rewritten.model, report)

    def _one_file(
        self, one: Output, plan: Plan, staging: Staging | None, found: list[Verification]
    ) -> ir.Model:
        """Rewrite, stage and verify one file."""
        assert one.source is not None
        self.progress(f"reading {one.source.name}")
        loaded = load_model(one.source)
        prefix = f"{one.target}: " if len(plan.outputs) > 1 else ""
        rewritten = self._rewrite(loaded.model, loaded.layout, prefix)
        if staging is not None:
            self.progress(f"writing {one.target}")
            staged = staging.save(rewritten.model, one, rewritten.layout)
            if self.verify:
                self.progress(f"verifying {one.target}")
                found.append(verify_models(one.source, staged, sites=rewritten.sites))
        return rewritten.model

    def _rewrite(self, model: ir.Model, layout: DataLayout, prefix: str) -> _Rewritten:
        before = measure(model)
        self.before = before if self.before is None else self.before + before
        self.progress("rewriting")
        worked = model
        if model.functions:
            # Exporters may keep modules as functions; norms and linear layers meet across them.
            worked = model.clone()
            InlinePass()(worked)
        results = run_passes(worked, self.passes)
        changed = any(result.applied for result in results)
        for result in results:
            self.reports[result.name].add(result, prefix)
        final = worked if changed else model
        after = measure(final)
        self.after = after if self.after is None else self.after + after
        return _Rewritten(final, layout, [site for result in results for site in result.applied])

    def _report(self, output: str | None, verification: Verification) -> Report:
        assert self.before is not None
        assert self.after is not None
        failed = verification.status == "failed"
        report = Report(
            input=self.given,
            output=None if failed else output,
            passes=list(self.reports.values()),
            before=self.before,
            after=self.after,
            verification=verification,
            seconds=time.perf_counter() - self.start,
            peak_rss_bytes=_peak_memory(),
        )
        if failed:
            raise ParityError(f"verification failed: {verification.message}", report)
        return report


_SKIPPED = Verification("skipped", "", None, None, 0, "verification was not asked for")


def _peak_memory() -> int:
    """The largest resident size of this process so far, in bytes (0 where it cannot be told)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
