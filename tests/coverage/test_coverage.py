"""A part of the survey: what applied before applies still, and is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Export, import_recipes

import_recipes()  # where the exporters are not, skip

from tests.coverage.survey import look  # noqa: E402

BASELINE = Path(__file__).parent / "baseline.json"
STOOD: dict[str, dict[str, int]] = json.loads(BASELINE.read_text())


@pytest.mark.filterwarnings("ignore")  # of other libraries, while they export
@pytest.mark.parametrize("name", STOOD)
def test_what_applied_to_a_family_applies_still(
    name: str, export: Export, update_golden: bool
) -> None:
    cell = look(*name.split(), tricks=["all"])
    assert not cell.missing
    (outcome,) = cell.tricks.values()
    assert not outcome.problem
    if update_golden:
        baseline = {**json.loads(BASELINE.read_text()), name: outcome.applied}
        lines = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in baseline.items()]
        BASELINE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    lost = {one: n for one, n in STOOD[name].items() if outcome.applied.get(one, 0) < n}
    assert update_golden or not lost, f"{outcome.applied} applied; {outcome.skipped}"


def test_the_part_is_of_forty_families_at_least() -> None:
    assert len({name.split()[0] for name in STOOD}) >= 40
