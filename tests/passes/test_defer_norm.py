"""defer-norm on toy graphs and on real exports: shared scales, biases, gated blocks, refusals."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_tricks
from onnx_tricks import DeferNorm, FoldNorm
from onnx_tricks.rewrite import PassResult, run_passes
from tests import toys
from tests.conftest import Export

NORM = "n = RMSNormalization<epsilon=0.01>(x, ones) "
GATED = "a = MatMul(n, w) u = MatMul(n, w2) "
HALVES = "a, b = Split<axis=-1, num_outputs=2>(n)"
DOWN = "y = MatMul(h, w_narrow)"
# By name: what reads the norm, and how many products are scaled.
READERS = {
    "one product": ("y = MatMul(n, w)", 1),
    "three products": (
        f"{GATED} b = MatMul(n, w_back) s = Add(a, u) y = Add(s, b)", 3),
    "bias in an Add": ("p = MatMul(n, w) y = Add(p, c)", 1),
    "bias in a Gemm": ("f = Reshape(n, flat) y = Gemm<alpha=0.5, beta=2.0>(f, w, c)", 1),
    "weight stored transposed": ("f = Reshape(n, flat) y = Gemm<transB=1>(f, w_transposed, c)", 1),
    "scaled by a number": ("k = Mul(n, half) y = MatMul(k, w)", 1),
    "a smooth gate": (f"{GATED} s = Sigmoid(a) o = Mul(a, s) h = Mul(o, u) {DOWN}", 2),
    "a ReLU as gate": (f"{GATED} o = Relu(a) h = Mul(o, u) {DOWN}", 1),
    "no gate but the product": (f"{GATED} h = Mul(u, a) {DOWN}", 1),
    "a ReLU alone": (f"a = MatMul(n, w) h = Relu(a) {DOWN}", 1),
    "a ReLU in front of a wide layer": ("a = MatMul(n, w) h = Relu(a) y = MatMul(h, w_wide)", 1),
}  # fmt: skip


def toy(body: str, kind: str = "float", **options: str) -> onnx.ModelProto:
    rng = np.random.default_rng(2)
    extra = {
        "w_narrow": rng.standard_normal((toys.F, 4)),
        "w_wide": rng.standard_normal((toys.F, 40)),
        "w_back": rng.standard_normal((toys.D, toys.F)),
    }
    extra = {name: array.astype(toys.TYPES[kind]) for name, array in extra.items()}
    return toys.model(NORM + body, kind=kind, opset=23, extra=extra, **options)


def defer(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
    model = ir.from_proto(proto)
    (result,) = run_passes(model, [DeferNorm()])
    return ir.to_proto(model), result


@pytest.mark.parametrize("kind", ["float", "double"])
@pytest.mark.parametrize("name", READERS)
def test_rows_are_divided_behind_the_linear_layers(name: str, kind: str) -> None:
    body, scaled = READERS[name]
    before = toy(body, kind)
    after, result = defer(before)
    assert (result.count, result.skipped) == (1, [])
    operators = Counter(node.op_type for node in after.graph.node)
    assert "RMSNormalization" not in operators
    assert operators["ReduceSumSquare"] == 1  # one scale for all readers
    assert operators["Mul"] - Counter(n.op_type for n in before.graph.node)["Mul"] == scaled
    inputs = toys.feeds(before)
    (found,), (expected,) = (toys.run(one, inputs) for one in (after, before))
    assert toys.error(found, expected) <= 10 * float(np.finfo(found.dtype).eps)
    again, second = defer(after)
    assert (second.count, second.skipped) == (0, [])
    assert again.SerializeToString() == after.SerializeToString()


def test_a_norm_behind_a_norm_measures_rows_that_are_divided() -> None:
    second = "r = RMSNormalization<epsilon=0.01>(h, ones) y = MatMul(r, w)"
    before = toy(f"h = MatMul(n, w_square) {second}")
    after, result = defer(before)
    assert result.count == 2
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 2e-6


def test_the_scale_moves_on_only_to_fewer_numbers() -> None:
    counts = []
    for name in ("a smooth gate", "a ReLU as gate", "a ReLU in front of a wide layer"):
        ((row,),) = (site.details() for site in defer(toy(READERS[name][0]))[1].applied)
        counts.append(row["scaled_after"])
    assert counts == [toys.F + 4, 4, toys.F]


REFUSALS = {
    "gain": ("y = MatMul(m, w) m = Identity(n)", "ones", "g", "fold-norm moves it into"),
    "residual": ("h = MatMul(n, w_square) y = Add(h, n)", "", "", "has to be divided before"),
    "output": ("y = MatMul(n, w) k = Identity(n)", "", "", "is an output of the graph"),
    "activation": ("k = Tanh(n) y = MatMul(k, w)", "", "", "has to be divided before"),
    "convolution": ("t = Transpose<perm=[0,2,1]>(n) y = Conv(t, w_conv)", "", "",
        "is no product of rows with one matrix"),
    "rows moved": ("t = Gather<axis=1>(n, picks) y = MatMul(t, w)", "", "", "in another order"),
    "channels apart": (
        f"{HALVES} p = MatMul(a, w_half_channels) q = MatMul(b, w_half_channels) y = Add(p, q)",
        "", "", "in another order"),
    "skip norm": ("y = MatMul(n, w)", "RMSNormalization<epsilon=0.01>(x, ones)",
        "com.microsoft.SkipSimplifiedLayerNormalization(x, x, ones)", "in one operator"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_qualify_is_refused_with_its_reason(case: str) -> None:
    body, old, new, reason = REFUSALS[case]
    body = body if case != "gain" else "y = MatMul(n, w)"
    text = (NORM + body).replace(old, new) if old else NORM + body
    outputs = "y, k" if "k = Identity" in body else "y"
    before = toys.model(text, opset=23, outputs=outputs)
    after, result = defer(before)
    assert result.count == 0
    assert reason in " ".join(skip.reason for skip in result.skipped)
    assert after.SerializeToString() == ir.to_proto(ir.from_proto(before)).SerializeToString()


def test_half_precision_is_deferred_only_where_its_products_stay_in_range() -> None:
    body = "y = MatMul(n, w)"
    assert "cannot be looked at" in defer(toy(body, "float16"))[1].skipped[0].reason
    for size, count in ((1, 1), (20_000, 0)):
        text = f"x = Gather(table, ids) {NORM} {body}"
        before = toys.model(text, kind="float16", opset=23, inputs="ids[b,s]")
        for one in before.graph.initializer:
            if one.name == "table":
                array = (ir.serde.deserialize_tensor(one).numpy() * size).clip(-6e4, 6e4)
                one.CopyFrom(ir.to_proto(ir.tensor(array.astype(np.float16), name="table")))
        result = defer(before)[1]
        assert result.count == count
        assert all("too near the end of FLOAT16" in skip.reason for skip in result.skipped)


@pytest.mark.parametrize(
    ("recipe", "exporter", "dtype", "file", "norms"),
    [
        ("tiny-llama", "optimum", "fp32", "model", 9),
        ("smollm2-2", "optimum", "fp16", "model", 4),
        ("llama", "dynamo18", "fp32", "model", 5),
        ("llama", "dynamo23", "fp32", "model", 5),
        ("t5", "optimum", "fp32", "decoder_model", 7),
    ],
)
def test_behind_folding_an_export_meets_the_error_rule(
    export: Export, recipe: str, exporter: str, dtype: str, file: str, norms: int
) -> None:
    source = export(recipe, exporter, dtype) / f"{file}.onnx"
    report = onnx_tricks.optimize(source, passes=[FoldNorm(), "defer-norm"]).report
    assert report.passes[1].applied == norms, report.passes[1].skipped
    assert report.verification.status == "passed", report.verification.message
    assert report.verification.error_after <= 2 * report.verification.error_before


def test_behind_all_other_passes_the_error_rule_is_met(export: Export) -> None:
    names = ["center-norm", "fold-norm", "cancel-norm", "merge-skipless", "slim-attention"]
    passes = [*names, onnx_tricks.PrecomputeFirstLayer(max_growth=1000), "defer-norm"]
    report = onnx_tricks.optimize(export("phi3_heads", "optimum"), passes=passes).report
    applied = {one.name: one.applied for one in report.passes}
    assert applied == {
        **dict(zip(names, (0, 5, 0, 0, 2), strict=True)),
        "precompute-first-layer": 1,
        # One norm is in the table; slim keys of the other layer are made of centred rows.
        "defer-norm": 3,
    }
    assert report.verification.status == "passed", report.verification.message
