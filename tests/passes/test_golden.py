"""Every pass on golden graphs: ONNX text in, ONNX text out (`--update-golden` rewrites it)."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from onnx_tricks.passes import PASSES
from onnx_tricks.rewrite import run_passes

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = [
    (one, path) for one in PASSES for path in sorted((GOLDEN / one.name).glob("*.before.onnxtxt"))
]


def test_every_pass_has_golden_graphs() -> None:
    assert {one.name for one, _ in CASES} == {one.name for one in PASSES}


@pytest.mark.parametrize(("pass_type", "path"), CASES, ids=[p.name.split(".")[0] for _, p in CASES])
def test_the_rewritten_graph_is_the_golden_one(pass_type, path: Path, update_golden: bool) -> None:
    model = ir.from_proto(onnx.parser.parse_model(path.read_text()))
    run_passes(model, [pass_type()])
    proto = ir.to_proto(model)
    onnx.checker.check_model(onnx.parser.parse_model(path.read_text()))
    found = onnx.printer.to_text(proto) + "\n"
    expected = path.with_name(path.name.replace(".before.", ".after."))
    if update_golden:
        expected.write_text(found)
    assert found == expected.read_text()
