"""The rule of parity, and the sums that it is applied to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from onnx_tricks.runtime.sessions import Array
from onnx_tricks.verify.cases import Step

__all__ = ["SINGLE", "Finding", "Tally", "counted"]

# Over this many numbers the ratio of two roundings is not chance any more.
_ENOUGH = 1000

_CACHE_AXES = 4  # rows, heads, positions, width

SINGLE = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Finding:
    """Errors of one output in one phase, over all cases.

    Attributes:
        output: Name of the output.
        phase: "prompt", or "step" of decoding; and of what, where that is judged apart.
        before: Relative error of the original.
        after: Relative error of the candidate.
        allowed: Largest error that passes.
        case: The case in which the candidate is worst.
        problem: What is wrong besides the error (NaN, another shape), or "".
    """

    output: str
    phase: str
    before: float
    after: float
    allowed: float
    case: str
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the output meets the rule."""
        return not self.problem and self.after <= self.allowed

    @property
    def severity(self) -> float:
        """The error in units of what is allowed."""
        if self.problem:
            return math.inf
        return self.after / self.allowed if self.allowed else math.inf

    def __str__(self) -> str:
        # What is judged apart has the name of the case in its phase.
        among = "" if self.phase.endswith(f" of {self.case}") else f"; {self.case}"
        where = f"{self.output} ({self.phase}{among})"
        if self.problem:
            return f"{where} {self.problem}"
        return (
            f"{where}: error {self.after:.2e}, allowed {self.allowed:.2e} "
            f"(the original's own error is {self.before:.2e})"
        )


@dataclasses.dataclass
class _Sums:
    """Sums of squares of one output in one phase."""

    eps: float
    before: float = 0.0
    after: float = 0.0
    size: float = 0.0
    count: int = 0
    worst: float = -1.0
    case: str = ""


class Tally:
    """Sums up the errors of two models against a reference, and applies the rule.

    The error of an output is ``|y - r| / |r|`` in the Euclidean norm over all elements of all
    cases and steps of a phase. A single rounding error is a random number, and so is the ratio of
    two; their norms over thousands of elements are not, and only to these is the factor of the
    rule applied. Such a norm also does not mind elements that happen to be near zero.

    The rule: ``error(after) <= max(2 error(before), eps / 3)`` with eps of the output's type in the
    original. Rounding an output once costs eps / 3.5 at most in this norm (errors are uniform in
    half a unit in the last place, a unit is between eps / 2 and eps): a candidate may round once
    where the original is exact, and no tolerance is picked by hand.

    Args:
        eps: Of the type that decides, where it is not that of the outputs.
        direct: The reference is the original itself, not float64. The arithmetic errors of both
            then count, which nudged weights do not show in the first layers: measured, a norm
            and a product with a matrix come to 2 to 4 eps of the type that ONNX Runtime computes
            with (float32 at most), so 2 eps count as the original's own.
    """

    def __init__(self, *, eps: float | None = None, direct: bool = False) -> None:
        self._eps = eps
        self._direct = direct
        self._sums: dict[tuple[str, str], _Sums] = {}
        self._problems: dict[tuple[str, str], tuple[str, str]] = {}

    def add(
        self,
        case: str,
        phase: str,
        step: Step,
        reference: Mapping[str, Array],
        original: Mapping[str, Array],
        candidate: Mapping[str, Array],
    ) -> None:
        """Add the outputs of one step.

        Args:
            case: Name of the case.
            phase: "prompt" or "step".
            step: The step.
            reference: What is right, by output name.
            original: What the original computes.
            candidate: What the candidate computes.
        """
        for name, right in reference.items():
            before, after = original[name], candidate.get(name)
            problem = _problem(step, right, before, after)
            if problem:
                self._problems.setdefault((name, phase), (problem, case))
            elif after is not None:
                eps = self._eps or (_eps(before) if _floating(before) else SINGLE)
                sums = self._sums.setdefault((name, phase), _Sums(eps))
                if not _floating(right):
                    continue  # equal
                keep = counted(right, step) & np.isfinite(right) & np.isfinite(before)
                size, error = _squares(right, None, keep), _squares(after, right, keep)
                sums.size += size
                sums.count += int(np.count_nonzero(keep))
                sums.before += _squares(before, right, keep)
                sums.after += error
                if error > sums.worst * size:
                    sums.worst, sums.case = error / size if size else math.inf, case

    @property
    def uncertain(self) -> bool:
        """Whether the rule is broken over so few numbers that it may be chance."""
        return any(
            not finding.passed
            and not finding.problem
            and self._sums[finding.output, finding.phase].count < _ENOUGH
            for finding in self.findings()
        )

    def findings(self) -> Iterator[Finding]:
        """Yield one finding for every output and phase."""
        for key in dict.fromkeys([*self._sums, *self._problems]):
            sums = self._sums.get(key, _Sums(0.0))
            before, after = (math.sqrt(x / (sums.size or 1.0)) for x in (sums.before, sums.after))
            problem, case = self._problems.get(key, ("", sums.case))
            if self._direct:
                before = math.hypot(before, 2 * min(sums.eps, SINGLE))
            yield Finding(*key, before, after, max(2 * before, sums.eps / 3), case, problem)


def counted(array: Array, step: Step) -> npt.NDArray[np.bool_]:
    """Say which elements of an output count: all but those at padded positions.

    Args:
        array: An output; positions lie along the first axis of their number, batch excepted. Of
            caches with as many heads, what is padding along either axis is left out.
        step: The step that computed it.

    Returns:
        A mask that broadcasts to the shape of the output.
    """
    kept: npt.NDArray[np.bool_] = np.ones((1,) * array.ndim, bool)
    # Keys and values may be stacked.
    rows = max(array.ndim - _CACHE_AXES, 0)
    if step.valid is None or array.ndim < 2 or array.shape[rows] != len(step.valid):
        return kept
    for mask in (step.valid, step.valid[:, -step.new :]):
        axes = [axis for axis in range(rows + 1, array.ndim) if array.shape[axis] == mask.shape[1]]
        for axis in axes if array.ndim >= _CACHE_AXES else axes[:1]:
            shape = [1] * array.ndim
            shape[rows], shape[axis] = mask.shape
            kept = kept & mask.astype(bool).reshape(shape)
        if axes:
            break
    return kept


def _floating(array: Array) -> bool:
    return bool(np.issubdtype(array.dtype, np.floating))


def _eps(array: Array) -> float:
    return float(np.finfo(str(array.dtype)).eps)


def _squares(value: Array, reference: Array | None, keep: npt.NDArray[np.bool_]) -> float:
    wide = value.astype(np.float64)
    if reference is not None:
        wide = np.subtract(wide, reference, where=keep, out=np.zeros_like(wide))
    return float(np.sum(np.square(wide, where=keep, out=np.zeros_like(wide))))


def _problem(step: Step, reference: Array, original: Array, candidate: Array | None) -> str:
    """Say what no error can express, or ""."""
    if candidate is None:
        return "is missing"
    if candidate.shape != original.shape:
        return f"has shape {list(candidate.shape)}, the original {list(original.shape)}"
    if not _floating(reference):
        # Where rounding changes the original's own choice, the candidate may choose either.
        wrong = (candidate != original) & (candidate != reference) & counted(reference, step)
        return f"differs in {wrong.sum()} of {wrong.size} elements" if wrong.any() else ""
    if not _floating(candidate):
        return f"has type {candidate.dtype}, the original {original.dtype}"
    lost = ~np.isfinite(candidate) & np.isfinite(original)
    if lost.any():
        return f"has {lost.sum()} NaN or infinite elements where the original has none"
    infinite = np.isinf(original) & (original == reference) & counted(reference, step)
    if (infinite & (candidate != original)).any():
        return "is finite where the original is infinite"
    return ""
