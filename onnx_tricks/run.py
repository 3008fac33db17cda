"""One run over the files of a model: load, rewrite, verify, save."""

from __future__ import annotations

import contextlib
import dataclasses
import json
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

from onnx_tricks.attempts import Attempt, Prove, until_proven
from onnx_tricks.errors import ParityError
from onnx_tricks.graph.computed import computed_weights, store_weights
from onnx_tricks.graph.layout import DataLayout
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.phases import PHASES, merged_decoder
from onnx_tricks.graph.plan import Output, Plan, make_plan
from onnx_tricks.graph.save import save_model
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.graph.sizes import Sizes, measure
from onnx_tricks.graph.staging import Staging
from onnx_tricks.operators.signature import DOMAIN, STATE_KEY
from onnx_tricks.report import PassReport, Report
from onnx_tricks.rewrite import Pass, PassResult, Site, Skip, run_passes
from onnx_tricks.verify import Sample, Verification, share_out
from onnx_tricks.verify import verify as verify_models

__all__ = ["Model", "Optimized", "Progress", "Rewritten", "Run"]

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


@dataclasses.dataclass
class Rewritten:
    """One file of a run: what it was, what it became.

    Attributes:
        model: The model, rewritten.
        layout: How its weights were stored.
        results: What each pass did.
        before: What the model cost.
        after: What it costs now.
    """

    model: ir.Model
    layout: DataLayout
    results: list[PassResult]
    before: Sizes
    after: Sizes

    @property
    def sites(self) -> list[Site]:
        """Everything that was rewritten."""
        return [site for result in self.results for site in result.applied]


class Run:
    """One run over the files of one model.

    Args:
        given: The model as the caller named it.
        passes: What to run, in order.
        verify: Whether to prove that the results compute what the inputs compute.
        progress: Told what the run is doing.
        samples: Inputs for the proof, on top of those that are made.
    """

    def __init__(
        self,
        given: str,
        passes: Sequence[Pass],
        verify: bool,
        progress: Progress,
        samples: Sequence[Sample] = (),
    ) -> None:
        self.given, self.passes, self.verify, self.progress = given, passes, verify, progress
        self.samples = samples
        self.shares: dict[str, list[Sample]] = {}  # of the samples, by file
        self.start = time.perf_counter()
        self.reports = {one.name: PassReport(one.name) for one in passes}
        self.before: Sizes | None = None
        self.after: Sizes | None = None
        self.apart: frozenset[str] = frozenset()  # passes that no phase of a decoder is for

    def from_files(self, source: Path, output: str | os.PathLike[str] | None) -> Optimized:
        """Optimise a file or a folder; an output of None writes nothing."""
        with contextlib.ExitStack() as stack:
            target = output
            if target is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="onnx-tricks-"))
                target = f"{folder}/out" if source.is_dir() else f"{folder}/out.onnx"
            plan = self._with_one_decoder(make_plan(source, target), stack)
            originals = [one.source for one in plan.outputs if one.source is not None]
            self.shares = share_out(self.samples, {str(path): path for path in originals})
            staging = None
            if output is not None or self.verify:
                staging = stack.enter_context(Staging(plan))
            found: list[Verification] = []
            models = [self._one_file(one, plan, staging, found) for one in plan.outputs]
            verification = Verification.worst(found) if found else _SKIPPED
            where = None if output is None else os.fspath(output)
            report = self._report(where, verification)
            if staging is not None and output is not None:
                states = _states(plan, models)
                if states and source.is_dir():
                    staging.describe(DOMAIN, {"states": states})
                staging.commit()
                models = [load_model(plan.folder / one.target).model for one in plan.outputs]
        if not source.is_dir():
            return Optimized(models[0], report)
        names = [str(one.target) for one in plan.outputs]
        return Optimized(dict(zip(names, models, strict=True)), report)

    def _with_one_decoder(self, plan: Plan, stack: contextlib.ExitStack) -> Plan:
        """Let one decoder serve prompt and steps, where a pass changes the caches of both."""
        spanning = [one for one in self.passes if one.spans_phases]
        decoder = next((o.source for o in plan.outputs if o.target.name in PHASES), None)
        if not spanning or decoder is None or len(plan.outputs) < 2:
            return plan
        merged = stack.enter_context(merged_decoder(decoder.parent))
        if merged is None:
            return plan
        self.progress("looking at the decoder")
        model = load_model(merged).model
        annotate(model)
        found = {one.name: list(one.sites(model)) for one in spanning}
        if not any(isinstance(site, Site) for sites in found.values() for site in sites):
            # One phase alone would get caches that the other does not know.
            self.apart = frozenset(found)
            for name, sites in found.items():
                skipped = [site for site in sites if isinstance(site, Skip)]
                self.reports[name].add(PassResult(name, [], skipped, 0.0), "decoder: ")
            return plan
        joined = plan.with_one_decoder(merged)
        for one in joined.dropped:
            if one.source is not None and one.source != merged:
                sizes = measure(load_model(one.source).model)
                self.before = sizes if self.before is None else self.before + sizes
        return joined

    def in_memory(self, model: Model, output: str | os.PathLike[str] | None) -> Optimized:
        """Optimise a model in memory, which is not changed."""
        original = ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
        samples = share_out(self.samples, {"the model": original})["the model"]
        with contextlib.ExitStack() as stack:
            staging, plan = None, None
            if output is not None:
                plan = make_plan(None, output)
                staging = stack.enter_context(Staging(plan))
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if self.verify:
                save_model(original, folder / "original.onnx")

            def attempt(passes: Sequence[Pass]) -> tuple[Rewritten, Prove]:
                rewritten = self._rewrite(original.clone(), DataLayout(), passes)
                staged = folder / "optimized.onnx"
                if staging is not None and plan is not None:
                    staged = staging.save(rewritten.model, plan.outputs[0], rewritten.layout)
                elif self.verify:
                    save_model(rewritten.model, staged)
                prove = self._prover(
                    folder / "original.onnx", staged, rewritten, samples, "verifying"
                )
                return rewritten, prove

            rewritten, verification = self._settle(attempt, self.passes, "")
            where = None if output is None else os.fspath(output)
            report = self._report(where, verification or _SKIPPED)
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

        def attempt(passes: Sequence[Pass]) -> tuple[Rewritten, Prove]:
            assert one.source is not None
            self.progress(f"reading {one.source.name}")
            loaded = load_model(one.source)
            rewritten = self._rewrite(loaded.model, loaded.layout, passes)
            if staging is None:
                return rewritten, lambda: None
            self.progress(f"writing {one.target}")
            staged = staging.save(rewritten.model, one, rewritten.layout)
            samples, told = self.shares[str(one.source)], f"verifying {one.target}"
            return rewritten, self._prover(one.source, staged, rewritten, samples, told)

        prefix = f"{one.target}: " if len(plan.outputs) > 1 else ""
        apart = self.apart if one.target.name in PHASES else ()
        passes = [each for each in self.passes if each.name not in apart]
        rewritten, verification = self._settle(attempt, passes, prefix)
        if verification is not None:
            found.append(verification)
        return rewritten.model

    def _prover(
        self,
        original: Path,
        staged: Path,
        rewritten: Rewritten,
        samples: Sequence[Sample],
        told: str,
    ) -> Prove:
        """What proves a staged file, where that is asked for."""

        def prove() -> Verification | None:
            if not self.verify:
                return None
            self.progress(told)
            return verify_models(original, staged, inputs=samples, sites=rewritten.sites)

        return prove

    def _settle(
        self, attempt: Attempt[Rewritten], passes: Sequence[Pass], prefix: str
    ) -> tuple[Rewritten, Verification | None]:
        """Rewrite and prove, and note what came of it."""
        rewritten, verification = until_proven(attempt, passes)
        for result in rewritten.results:
            self.reports[result.name].add(result, prefix)
        before, after = rewritten.before, rewritten.after
        self.before = before if self.before is None else self.before + before
        self.after = after if self.after is None else self.after + after
        return rewritten, verification

    def _rewrite(self, model: ir.Model, layout: DataLayout, passes: Sequence[Pass]) -> Rewritten:
        before = measure(model)
        self.progress("rewriting")
        worked = model
        if any(_is_module(function) for function in model.functions.values()):
            # Exporters may keep modules as functions; norms and linear layers meet across them.
            worked = model.clone()
            InlinePass(_is_module)(worked)
        if computed_weights(worked):
            # To a pass, a weight is what is stored.
            worked = model.clone() if worked is model else worked
            store_weights(worked)
        results = run_passes(worked, passes)
        final = worked if any(result.applied for result in results) else model
        return Rewritten(final, layout, results, before, measure(final))

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


def _states(plan: Plan, models: Sequence[ir.Model]) -> dict[str, Any]:
    """The layout of the states of every file that has other caches than it was exported with."""
    return {
        str(one.target): json.loads(model.metadata_props[STATE_KEY])
        for one, model in zip(plan.outputs, models, strict=True)
        if STATE_KEY in model.metadata_props
    }


def _is_module(function: ir.Function) -> bool:
    """Whether a function is a part of the model, and not the plain form of an operator of ours."""
    return function.domain != DOMAIN


_SKIPPED = Verification("skipped", "", None, None, 0, "verification was not asked for")


def _peak_memory() -> int:
    """The largest resident size of this process so far, in bytes (0 where it cannot be told)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
