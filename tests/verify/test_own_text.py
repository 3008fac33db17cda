"""Slim decoders are judged on a short text too, which the original writes."""

from __future__ import annotations

from pathlib import Path

import onnx_tricks
from onnx_tricks.models import demo_path
from onnx_tricks.passes import SlimAttention
from onnx_tricks.verify import verify
from tests.conftest import Export

OWN = {"prompt of text of its own", "step of text of its own"}


def test_only_decoders_with_other_caches_are_judged_on_a_text_of_their_own(tmp_path: Path) -> None:
    original, slim = demo_path() / "model.onnx", tmp_path / "slim.onnx"
    onnx_tricks.optimize(original, slim, passes=[SlimAttention()], verify=False)
    assert {found.phase for found in verify(original, slim).findings} == {"prompt", "step"} | OWN
    assert {found.phase for found in verify(original, original).findings} == {"prompt", "step"}


def test_what_averages_out_over_a_long_prompt_is_noticed_in_a_short_text(
    export: Export, tmp_path: Path
) -> None:
    original, slim = export("llama_heads") / "model.onnx", tmp_path / "slim.onnx"
    onnx_tricks.optimize(original, slim, passes=[SlimAttention(rank=1)], verify=False)
    severity = {found.phase: found.severity for found in verify(original, slim).findings}
    assert severity["prompt of text of its own"] > 1.2 * severity["prompt"]
    report = onnx_tricks.optimize(original, slim, passes=[SlimAttention()]).report
    assert report.verification.status == "passed"
    assert min(row["rank"] for row in report.passes[0].details) > 1
