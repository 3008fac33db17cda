"""What the survey calls a defect, and that the page says so."""

from __future__ import annotations

import pytest

from tests.conftest import import_recipes

import_recipes()  # where the exporters are not, skip

from tests.coverage.page import defects, page  # noqa: E402
from tests.coverage.principles import PRINCIPLES  # noqa: E402
from tests.coverage.survey import Cell, Outcome, pairs  # noqa: E402

RESIDUAL = "Add 'x' adds it to another value, as a residual connection does, so its gain cannot"


def cell(outcome: Outcome, norms: int = 2) -> Cell:
    return Cell("llama", "optimum", "", norms=norms, tricks={"all": outcome})


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (Outcome({"fold-norm": 1}, {"fold-norm": ["it is blue"]}), "it is blue"),
        (Outcome({"fold-norm": 1}), "sees 1 norms where PyTorch runs 2"),
        (Outcome({"fold-norm": 2}, cache=(96, 96)), "slim-attention sees no layer"),
        (Outcome({"fold-norm": 2}, problem="the process crashed"), "crashed"),
    ],
)
def test_a_defect_is_named_with_its_export(outcome: Outcome, said: str) -> None:
    (found,) = defects([cell(outcome)])
    assert found.startswith("llama optimum")
    assert said in found


def test_a_site_left_alone_for_a_principle_is_no_defect() -> None:
    outcome = Outcome({"fold-norm": 1}, {"fold-norm": [RESIDUAL]}, before=1e-7, after=2e-7)
    assert not list(defects([cell(outcome)]))
    text = page([cell(outcome)])
    assert "| llama | 2 | 1.0e-07 | 1/2 a | 0/0 | 0/0 |  | 2.0e-07 |" in text
    assert all(one.sentence in text for one in PRINCIPLES)


def test_every_family_is_surveyed_and_no_pair_twice() -> None:
    recipes = import_recipes()
    wanted = pairs()
    assert {family for family, _ in wanted} == set(recipes.families.FAMILIES)
    assert len(wanted) == len(set(wanted))
