"""How much room for error passes are left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Self

import onnx_ir as ir
import pytest

from onnx_tricks.attempts import until_proven
from onnx_tricks.rewrite import Pass, PassResult, Site, Skip
from onnx_tricks.verify import Verification
from onnx_tricks.verify.tally import Finding


@dataclasses.dataclass
class Try:
    """An attempt that rewrites nothing."""

    results: list[PassResult]


@dataclasses.dataclass(frozen=True)
class Loose(Pass):
    """Leaves as much room for error as it is told."""

    name: ClassVar[str] = "loose"
    summary: ClassVar[str] = ""
    default: ClassVar[bool] = False
    cautious: ClassVar[bool] = True
    tolerance: int = 3

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        yield from ()

    def apply(self, model: ir.Model, site: Site) -> None:
        raise AssertionError

    def stricter(self) -> Self | None:
        return dataclasses.replace(self, tolerance=self.tolerance - 1) if self.tolerance else None


class Daily(Loose):
    """The same, in every run."""

    name: ClassVar[str] = "daily"
    default: ClassVar[bool] = True


def tried(passes: Sequence[Loose], severity: Callable[..., float]) -> list[tuple[int, ...]]:
    """The tolerances that a run tries; what it keeps is the last."""
    found: list[tuple[int, ...]] = []

    def attempt(now: Sequence[Pass]) -> tuple[Try, Callable[[], Verification]]:
        found.append(tuple(one.tolerance for one in now if isinstance(one, Loose)))
        return Try([PassResult(one.name, [Site("here")], [], 0.0) for one in now]), prove

    def prove() -> Verification:
        error = severity(*found[-1])
        status = "passed" if error <= 1 else "failed"
        finding = Finding("y", "prompt", 1.0, error, 1.0, "")
        return Verification(status, "float64", 1.0, error, 1, "", (finding,))

    until_proven(attempt, passes)
    return found


@pytest.mark.parametrize(
    ("errors", "kept"),
    [
        ([0.8], [3]),  # well within
        ([0.95, 0.7], [3, 2]),  # close to the limit: a stricter one is better
        ([1.2, 0.95, 0.7], [3, 2, 1]),  # failed first
        ([0.95, 0.96], [3, 2, 3]),  # no better: it is not this error that is close
        ([1.2, 1.2, 1.2, 1.2], [3, 2, 1, 0]),  # nothing helps
    ],
)
def test_a_pass_gets_stricter_while_the_proof_fails_or_is_close(
    errors: list[float], kept: list[int]
) -> None:
    left = iter([*errors, *errors])
    assert tried([Loose()], lambda _: next(left)) == [(one,) for one in kept]


def test_what_was_asked_for_on_top_yields_before_what_every_run_does() -> None:
    found = tried([Daily(tolerance=1), Loose(tolerance=1)], lambda daily, _: 2.0 if daily else 0.5)
    assert found == [(1, 1), (1, 0), (0, 0)]
