"""Compare two models by running both whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_tricks.errors import TricksError
from onnx_tricks.graph.interface import Interface, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.operators.signature import STATE_KEY
from onnx_tricks.runtime.sessions import Array, Session, SessionError
from onnx_tricks.verify.decoding import decode, write_text
from onnx_tricks.verify.inputs import Case, Step, plans, text
from onnx_tricks.verify.narrow import narrow_caches, narrower
from onnx_tricks.verify.noise import nudge_weights
from onnx_tricks.verify.reference import CannotRaise, raise_to_double
from onnx_tricks.verify.siblings import Siblings
from onnx_tricks.verify.steady import steady
from onnx_tricks.verify.tally import SINGLE, Finding, Tally, counted

__all__ = ["CandidateError", "Comparison", "NotComparable", "compare_models"]

_MORE = 31  # times that cases are repeated, where the outputs are few numbers

_Outputs = list[dict[str, Array]]
# Of the text: rows, its prompt and steps, and how much is written before it, if there is room.
_ROWS, _TEXT, _BEFORE = 16, (7, 1, 1, 4), (64, 16)
# Opens a session when its turn comes, so that one model at a time is in memory.
_Source = Callable[[], Session]


class NotComparable(TricksError):  # noqa: N818 - a refusal, not a failure
    """The original does not run here, so there is nothing to compare with."""


class CandidateError(TricksError):
    """The candidate does not load or run where the original does."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What comparing two models gave.

    Attributes:
        reference: What errors are measured against: "float64", "original" or "sites".
        findings: One per output and phase.
        cases: Number of cases.
        note: What a reader should know about the reference, or "".
    """

    reference: str
    findings: tuple[Finding, ...]
    cases: int
    note: str


def compare_models(reference: Path, candidate: Path, progress: Callable[[str], None]) -> Comparison:
    """Run two models on the same inputs and measure their errors.

    Args:
        reference: The original model.
        candidate: The model that is to compute the same.
        progress: Told what runs next.

    Returns:
        The errors of every output.

    Raises:
        NotComparable: The original does not run on any inputs that could be made for it.
        CandidateError: The candidate does not load or run.
    """
    pair = _Pair(reference, candidate, progress)
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
            if _usable(pair.cases, expected, original):
                return _against_float64(pair, wide, expected, original, note)
            original = pair.first_outputs()
        except (NotComparable, SessionError) as error:
            wide, note = None, f"no float64 reference: {error}"
    return _directly(pair, original, note)


class _Pair:
    """Two models and the cases that the original runs."""

    def __init__(self, reference: Path, candidate: Path, progress: Callable[[str], None]) -> None:
        self.reference = reference
        self.candidate = candidate
        self.progress = progress
        models = [load_model(path).model for path in (reference, candidate)]
        interface = read_interface(models[0])
        self._presents = interface.presents
        self._own_state = _own_state(models[1])
        # A model that draws random numbers gets the same ones in every run.
        self._original, self._result = (
            model if steady(model) else path
            for model, path in zip(models, (reference, candidate), strict=True)
        )
        self._interface, self._siblings = interface, Siblings(reference)
        narrow = None if self._own_state is None else narrower(interface, self._own_state)
        self._narrow = narrow
        long = self._own_state is not None
        self._remaining = plans(interface, self._siblings, long=long)
        self.cases: tuple[Case, ...] = ()

    def run(self, session: Session, state: Interface | None = None) -> Iterator[dict[str, Array]]:
        """Yield the outputs of all steps of all cases.

        Args:
            session: The model.
            state: Its interface, where its caches are not those of the original.
        """
        for case in self.cases:
            caches, presents = case.caches, self._presents
            if state is not None:
                caches, presents = state.empty_caches(case.batch), state.presents
            for _, outputs in decode(session, case, presents, caches):
                yield outputs

    def first_outputs(self, source: _Source | None = None) -> _Outputs:
        """Run the original on the richest cases, of those not tried yet, that it can run.

        Args:
            source: A form of the original other than the file itself.

        Raises:
            NotComparable: There are none; the cases stay as they were.
            SessionError: ONNX Runtime refuses the model itself.
        """
        session = source() if source else self._open_original()
        before, refusal = self.cases, "no inputs could be made for it"
        for cases in self._remaining:
            self.cases = cases
            try:
                outputs = list(self.run(session))
            except SessionError as error:
                refusal = str(error)
                continue
            if _usable(cases, outputs, outputs):
                if self._own_state is None:
                    return outputs
                self.cases = self._of_own_text(session, outputs[0], cases)
                try:
                    return list(self.run(session))
                except SessionError:  # it takes no steps of several tokens for several rows
                    self.cases = cases
                    return outputs
            refusal = "it computes NaN"
        self.cases = before
        raise NotComparable(f"the original runs on no inputs that were tried: {refusal}")

    def _of_own_text(
        self, session: Session, outputs: Mapping[str, Array], cases: tuple[Case, ...]
    ) -> tuple[Case, ...]:
        """Put a text that the original writes in place of random tokens, where it is a decoder.

        To judge a rounded cache by noise, which no one writes, would ask of trained weights what
        nobody needs. A short text is judged apart: an error shows most where there is little to
        average over.
        """
        ids, limits = self._interface.role("ids"), [v.limit for v in self._interface.role("ids")]
        logits = next(iter(outputs.values()))
        if limits != [logits.shape[-1]] or not self._presents or len(ids) != 1:
            return cases
        scores = logits.reshape(-1, logits.shape[-1])[-_ROWS:]
        for before in _BEFORE:
            try:
                tokens = write_text(
                    session, self._presents, self._tell, scores, before + sum(_TEXT)
                )
            except SessionError:  # it takes no such batch, or has no room for so many tokens
                continue
            told = tuple(case.of(tokens.ravel()) if case.of else case for case in cases)
            return *told, self._tell(tokens[:, before:], _TEXT[1:])
        return cases

    def _tell(self, tokens: Array, steps: tuple[int, ...]) -> Case:
        return text(self._interface, self._siblings, tokens, steps)

    def _open_original(self) -> Session:
        """Open the original, with caches of the candidate's type where that is narrower."""
        if self._narrow is None:
            return Session(self._original)
        model = load_model(self.reference).model
        narrow_caches(model, self._narrow)
        return Session(model)

    def run_original(self) -> Iterator[dict[str, Array]]:
        """Yield the outputs of the original in its own type."""
        return self.run(self._open_original())

    def run_candidate(self, source: _Source | None = None) -> Iterator[dict[str, Array]]:
        """Yield the outputs of the candidate.

        Raises:
            CandidateError: It does not load or run.
        """
        try:
            session = source() if source else Session(self._result)
            yield from self.run(session, self._own_state)
        except SessionError as error:
            raise CandidateError(f"ONNX Runtime does not run it: {error}") from error

    def measure(
        self,
        tally: Tally,
        expected: Iterable[dict[str, Array]],
        original: Iterable[dict[str, Array]],
        candidate: Iterable[dict[str, Array]],
    ) -> None:
        """Sum up the errors of both models."""
        steps = _steps(self.cases)
        hidden = set() if self._own_state is None else set(self._presents.values())
        for (case, phase, step), *values in zip(steps, expected, original, candidate, strict=True):
            right, ours, theirs = ({n: a for n, a in v.items() if n not in hidden} for v in values)
            tally.add(case.name, phase, step, right, ours, theirs)

    def compared(self, reference: str, tally: Tally, note: str) -> Comparison:
        """Say what was found."""
        return Comparison(reference, tuple(tally.findings()), len(self.cases), note)


def _against_float64(
    pair: _Pair, wide: _Source, expected: _Outputs, original: _Outputs, note: str
) -> Comparison:
    """Measure both models, in their own type, against the original in float64."""
    pair.progress("running the result")
    tally = Tally()
    pair.measure(tally, expected, original, pair.run_candidate())
    if tally.uncertain:
        pair.progress("running more cases, since the outputs are few numbers")
        before, seeds = pair.cases, range(1, _MORE + 1)
        pair.cases = tuple(case.again(seed) for seed in seeds for case in before if case.again)
        pair.measure(tally, pair.run(wide()), pair.run_original(), pair.run_candidate())
        pair.cases = (*before, *pair.cases)
    return pair.compared("float64", tally, note)


def _both_in_float64(pair: _Pair, wide: _Source, refusal: SessionError) -> Comparison:
    """Compare models that the runtime cannot run in their own type (bfloat16) in float64."""
    exact, note = _raised(pair.candidate)
    nudged, _ = _raised(pair.reference, pair.candidate)
    if exact is None or nudged is None:
        raise NotComparable(f"ONNX Runtime refuses the original ({refusal}); {note}")
    pair.progress("running both in float64")
    expected = pair.first_outputs(wide)
    original = list(pair.run(nudged()))
    tally = Tally(eps=SINGLE)
    pair.measure(tally, expected, original, pair.run_candidate(exact))
    note = (
        f"ONNX Runtime refuses the original in its own type ({refusal}): both ran in float64, and "
        "the original's error is what rounding the rewritten weights once amounts to"
    )
    return pair.compared("float64", tally, note)


def _directly(pair: _Pair, expected: _Outputs, note: str) -> Comparison:
    """Compare with the original itself, against what rounding its weights once amounts to."""
    pair.progress("running the original with its weights nudged")
    model = load_model(pair.reference).model
    steady(model)
    nudge_weights(model)
    original = list(pair.run(Session(model, optimised=False)))
    pair.progress("running the result")
    tally = Tally(direct=True)
    pair.measure(tally, expected, original, pair.run_candidate())
    return pair.compared("original", tally, note)


def _own_state(model: ir.Model) -> Interface | None:
    """The interface of a model that caches other states than the original does, by its own word."""
    return read_interface(model) if STATE_KEY in model.metadata_props else None


def _raised(path: Path, candidate: Path | None = None) -> tuple[_Source | None, str]:
    """Raise a model to float64, and say which ops stay in float32, or why it cannot be raised.

    Given a candidate, the weights that it does not share are nudged before.
    """
    model = load_model(path).model
    steady(model)
    if candidate is not None:
        nudge_weights(model, load_model(candidate).model)
    try:
        narrow = raise_to_double(model)
    except CannotRaise as error:
        return None, f"no float64 reference: {error}"
    note = f"float64 but for {', '.join(sorted(narrow))} in float32" if narrow else ""
    return functools.partial(Session, model, optimised=False), note


def _steps(cases: tuple[Case, ...]) -> Iterator[tuple[Case, str, Step]]:
    for case in cases:
        for index, step in enumerate(case.steps):
            phase = "step" if index else "prompt"
            yield case, f"{phase} of {case.name}" if case.apart else phase, step


def _usable(cases: tuple[Case, ...], outputs: _Outputs, original: _Outputs) -> bool:
    """Say whether outputs can be a reference for those of the original.

    They hold no NaN, nothing infinite that the original does not, and are not wholly different:
    on inputs that a model is not made for, it may read memory that nobody has written.
    """
    for (_, _, step), ours, theirs in zip(_steps(cases), outputs, original, strict=True):
        for name, array in ours.items():
            if array.shape != theirs[name].shape:
                return False
            if np.issubdtype(array.dtype, np.floating) and array.size:
                lost = np.isnan(array) | (np.isinf(array) & np.isfinite(theirs[name]))
                keep = counted(array, step)
                if (lost & keep).any() or _unlike(array, theirs[name], keep):
                    return False
    return True


def _unlike(array: Array, other: Array, keep: npt.NDArray[np.bool_]) -> bool:
    """Whether two outputs differ by more than half of their size."""
    finite = np.isfinite(array) & np.isfinite(other) & keep
    ours, theirs = (np.where(finite, one, 0).astype(np.float64) for one in (array, other))
    return float(np.linalg.norm(ours - theirs)) > 0.5 * float(np.linalg.norm(ours))
