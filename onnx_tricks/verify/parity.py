"""Decide whether an optimised model computes what the original computes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from onnx_tricks.errors import UsageError
from onnx_tricks.graph.phases import PHASES, PROMPT, merged_decoder
from onnx_tricks.rewrite import Site
from onnx_tricks.runtime.sessions import load_runtime
from onnx_tricks.verify.given import Inputs, Sample, read_samples, share_out
from onnx_tricks.verify.memory import memory_shortage
from onnx_tricks.verify.pair import CandidateError, NotComparable
from onnx_tricks.verify.sites import compare_sites
from onnx_tricks.verify.tally import Finding
from onnx_tricks.verify.whole import Comparison, compare_models

__all__ = ["Verification", "verify"]

_STATUSES = ("passed", "skipped", "failed")  # from best to worst


@dataclasses.dataclass(frozen=True)
class Verification:
    """Whether a candidate computes what the original computes.

    Attributes:
        status: "passed", "failed" or "skipped" (nothing could be compared).
        reference: What errors are measured against: "float64", "original" (the original itself;
            its own error is then what rounding its weights once amounts to), "sites" (one
            rewritten region after the other, in float64), or "" when skipped.
        error_before: Relative error of the original, at the output that comes closest to what is
            allowed or exceeds it most; None where nothing was measured.
        error_after: Relative error of the candidate at the same output.
        cases: Number of cases (prompts, batches; regions when by sites) that were compared.
        given: How many of the cases are inputs that a user gave.
        message: Why it failed or was skipped, and what to do; how the reference was made.
        findings: The errors of every output.
    """

    status: str
    reference: str
    error_before: float | None
    error_after: float | None
    cases: int
    message: str
    findings: tuple[Finding, ...] = ()
    given: int = 0

    @classmethod
    def worst(cls, results: Iterable[Verification]) -> Verification:
        """Merge the results of the files of one export: the worst, all cases counted.

        Raises:
            ValueError: There are no results.
        """
        found = list(results)
        result = max(found, key=lambda one: (_STATUSES.index(one.status), one.severity))
        return dataclasses.replace(
            result, cases=sum(one.cases for one in found), given=sum(one.given for one in found)
        )

    @property
    def severity(self) -> float:
        """The largest error in units of what is allowed."""
        return max((finding.severity for finding in self.findings), default=0.0)

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Return what a report holds, ready for JSON."""
        return {
            "status": self.status,
            "reference": self.reference,
            "error_before": self.error_before,
            "error_after": self.error_after,
            "cases": self.cases,
            "given": self.given,
            "message": self.message,
        }


def verify(
    reference: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    *,
    inputs: Inputs | Sequence[Inputs | Sample] = (),
    sites: Sequence[Site] = (),
    memory_limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Verify that a candidate computes what the original computes.

    Both run in ONNX Runtime, fully optimised, on the same seeded inputs: prompts of several
    lengths, a batch with left padding, decoding step by step with caches, images, features,
    whatever the model's inputs call for. Errors are measured against the original raised to
    float64. The rule is `Tally`'s: the candidate's error may be twice the original's own.

    Args:
        reference: The original: an .onnx file, or a folder of them as exporters write it.
        candidate: The candidate: likewise; files of two folders are paired by name.
        inputs: Inputs of your own, on top of those or in their place where none can be made: .npz
            files or mappings, each with the arrays of one run by the names of the inputs. Caches
            that are not given are empty. In a folder they go to the models that they fit.
        sites: The regions that were rewritten. Models too large for the memory at hand are
            compared by them; without, such models are skipped.
        memory_limit: Bytes that verification may use; None for what the machine has free.
        progress: Told what runs next.

    Returns:
        The verdict. A model that does not run here is "skipped", never "passed".

    Raises:
        UsageError: ONNX Runtime is not installed, the paths do not pair up, or given inputs fit
            no model.
        ModelError: A file is not a model.
    """
    load_runtime()
    told = progress or (lambda _: None)
    samples = read_samples(inputs)
    with contextlib.ExitStack() as stack:
        pairs = _pairs(Path(reference), Path(candidate), stack)
        shares = share_out(samples, {str(original): original for original, _ in pairs})
        return Verification.worst(
            _verify_file(original, result, shares[str(original)], sites, memory_limit, told)
            for original, result in pairs
        )


def _pairs(
    reference: Path, candidate: Path, stack: contextlib.ExitStack
) -> list[tuple[Path, Path]]:
    for path in (reference, candidate):
        if not path.exists():
            raise UsageError(f"{path} does not exist.")
    if reference.is_dir() != candidate.is_dir():
        raise UsageError(
            f"{reference} and {candidate}: give two .onnx files or two folders, not one of each."
        )
    if not reference.is_dir():
        return [(reference, candidate)]
    files = sorted(reference.glob("**/*.onnx"))
    pairs = [(file, candidate / file.relative_to(reference)) for file in files]
    pairs = _with_one_decoder(pairs, stack)
    if not pairs:
        raise UsageError(f"{reference} holds no .onnx file.")
    missing = [str(result.relative_to(candidate)) for _, result in pairs if not result.is_file()]
    if missing:
        raise UsageError(f"{candidate} lacks {', '.join(missing)}, which {reference} holds.")
    return pairs


def _with_one_decoder(
    pairs: list[tuple[Path, Path]], stack: contextlib.ExitStack
) -> list[tuple[Path, Path]]:
    """Compare a decoder for prompt and steps with both phases of the original."""
    phases = [(ours, theirs) for ours, theirs in pairs if ours.name in PHASES]
    if not phases:
        return pairs
    single = phases[0][1].with_name(PROMPT)
    others = {theirs for _, theirs in phases} - {single}
    if not single.is_file() or not others or any(path.is_file() for path in others):
        return pairs
    merged = stack.enter_context(merged_decoder(phases[0][0].parent))
    if merged is None:
        return pairs
    return [pair for pair in pairs if pair not in phases] + [(merged, single)]


def _verify_file(
    reference: Path,
    candidate: Path,
    samples: Sequence[Sample],
    sites: Sequence[Site],
    memory_limit: int | None,
    progress: Callable[[str], None],
) -> Verification:
    shortage = memory_shortage(reference, candidate, memory_limit)
    try:
        if not shortage:
            return _judge(compare_models(reference, candidate, progress, samples))
        if not sites:
            raise NotComparable(f"{shortage}, and no rewritten regions are known to compare alone")
        found = compare_sites(reference, candidate, sites, progress)
        if samples:
            found = dataclasses.replace(found, note=f"{found.note}, not on the given inputs")
        return _judge(found)
    except NotComparable as error:
        return Verification("skipped", "", None, None, 0, f"{reference.name}: {error}")
    except CandidateError as error:
        return Verification("failed", "", None, None, 0, f"{candidate.name}: {error}")


def _judge(comparison: Comparison) -> Verification:
    worst = max(comparison.findings, key=lambda finding: finding.severity, default=None)
    if worst is None:
        return Verification("skipped", "", None, None, 0, "no output could be compared")
    return Verification(
        status="passed" if worst.passed else "failed",
        reference=comparison.reference,
        error_before=worst.before if math.isfinite(worst.before) else None,
        error_after=worst.after if math.isfinite(worst.after) else None,
        cases=comparison.cases,
        message="; ".join(filter(None, ["" if worst.passed else str(worst), comparison.note])),
        findings=comparison.findings,
        given=comparison.given,
    )
