"""Models that are too large to run whole, compared by the regions that were rewritten."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnx_tricks import FoldNorm, optimize
from onnx_tricks.graph.load import load_model
from onnx_tricks.rewrite import Site, run_passes
from onnx_tricks.verify import verify
from tests.verify.conftest import change, parse

TOO_LITTLE = 1 << 20


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def folded(request, demo, tmp_path_factory) -> tuple[Path, Path, list[Site]]:
    path = demo[request.param]
    result = tmp_path_factory.mktemp("folded") / "model.onnx"
    optimize(path, result, verify=False)
    (run,) = run_passes(load_model(path).model, [FoldNorm()])
    return path, result, run.applied


def test_a_fold_passes_site_by_site(folded) -> None:
    original, result, sites = folded
    verification = verify(original, result, sites=sites, memory_limit=TOO_LITTLE)
    assert (verification.status, verification.reference) == ("passed", "sites")
    assert verification.cases == 9
    assert "region by region" in verification.message


@pytest.mark.parametrize("index", range(1, 9, 3))
def test_one_percent_in_one_weight_of_a_region_is_caught(folded, edited, index) -> None:
    original, result, sites = folded

    def edit(model: onnx.ModelProto) -> None:
        (name,) = {n.input[1] for n in model.graph.node if sites[index].outputs[0] in n.output}
        (weight,) = [t for t in model.graph.initializer if t.name == name]
        change(weight, lambda w: w * 1.01)

    wrong = edited(result, edit)
    verification = verify(original, wrong, sites=sites, memory_limit=TOO_LITTLE)
    assert verification.status == "failed"
    assert sites[index].node in verification.message


def test_without_known_regions_a_large_model_is_skipped(demo) -> None:
    verification = verify(demo["fp32"], demo["fp32"], memory_limit=TOO_LITTLE)
    assert verification.status == "skipped"
    assert "GB" in verification.message


def test_a_region_that_is_not_there_is_never_passed(demo) -> None:
    site = Site("norm", inputs=("nowhere",), outputs=("nothing",))
    verification = verify(demo["fp32"], demo["fp32"], sites=[site], memory_limit=TOO_LITTLE)
    assert verification.status == "skipped"
    assert "norm" in verification.message


def test_a_region_in_the_branches_of_an_if_is_cut_out_of_both(tmp_path) -> None:
    text = """
    g (float[b,4] x, bool c) => (float[b,4] y)
    <float[4] s, float[4,4] w>
    {
      y = If (c) <
        then_branch = one () => (float[b,4] p) {
          p1 = Neg(x)
          n1 = LayerNormalization(p1, s)
          p = MatMul(n1, w)
        },
        else_branch = two () => (float[b,4] q) {
          q1 = Abs(x)
          m1 = LayerNormalization(q1, s)
          q = MatMul(m1, w)
        }>
    }"""
    model = parse(text)
    path, wrong = tmp_path / "if.onnx", tmp_path / "wrong.onnx"
    onnx.save(model, path)
    sites = [Site("norm", count=2, inputs=("p1", "q1"), outputs=("p", "q"))]
    same = verify(path, path, sites=sites, memory_limit=0)
    assert (same.status, same.reference) == ("passed", "sites")
    assert {finding.output for finding in same.findings} == {"p", "q"}
    change(model.graph.initializer[1], lambda w: w * 1.01)
    onnx.save(model, wrong)
    assert verify(path, wrong, sites=sites, memory_limit=0).status == "failed"
