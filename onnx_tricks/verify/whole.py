"""Compare two models by running both whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.traverse import initializers
from onnx_tricks.runtime.sessions import Session, SessionError
from onnx_tricks.verify.given import Sample
from onnx_tricks.verify.noise import nudge_weights
from onnx_tricks.verify.pair import NotComparable, Outputs, Pair, Source, usable
from onnx_tricks.verify.reference import CannotRaise, raise_to_double
from onnx_tricks.verify.steady import steady
from onnx_tricks.verify.tally import SINGLE, Finding, Tally

__all__ = ["Comparison", "compare_models"]

_MORE = 31  # times that cases are repeated, where the outputs are few numbers


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What comparing two models gave.

    Attributes:
        reference: What errors are measured against: "float64", "original" or "sites".
        findings: One per output and phase.
        cases: Number of cases.
        given: How many of them a user gave.
        note: What a reader should know about the reference, or "".
    """

    reference: str
    findings: tuple[Finding, ...]
    cases: int
    given: int
    note: str


def compare_models(
    reference: Path,
    candidate: Path,
    progress: Callable[[str], None],
    samples: Sequence[Sample] = (),
) -> Comparison:
    """Run two models on the same inputs and measure their errors.

    Args:
        reference: The original model.
        candidate: The model that is to compute the same.
        progress: Told what runs next.
        samples: Inputs that a user gives, on top of those that are made.

    Returns:
        The errors of every output.

    Raises:
        NotComparable: The original does not run on any inputs that could be made for it.
        CandidateError: The candidate does not load or run.
        UsageError: The given inputs are of no use for these models.
    """
    pair = Pair(reference, candidate, progress, samples)
    wide, note = _raised(reference)
    progress("running the original")
    try:
        original = pair.first_outputs()
    except SessionError as refusal:
        if wide is None:
            raise NotComparable(f"ONNX Runtime refuses the original: {refusal}") from refusal
        return _both_in_float64(pair, wide, refusal)
    while wide is not None:
        progress("running the original in float64")
        try:
            expected = list(pair.run(wide()))
            if usable(pair.cases, expected, original):
                return _against_float64(pair, wide, expected, original, note)
            original = pair.first_outputs()
        except (NotComparable, SessionError) as error:
            wide, note = None, f"no float64 reference: {error}"
    return _directly(pair, original, note)


def _against_float64(
    pair: Pair, wide: Source, expected: Outputs, original: Outputs, note: str
) -> Comparison:
    """Measure both models, in their own type, against the original in float64."""
    pair.progress("running the result")
    tally = Tally()
    pair.measure(tally, expected, original, pair.run_candidate())
    if tally.uncertain:
        pair.progress("running more cases, since the outputs are few numbers")
        before, seeds = pair.cases, range(1, _MORE + 1)
        pair.cases = tuple(case.again(seed) for seed in seeds for case in before if case.again)
        try:
            pair.measure(tally, pair.run(wide()), pair.run_original(), pair.run_candidate())
        except SessionError:  # given tokens are not all that the original minds
            pair.cases = before
            raise
        pair.cases = (*before, *pair.cases)
    return _compared(pair, "float64", tally, note)


def _both_in_float64(pair: Pair, wide: Source, refusal: SessionError) -> Comparison:
    """Compare models that the runtime cannot run in their own type (bfloat16) in float64."""
    exact, note = _raised(pair.candidate)
    nudged, _ = _raised(pair.reference, pair.candidate)
    if exact is None or nudged is None:
        raise NotComparable(f"ONNX Runtime refuses the original ({refusal}); {note}")
    pair.progress("running both in float64")
    try:
        expected = pair.first_outputs(wide)
        original = list(pair.run(nudged()))
    except SessionError:  # it is not for its type that it is refused
        raise NotComparable(f"ONNX Runtime refuses the original: {refusal}") from refusal
    tally = Tally(eps=SINGLE)
    pair.measure(tally, expected, original, pair.run_candidate(exact))
    note = (
        f"ONNX Runtime refuses the original in its own type ({refusal}): both ran in float64, and "
        "the original's error is what rounding the rewritten weights once amounts to"
    )
    return _compared(pair, "float64", tally, note)


def _directly(pair: Pair, expected: Outputs, note: str) -> Comparison:
    """Compare with the original itself, against what rounding its weights once amounts to."""
    pair.progress("running the original with its weights nudged")
    model = load_model(pair.reference).model
    steady(model)
    nudge_weights(model)
    original = list(pair.run(Session(model, optimised=False)))
    pair.progress("running the result")
    tally = Tally(direct=True)
    pair.measure(tally, expected, original, pair.run_candidate())
    return _compared(pair, "original", tally, note)


def _compared(pair: Pair, reference: str, tally: Tally, note: str) -> Comparison:
    if pair.alone:
        alone = f"judged on the given inputs alone: the original runs on no others ({pair.alone})"
        note = "; ".join(filter(None, [alone, note]))
    return Comparison(reference, tuple(tally.findings()), len(pair.cases), len(pair.given), note)


def _is_double(model: ir.Model) -> bool:
    """Whether all matrices of a model are stored in float64: raising it would change nothing."""
    types = {
        tensor.dtype
        for value in initializers(model)
        if (tensor := value.const_value) is not None
        if tensor.dtype.is_floating_point() and len(tensor.shape) > 1
    }
    return types == {ir.DataType.DOUBLE}


def _raised(path: Path, candidate: Path | None = None) -> tuple[Source | None, str]:
    """Raise a model to float64, and say which ops stay in float32, or why it cannot be raised.

    Given a candidate, the weights that it does not share are nudged before.
    """
    model = load_model(path).model
    steady(model)
    if _is_double(model):
        return None, "no float64 reference: the model is in float64 itself"
    if candidate is not None:
        nudge_weights(model, load_model(candidate).model)
    try:
        narrow = raise_to_double(model)
    except CannotRaise as error:
        return None, f"no float64 reference: {error}"
    note = f"float64 but for {', '.join(sorted(narrow))} in float32" if narrow else ""
    return functools.partial(Session, model, optimised=False), note
