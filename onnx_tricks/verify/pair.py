"""Two models and what both are run on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_tricks.errors import TricksError, UsageError
from onnx_tricks.graph.interface import Interface, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.operators.signature import STATE_KEY
from onnx_tricks.runtime.sessions import Array, Session, SessionError
from onnx_tricks.verify.cases import Case, Step
from onnx_tricks.verify.decoding import decode, write_text
from onnx_tricks.verify.given import Sample
from onnx_tricks.verify.narrow import narrow_caches, narrower
from onnx_tricks.verify.plans import plans, text
from onnx_tricks.verify.replay import holds_past, replay
from onnx_tricks.verify.siblings import Siblings
from onnx_tricks.verify.steady import steady
from onnx_tricks.verify.tally import Tally, counted

__all__ = ["CandidateError", "NotComparable", "Outputs", "Pair", "Source", "usable"]

# Of the text: rows, its prompt and steps, and how much is written before it, if there is room.
_ROWS, _TEXT, _BEFORE = 16, (7, 1, 1, 4), (64, 16)

Outputs = list[dict[str, Array]]
Source = Callable[[], Session]
"""Opens a session when its turn comes, so that one model at a time is in memory."""


class NotComparable(TricksError):  # noqa: N818 - a refusal, not a failure
    """The original does not run here, so there is nothing to compare with."""


class CandidateError(TricksError):
    """The candidate does not load or run where the original does."""


class Pair:
    """Two models and the cases that the original runs.

    Given inputs come on top of those that are made: they seldom hold padding, several lengths and
    steps as well. Where none that are made will do, the given ones stand alone.

    Attributes:
        reference: The original model.
        candidate: The model that is to compute the same.
        progress: Told what runs next.
        given: Cases of inputs that a user gives.
        cases: What the original runs.
        alone: Why the given cases stand alone, or "".

    Raises:
        UsageError: Given inputs are of no use for these models.
    """

    def __init__(
        self,
        reference: Path,
        candidate: Path,
        progress: Callable[[str], None],
        samples: Sequence[Sample] = (),
    ) -> None:
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
        made = plans(interface, self._given_value, long=long)
        self._remaining = itertools.chain(made, [()] if samples else [])
        self.cases: tuple[Case, ...] = ()
        self.given = tuple(replay(sample, interface) for sample in samples)
        self.alone = ""
        for sample in samples if long else ():
            if holds_past(sample, interface):
                raise UsageError(
                    f"{sample.name} holds filled caches, but the result caches other states than "
                    "the original: give a prompt without caches"
                )

    def run(self, session: Session, state: Interface | None = None) -> Iterator[dict[str, Array]]:
        """Yield the outputs of all steps of all cases.

        Args:
            session: The model.
            state: Its interface, where its caches are not those of the original.
        """
        for case in self.cases:
            caches, presents = case.caches, self._presents
            if state is not None:
                kept = {v.name for v in state.role("cache")} - state.presents.keys()
                still = {name: array for name, array in caches.items() if name in kept}
                caches, presents = state.empty_caches(case.batch) | still, state.presents
            for _, outputs in decode(session, case, presents, caches):
                yield outputs

    def first_outputs(self, source: Source | None = None) -> Outputs:
        """Run the original on the richest cases, of those not tried yet, that it can run.

        Args:
            source: A form of the original other than the file itself.

        Raises:
            NotComparable: There are none; the cases stay as they were.
            SessionError: ONNX Runtime refuses the model itself.
            UsageError: It does not run on inputs that are given.
        """
        session = source() if source else self._open_original()
        before, refusal = self.cases, "no inputs could be made for it"
        of_given = self._outputs_of_given(session)
        for cases in self._remaining:
            self.cases, self.alone = cases, "" if cases else refusal
            try:
                outputs = list(self.run(session))
            except SessionError as error:
                refusal = str(error)
                continue
            if usable(cases, outputs, outputs):
                if cases and self._own_state is not None:
                    outputs = self._outputs_of_own_text(session, cases, outputs)
                self.cases = (*self.cases, *self.given)
                return [*outputs, *of_given]
            refusal = "it computes NaN"
        self.cases = before
        raise NotComparable(
            f"the original runs on no inputs that were tried: {refusal}"
            + ("" if self.given else "; give inputs with --inputs FILE.npz")
        )

    def _outputs_of_given(self, session: Session) -> Outputs:
        """Run the original on what is given, which has to work."""
        outputs: Outputs = []
        for case in self.given:
            self.cases = (case,)
            try:
                outputs += self.run(session)
            except SessionError as error:
                raise UsageError(
                    f"{case.name}: the original, {self.reference.name}, does not run on these "
                    f"inputs: {error}"
                ) from error
            if not usable(self.cases, outputs[-1:], outputs[-1:]):
                raise UsageError(
                    f"{case.name}: the original, {self.reference.name}, computes NaN from these "
                    "inputs, which nothing can be compared with"
                )
        return outputs

    def _outputs_of_own_text(
        self, session: Session, cases: tuple[Case, ...], outputs: Outputs
    ) -> Outputs:
        """Run the original on a text that it writes itself, or stay with the cases as they are."""
        for told in self._of_own_text(session, outputs[0], cases):
            self.cases = told
            try:
                return list(self.run(session))
            except SessionError:  # it takes no steps of several tokens for several rows
                self.cases = cases
        return outputs

    def _of_own_text(
        self, session: Session, outputs: Mapping[str, Array], cases: tuple[Case, ...]
    ) -> Iterator[tuple[Case, ...]]:
        """Put a text that the original writes in place of random tokens, where it is a decoder.

        To judge a rounded cache by noise, which no one writes, would ask of trained weights what
        nobody needs. A short text is judged apart: an error shows most where there is little to
        average over.

        Yields:
            The cases, with the short text, and without it.
        """
        ids, limits = self._interface.role("ids"), [v.limit for v in self._interface.role("ids")]
        logits = next(iter(outputs.values()))
        if limits != [logits.shape[-1]] or not self._presents or len(ids) != 1:
            return
        scores = logits.reshape(-1, logits.shape[-1])[-_ROWS:]
        for before in _BEFORE:
            try:
                tokens = write_text(
                    session, self._presents, self._tell, scores, before + sum(_TEXT)
                )
            except SessionError:  # it takes no such batch, or has no room for so many tokens
                continue
            if np.unique(tokens, return_counts=True)[1].max() > tokens.size / 2:
                return  # it goes round in a circle: one error, many times
            told = tuple(case.of(tokens.ravel()) if case.of else case for case in cases)
            yield *told, self._tell(tokens[:, before:], _TEXT[1:])
            yield told
            return

    def _tell(self, tokens: Array, steps: tuple[int, ...]) -> Case:
        return text(self._interface, self._given_value, tokens, steps)

    def _given_value(self, name: str, batch: int) -> Array | None:
        """What a file beside the original computes for an input: no past that the result lacks."""
        if self._own_state is not None and name in self._presents:
            return None
        return self._siblings(name, batch)

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

    def run_candidate(self, source: Source | None = None) -> Iterator[dict[str, Array]]:
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


def _own_state(model: ir.Model) -> Interface | None:
    """The interface of a model that caches other states than the original does, by its own word."""
    return read_interface(model) if STATE_KEY in model.metadata_props else None


def _steps(cases: tuple[Case, ...]) -> Iterator[tuple[Case, str, Step]]:
    for case in cases:
        for index, step in enumerate(case.steps):
            phase = "step" if index else "prompt"
            yield case, f"{phase} of {case.name}" if case.apart else phase, step


def usable(cases: tuple[Case, ...], outputs: Outputs, original: Outputs) -> bool:
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
