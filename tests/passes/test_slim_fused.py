"""slim-attention on graphs with fused attention operators, and on packed projections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnx_tricks.graph.load import load_model
from onnx_tricks.optimizer import optimize
from onnx_tricks.passes import SlimAttention
from onnx_tricks.runtime.decoder import Decoder

Export = Callable[..., Path]


def _operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in load_model(path).model.graph.all_nodes())


@pytest.mark.parametrize(
    ("dtype", "operator", "factor"),
    [("fp32", "GroupQueryAttention", 1.9), ("fp16", "MultiHeadAttention", 1.6)],
)
def test_models_of_the_genai_builder_are_slimmed(
    dtype: str, operator: str, factor: float, export: Export, tmp_path: Path
) -> None:
    source = export("tiny-llama", "genai", dtype) / "model.onnx"
    assert _operators(source)[operator] == 4
    report = optimize(source, tmp_path / "slim.onnx", passes=[SlimAttention()]).report
    assert report.verification.status == "passed"
    assert operator not in _operators(tmp_path / "slim.onnx")
    rows = report.passes[0].details
    before, after = (sum(row[f"cache_values_{w}"] for row in rows) for w in ("before", "after"))
    assert before / after >= factor


def test_rows_padded_on_the_right_go_on_as_those_of_group_query_attention(
    export: Export, tmp_path: Path
) -> None:
    source = export("tiny-llama", "genai") / "model.onnx"
    optimize(source, tmp_path / "slim.onnx", passes=[SlimAttention()], verify=False)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    mask = np.ones_like(tokens)
    mask[1, 6:] = 0
    both = Decoder(source), Decoder(tmp_path / "slim.onnx")
    prompts = [one.step(tokens, mask) for one in both]
    np.testing.assert_allclose(prompts[0][0], prompts[1][0], atol=2e-4)
    np.testing.assert_allclose(prompts[0][1, :6], prompts[1][1, :6], atol=2e-4)


@pytest.mark.parametrize(
    ("recipe", "operators"),
    [
        ("whisper-tiny.en", {"SlimHiddenAttention": 4, "SlimCrossAttention": 4}),
        ("mgm", {"SlimHiddenAttention": 8}),
    ],
)
def test_graphs_fused_by_onnx_runtime_are_slimmed(
    recipe: str, operators: dict[str, int], export: Export, tmp_path: Path
) -> None:
    report = optimize(export(recipe, "ort"), tmp_path, passes=[SlimAttention()]).report
    assert report.verification.status == "passed"
    assert not report.passes[0].skipped
    assert Counter(row["operator"] for row in report.passes[0].details) == operators


def test_queries_that_shared_a_product_with_keys_keep_their_norm(
    export: Export, tmp_path: Path
) -> None:
    source = export("qwen3_heads", "genai") / "model.onnx"
    report = optimize(source, tmp_path / "slim.onnx", passes=[SlimAttention()]).report
    assert report.verification.status == "passed"
    assert report.passes[0].applied == 2


@pytest.mark.parametrize("family", ["gpt_neox", "phi3_heads", "codegen", "bloom", "mpt"])
def test_queries_leave_the_product_they_shared_with_keys_and_values(
    family: str, export: Export, tmp_path: Path
) -> None:
    source = export(family) / "model.onnx"
    report = optimize(source, tmp_path / "slim.onnx", passes=[SlimAttention()], verify=False).report
    rows = report.passes[0].details
    width = rows[0]["cache_values_before"] // 2
    # Projection and way back of the residual, and vectors of the width of a layer.
    more = sum(2 * width * row.get("rank", 0) + 4 * width for row in rows)
    assert report.after.parameters <= report.before.parameters + more
