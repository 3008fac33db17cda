"""center-norm on toy graphs and real exports: every term, every reader, every refusal."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_tricks
from onnx_tricks import CenterNorm, FoldNorm
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.rewrite import PassResult, Skip, run_passes
from tests import toys
from tests.conftest import Export, import_recipes

trained = import_recipes().trained

D = toys.D
# Every toy stream ends in two norms, so that one term may be centred as the model runs.
NORMS = (
    "z = LayerNormalization<epsilon=0.00001>(x, g, beta) h = MatMul(z, w_other) r = Add(x, h) "
    "n = LayerNormalization<epsilon=0.00001>(r, g1) y = MatMul(n, w)"
)
CENTRED = "mu = ReduceMean<keepdims=1>(r, last) d = Sub(r, mu) "
SQUARE = "p = Pow(d, two) m = ReduceMean<keepdims=1>(p, last) a = Add(m, eps) s = Sqrt(a) "

TERMS = {
    "MatMul": "x = MatMul(h0, w_square)",
    "MatMul and bias": "q = MatMul(h0, w_square) x = Add(c_square, q)",
    "weight stored transposed": "t = Transpose<perm=[1,0]>(w_square) x = MatMul(h0, t)",
    "Gemm": "f = Reshape(h0, flat) k = Gemm<alpha=0.5>(f, w_square, c_square) "
    "sh = Shape(h0) x = Reshape(k, sh)",
    "Gemm transposed": "f = Reshape(h0, flat) k = Gemm<transB=1>(f, w_square, c_square) "
    "sh = Shape(h0) x = Reshape(k, sh)",
    "FusedMatMul": "x = com.microsoft.FusedMatMul<transB=1, alpha=0.5>(h0, w_square)",
    "weight on the left": "t = Transpose<perm=[0,2,1]>(h0) q = MatMul(w_square, t) "
    "x = Transpose<perm=[0,2,1]>(q)",
    "Conv": "t = Transpose<perm=[0,2,1]>(h0) k = Conv(t, w_conv_square, c_square) "
    "x = Transpose<perm=[0,2,1]>(k)",
    "Einsum": 'x = Einsum<equation="bsd,df->bsf">(h0, w_square)',
    "LayerScale": "q = MatMul(h0, w_square) k = Add(q, c_square) x = Mul(g, k)",
    "scaled whole": "q = MatMul(h0, w_square) k = Mul(q, half) x = Add(k, c_square)",
    "class token": "q = MatMul(h0, w_square) x = Concat<axis=1>(q, token)",
    "rows moved": "q = MatMul(h0, w_square) t = Transpose<perm=[1,0,2]>(q) "
    "u = Gather<axis=0>(t, picks) k = Slice(u, start, stop, axis0) x = Transpose<perm=[1,0,2]>(k)",
}
AT_RUN_TIME = {
    "an activation": "x = Tanh(h0)",
    "an input": "x = Identity(h0)",
    "a grouped Conv": "t = Transpose<perm=[0,2,1]>(h0) k = Conv<group=2>(t, w_conv_grouped) "
    "x = Transpose<perm=[0,2,1]>(k)",
    "another norm": "x = LayerNormalization(h0, g, beta)",
}
SPELLINGS = {
    "operator": "n = LayerNormalization<epsilon=0.00001>(r, g, beta)",
    "decomposed": CENTRED + SQUARE + "i = Div(d, s) k = Mul(i, g) n = Add(k, beta)",
    "times a reciprocal": CENTRED
    + SQUARE
    + "v = Reciprocal(s) i = Mul(d, v) k = Mul(i, g) n = Add(k, beta)",
    "an RMSNorm of centred rows": CENTRED + SQUARE + "e = Identity(d) i = Div(d, s) "
    "k = Mul(i, g) v = Add(k, beta) n = Add(v, e)",
}


def toy(body: str, kind: str = "float", opset: int = 18, **options: object) -> onnx.ModelProto:
    """A toy model with the constants that only these tests need."""
    rng = np.random.default_rng(11)
    extra = {
        "c_square": rng.standard_normal(D),
        "token": rng.standard_normal((2, 1, D)),
        "w_conv_square": rng.standard_normal((D, D, 1)) / 4,
        "w_conv_grouped": rng.standard_normal((D, D // 2, 1)) / 4,
        "w_other": rng.standard_normal((D, D)) / 4,
        "places": rng.standard_normal((toys.V, D)),
    }
    extra = {name: array.astype(toys.TYPES[kind]) for name, array in extra.items()}
    options.setdefault("inputs", "h0[b,s,D]")
    return toys.model(body, kind=kind, opset=opset, extra=extra, **options)  # type: ignore[arg-type]


def center(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
    model = ir.from_proto(proto)
    (result,) = run_passes(model, [CenterNorm()])
    return ir.to_proto(model), result


def check(before: onnx.ModelProto, norms: int, at_run_time: int = 0) -> onnx.ModelProto:
    """Centre a toy model, hold it to the error rule and to idempotence."""
    after, result = center(before)
    assert [skip.reason for skip in result.skipped] == []
    assert result.count == norms
    operators = Counter(node.op_type for node in after.graph.node)
    assert not operators["LayerNormalization"]
    assert operators["Sub"] == at_run_time
    again, second = center(after)
    assert (second.count, second.skipped) == (0, [])
    assert again.SerializeToString() == after.SerializeToString()
    inputs = toys.feeds(before)
    for found, expected in zip(toys.run(after, inputs), toys.run(before, inputs), strict=True):
        unit = float(np.finfo(found.dtype).eps)
        assert toys.error(found, expected) <= 6 * unit
    return after


@pytest.mark.parametrize("opset", [17, 18, 23])
@pytest.mark.parametrize("term", TERMS)
def test_every_linear_term_is_centred_in_its_weights(term: str, opset: int) -> None:
    check(toy(f"{TERMS[term]} {NORMS}", opset=opset), norms=2)


@pytest.mark.parametrize("term", AT_RUN_TIME)
def test_a_term_without_weights_loses_its_mean_as_the_model_runs(term: str) -> None:
    before = toy(f"{AT_RUN_TIME[term]} {NORMS}", inputs="h0[b,s,D]")
    after, result = center(before)
    assert result.count == 2
    assert Counter(node.op_type for node in after.graph.node)["Sub"] == 1
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_layer_norm_becomes_an_rms_norm(spelling: str) -> None:
    body = f"x = MatMul(h0, w_square) r = Add(x, c_square) {SPELLINGS[spelling]} y = MatMul(n, w)"
    after = check(toy(body), norms=1)
    means = [node for node in after.graph.node if node.op_type == "ReduceMean"]
    assert len(means) == 1


def test_norms_that_share_one_difference_lose_it() -> None:
    body = (
        f"x = MatMul(h0, w_square) r = Add(x, c_square) {CENTRED} {SQUARE} i = Div(d, s) "
        "k = Mul(i, g) u = MatMul(k, w) k2 = Mul(i, g1) v = MatMul(k2, w2) y = Add(u, v)"
    )
    check(toy(body), norms=2)


def test_the_bias_of_a_norm_that_enters_the_stream_in_parts_stays_as_it_is() -> None:
    first = CENTRED + SQUARE + "i = Div(d, s) k = Mul(i, g) x = Add(k, c_square) "
    norms = NORMS.replace("r =", "t =").replace("(r,", "(t,")
    before = toy(f"r = MatMul(h0, w_square) {first} {norms}")
    after, result = center(before)
    assert (result.count, result.skipped) == (3, [])
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


@pytest.mark.parametrize("keep", [0, 1])
def test_a_norm_of_the_mean_of_rows_ends_the_stream_as_one_of_rows_does(keep: int) -> None:
    pooled = f"x = MatMul(h0, w_square) {NORMS} "
    pooled = pooled.replace(
        "r = Add(x, h)", f"t = Add(x, h) r = ReduceMean<keepdims={keep}>(t, axis1)"
    )
    check(toy(pooled), norms=2)


def test_embeddings_are_centred_row_by_row() -> None:
    body = f"e = Gather(table, ids) p = Gather(places, ids) x = Add(e, p) {NORMS}"
    after = check(toy(body, inputs="ids[b,s]"), norms=2)
    arrays = {one.name: ir.serde.deserialize_tensor(one).numpy() for one in after.graph.initializer}
    for name in ("table", "places", "w_other"):
        np.testing.assert_allclose(arrays[name].mean(-1), 0, atol=1e-7)


def test_the_lookup_in_a_table_with_a_tied_head_is_centred_instead_of_the_table() -> None:
    body = NORMS.replace("MatMul(n, w)", "MatMul(n, head)")
    before = toy(
        f"x = Gather(table, ids) head = Transpose<perm=[1,0]>(table) {body}", inputs="ids[b,s]"
    )
    after = check(before, norms=2, at_run_time=1)
    tables = [
        next(one for one in proto.graph.initializer if one.name == "table")
        for proto in (before, after)
    ]
    assert ir.serde.deserialize_tensor(tables[0]).numpy().tobytes() == (
        ir.serde.deserialize_tensor(tables[1]).numpy().tobytes()
    )


def test_what_something_else_reads_too_keeps_its_value() -> None:
    body = f"q = MatMul(h0, w_square) x = Add(q, h0) {NORMS} k = Tanh(q)"
    _, result = center(toy(body, outputs="y, k"))
    assert result.count == 0
    assert "2 terms for 2 norms" in result.skipped[0].reason
    body = body.replace("x = Add(q, h0)", "x = Add(q, c_square)")
    check(toy(body, outputs="y, k"), norms=2, at_run_time=1)


IF_BODY = """
x = MatMul(h0, w_square)
flag = Cast<to=9>(f)
y = If(flag) <
  then_branch = yes () => (float[b,s,F] t) {
    qt = MatMul(x, w2_square) zt = LayerNormalization(qt, g, beta) t = MatMul(zt, w)
  },
  else_branch = no () => (float[b,s,F] e) {
    qe = MatMul(x, w2_square) ze = LayerNormalization(qe, g, beta) ke = MatMul(ze, w) e = Neg(ke)
  }
>
"""


def test_branches_that_share_outer_weights_are_centred_together() -> None:
    extra = {"w2_square": toys.weights(5)["w_square"].astype(np.float32)}
    before = toys.model(IF_BODY, inputs="h0[b,s,D] f[]", extra=extra)
    after, result = center(before)
    assert (result.count, len(result.applied)) == (2, 1)
    for flag in (0.0, 1.0):
        inputs = toys.feeds(before) | {"f": np.array(flag, dtype=np.float32)}
        assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


LN = "z = LayerNormalization(x, g, beta) y = MatMul(z, w)"
X = "x = MatMul(h0, w_square) "
REFUSALS = {
    "output": (X + LN, "y, x", "is an output of the graph"),
    "projection": (X + LN + " k = MatMul(x, w2)", "y, k", "reads 'x' too and is no LayerNorm"),
    "RMSNorm": (X + LN + " k = SimplifiedLayerNormalization(x, g)", "y, k", "reads 'x' too"),
    "activation": (X + LN + " k = Tanh(x)", "y, k", "reads 'x' too and is no LayerNorm"),
    "clamped": (
        X + "t = Clip(x) r = Add(t, x) " + LN.replace("(x", "(r"),
        "y",
        "no weight of its own",
    ),
    "heads": (X + "t = Reshape(x, heads) k = Tanh(t) " + LN, "y, k", "takes its channels apart"),
    "split": (X + LN + " k, l = Split<axis=-1>(x, halves)", "y, k, l", "takes its channels apart"),
    "other axis": (
        X + "t = Transpose<perm=[0,2,1]>(x) z = LayerNormalization(t, gain5) y = Tanh(z)",
        "y",
        "has no weight of its own",
    ),
    "not worth it": ("x = Tanh(h0) " + LN, "y", "1 terms for 1 norms"),
    "no weight at all": (
        "x = Tanh(h0) " + LN + " k = LayerNormalization(x, g1) l = MatMul(k, w2)",
        "y, l",
        "1 terms for 2 norms",
    ),
    "statistic": (
        X + "z, m = LayerNormalization(x, g, beta) y = MatMul(z, w) k = Identity(m)",
        "y, k",
        "a statistic of its input",
    ),
    "gain from outside": (
        X + "z = LayerNormalization(x, h0_row) y = MatMul(z, w)",
        "y",
        "gain is not a constant",
    ),
    "quantised": (
        "q, s, o = DynamicQuantizeLinear(w_square) k = DequantizeLinear(q, s, o) "
        "x = MatMul(h0, k) " + LN,
        "y",
        "has no weight of its own",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_qualify_is_refused_with_its_reason(case: str) -> None:
    body, outputs, reason = REFUSALS[case]
    inputs = "h0[b,5,D]" + (" h0_row[D]" if "h0_row" in body else "")
    before = toys.model(
        body, outputs=outputs, inputs=inputs, extra={"gain5": np.ones(5, dtype=np.float32)}
    )
    after, result = center(before)
    assert result.count == 0
    assert reason in " ".join(skip.reason for skip in result.skipped)
    assert after.SerializeToString() == ir.to_proto(ir.from_proto(before)).SerializeToString()


# recipe, exporter, type, file, norms, means taken off at run time (tied heads, an embedding norm).
EXPORTS = [
    ("gpt2", "optimum", "fp32", "model", 5, 1),
    ("gpt2", "dynamo18", "fp32", "model", 5, 0),
    ("gpt2", "dynamo23", "fp32", "model", 5, 0),
    ("opt", "optimum", "fp32", "model", 5, 1),
    ("gpt_neox", "optimum", "fp16", "model", 5, 0),
    ("phi", "optimum", "fp32", "model", 3, 0),
    ("bloom", "optimum", "fp32", "model", 5, 1),
    ("cohere", "optimum", "fp32", "model", 3, 1),
    ("vit", "optimum", "fp32", "model", 5, 0),
    ("whisper", "optimum", "fp32", "encoder_model", 5, 1),
    ("whisper", "optimum", "fp32", "decoder_model_merged", 14, 2),
    ("whisper-tiny.en", "optimum", "fp16", "decoder_model", 13, 1),
]


@pytest.mark.parametrize(("recipe", "exporter", "dtype", "file", "norms", "means"), EXPORTS)
def test_an_export_loses_its_layer_norms_and_meets_the_error_rule(
    export: Export, recipe: str, exporter: str, dtype: str, file: str, norms: int, means: int
) -> None:
    source = export(recipe, exporter, dtype) / f"{file}.onnx"
    model, report = onnx_tricks.optimize(source, passes=["center-norm"])
    assert report.passes[0].applied == norms
    left = [node for node in model.graph.all_nodes() if node.op_type == "LayerNormalization"]
    assert len(left) == len(report.passes[0].skipped)
    centred = [n for n in model.graph.all_nodes() if "/centred/" in n.name and n.op_type == "Sub"]
    assert len(centred) == means
    assert report.verification.status == "passed", report.verification.message
    assert report.verification.error_after <= 2 * report.verification.error_before


def test_the_trained_vision_transformer_loses_its_layer_scales_too() -> None:
    report = onnx_tricks.optimize(trained.vit_path(), passes=["center-norm"]).report
    assert (report.passes[0].applied, report.passes[0].skipped) == (25, [])
    assert report.verification.status == "passed"
    assert report.verification.error_after <= 2 * report.verification.error_before
    assert report.before.parameters - report.after.parameters >= 24 * 384


def test_a_post_norm_model_is_refused_but_for_its_embedding() -> None:
    report = onnx_tricks.optimize(
        trained.minilm_path(), passes=["center-norm"], dry_run=True
    ).report
    assert report.passes[0].applied == 1
    reasons = [skip.reason for skip in report.passes[0].skipped]
    assert len(reasons) == 6
    assert all("enters the residual stream" in one or "too and is no Lay" in one for one in reasons)


@pytest.mark.parametrize("order", [("center-norm", "fold-norm"), ("fold-norm", "center-norm")])
def test_with_folding_gpt2_has_no_layer_norm_and_no_gain_left(
    export: Export, tmp_path: Path, order: tuple[str, str]
) -> None:
    source = export("mgm", "dynamo23")
    first = {"center-norm": CenterNorm(), "fold-norm": FoldNorm()}
    model = ir.load(source / "model.onnx")
    results = run_passes(model, [first[name] for name in order])
    assert [result.count for result in results] == [17, 17]
    norms = Counter(n.op_type for n in model.graph.all_nodes() if "Normalization" in n.op_type)
    assert norms == {"RMSNormalization": 17}
    scales = {n.inputs[1] for n in model.graph.all_nodes() if n.op_type == "RMSNormalization"}
    assert len(scales) == 1
    ir.save(model, tmp_path / "model.onnx")
    found = onnx_tricks.verify(source / "model.onnx", tmp_path / "model.onnx")
    assert found.status == "passed", found.message
    shutil.rmtree(tmp_path)


def test_a_model_of_rms_norms_is_left_alone(export: Export) -> None:
    report = onnx_tricks.optimize(
        export("smollm2-2", "dynamo23"), passes=["center-norm"], dry_run=True
    ).report
    assert (report.passes[0].applied, report.passes[0].skipped) == (0, [])


def test_where_the_proof_fails_half_precision_is_left_alone(export: Export) -> None:
    stricter = CenterNorm().stricter()
    assert stricter is not None
    assert stricter.stricter() is None
    for dtype, skipped in (("fp16", 1), ("fp32", 0)):
        model = load_model(export("gpt2", "optimum", dtype) / "model.onnx").model
        annotate(model)
        found = list(stricter.sites(model))
        reasons = [one.reason for one in found if isinstance(one, Skip)]
        assert sum("failed the proof" in reason for reason in reasons) == skipped
