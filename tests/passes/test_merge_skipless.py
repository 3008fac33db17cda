"""merge-skipless on toy blocks and on decoders without skip connections and norms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_tricks
from onnx_tricks import MergeSkipless
from onnx_tricks.rewrite import PassResult, run_passes
from onnx_tricks.verify.sites import compare_sites
from tests import toys
from tests.conftest import Export, import_recipes

import_recipes()


from onnx_tricks.models import skipless, tokens  # noqa: E402

D, F = toys.D, toys.F
X = "x = MatMul(h0, w_o) "
QKV = "q = MatMul(x, w_q) k = MatMul(x, w_k) v = MatMul(x, w_v) "
HEADS = (
    "qs = Reshape(q, heads) qt = Transpose<perm=[0,2,1,3]>(qs) "
    "ks = Reshape(k, heads) kt = Transpose<perm=[0,2,3,1]>(ks) "
    "vs = Reshape(v, heads) vt = Transpose<perm=[0,2,1,3]>(vs) "
)
MIX = (
    "s = MatMul(qt, kt) p = Softmax<axis=-1>(s) m = MatMul(p, vt) "
    "mt = Transpose<perm=[0,2,1,3]>(m) a = Reshape(mt, rows) "
)
FFN = "b = MatMul(a, w_p) u = MatMul(b, w_up) t = Tanh(u) y = MatMul(t, w_down)"
BLOCK = QKV + HEADS + MIX + FFN
GEMM = (
    "xf = Reshape(x, flat) qf = Gemm(xf, w_q, c_q) kf = Gemm<transB=1>(xf, w_kt, c_k) "
    "vf = Gemm<alpha=0.5, beta=0.5>(xf, w_v, c_v) sh = Shape(x) q = Reshape(qf, sh) "
    "k = Reshape(kf, sh) v = Reshape(vf, sh) "
)
GROUPS = (
    "k = MatMul(x, w_k8) v = MatMul(x, w_v8) qs = Reshape(q, heads) "
    "qt = Transpose<perm=[0,2,1,3]>(qs) ks = Reshape(k, pairs) ku = Unsqueeze(ks, axis3) "
    "ke = Expand(ku, twice) kr = Reshape(ke, heads4) kt = Transpose<perm=[0,2,3,1]>(kr) "
    "vs = Reshape(v, pairs) vu = Unsqueeze(vs, axis3) ve = Expand(vu, twice) "
    "vr = Reshape(ve, heads4) vt = Transpose<perm=[0,2,1,3]>(vr) "
)
PARALLEL = (
    "b = MatMul(a, w_p) u = MatMul(x, w_up) t = Tanh(u) d = MatMul(t, w_down) z = Add(b, d) "
    "y = MatMul(z, w_head)"
)
BIASES = "q0 = MatMul(x, w_q) q = Add(q0, c_q) k0 = MatMul(x, w_k) k = Add(k0, c_k) "
# By name: the block, and how many D x D matrices go with it.
BLOCKS = {
    "in series": (X + BLOCK, 2),
    "gated": (X + QKV + HEADS + MIX + FFN.replace("Tanh(u)", "Mul(u, g2)").replace(
        "u = ", "g2 = MatMul(b, w_up2) u = "), 2),
    "embedding": ("x = Gather(table, ids) " + BLOCK, 2),
    "embedding and positions": (
        "e = Gather(table, ids) n = Gather(places, ids) x = Add(e, n) " + BLOCK, 2),
    "positions stored for each token": ("e = MatMul(h0, w_o) x = Add(e, fixed) " + BLOCK, 2),
    "biases throughout": (
        "x0 = MatMul(h0, w_o) x = Add(c_o, x0) " + BIASES + "v0 = MatMul(x, w_v) v = Add(v0, c_v) "
        + HEADS + MIX + "b0 = MatMul(a, w_p) b = Add(b0, c_p) u0 = MatMul(b, w_up) "
        "u = Add(u0, c) t = Tanh(u) y = MatMul(t, w_down)", 2),
    "biases of projections alone": (X + BIASES + "v = MatMul(x, w_v) " + HEADS + MIX + FFN, 2),
    "a bias behind the output alone": (
        X + QKV + HEADS + MIX + "b0 = MatMul(a, w_p) b = Add(b0, c_p) u = MatMul(b, w_up) "
        "t = Tanh(u) y = MatMul(t, w_down)", 2),
    "Gemm": (X + GEMM + HEADS + MIX + FFN, 2),
    "Gemm behind Gemm": (
        "hf = Reshape(h0, flat32) of = Gemm<beta=0.5>(hf, w_o, c_o) "
        "x = Reshape(of, back) " + GEMM + HEADS + MIX + FFN, 2),
    "weights stored transposed": (
        "wt = Transpose<perm=[1,0]>(w_kt) " + X + QKV.replace("w_k)", "wt)")
        + HEADS + MIX + FFN, 2),
    "FusedMatMul": (
        X + QKV.replace("MatMul(x, w_k)", "com.microsoft.FusedMatMul<transB=1, alpha=0.5>(x, w_kt)")
        + HEADS + MIX + FFN, 2),
    "grouped keys": (X + "q = MatMul(x, w_q) " + GROUPS + MIX + FFN, 2),
    "packed": (
        X + "qkv = MatMul(x, w_qkv) q, k, v = Split<axis=-1>(qkv, thirds) " + HEADS + MIX + FFN, 2),
    "packed with a bias": (
        X + "qkv0 = MatMul(x, w_qkv) qkv = Add(qkv0, c_qkv) q, k, v = Split<axis=-1>(qkv, thirds) "
        + HEADS + MIX + FFN, 2),
    "packed by head": (
        X + "qkv = MatMul(x, w_by_head) r = Reshape(qkv, packs) "
        "qs, ks, vs = Split<axis=-1>(r, fours) "
        "qt = Transpose<perm=[0,2,1,3]>(qs) kt = Transpose<perm=[0,2,3,1]>(ks) "
        "vt = Transpose<perm=[0,2,1,3]>(vs) " + MIX + FFN, 2),
    "in parallel": (X + QKV + HEADS + MIX + PARALLEL, 2),
    "in parallel with biases": (
        X + QKV + HEADS + MIX + PARALLEL.replace("b = MatMul(a, w_p)", "b0 = MatMul(a, w_p) "
        "b = Add(b0, c_p)").replace("d = MatMul(t, w_down)", "d0 = MatMul(t, w_down) "
        "d = Add(d0, c_o)").replace("y = MatMul(z, w_head)", "y0 = MatMul(z, w_head) "
        "y = Add(y0, c)"), 2),
    "scaled and cast rows": (
        "x0 = MatMul(h0, w_o) x1 = Mul(x0, half) x = Cast<to=TYPE>(x1) " + BLOCK, 2),
}  # fmt: skip


def toy(body: str, kind: str = "float", opset: int = 18, outputs: str = "y") -> onnx.ModelProto:
    """A toy block whose square weights are near orthogonal, as they must be to be merged."""
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) / np.sqrt(shape[0])

    def square() -> np.ndarray:
        return np.linalg.qr(normal(D, D))[0] + normal(D, D) / 16

    extra = {name: square() for name in ("w_q", "w_k", "w_kt", "w_v", "w_p")}
    extra |= {name: normal(D) / 2 for name in ("c_q", "c_k", "c_v", "c_o", "c_p")}
    parts = [square() for _ in range(3)]
    extra["w_qkv"] = np.hstack(parts)
    extra["w_by_head"] = np.stack([one.reshape(D, 4, 4) for one in parts], 2).reshape(D, 3 * D)
    extra |= {f"w_narrow{n}": normal(D, D // 2) for n in ("", 2, 3)}
    extra |= {"w_wide": normal(D // 2, D)}
    extra |= {f"w_low{n}": normal(D, D) * (np.arange(D) > 3) for n in ("", 2, 3)}
    extra |= {"c_qkv": normal(3 * D), "w_k8": normal(D, D // 2), "w_v8": normal(D, D // 2)}
    extra |= {"w_up": normal(D, F), "w_up2": normal(D, F), "w_down": normal(F, D)}
    extra |= {
        "w_head": normal(D, F),
        "w_o": normal(32, D) / 3,
        "fixed": normal(1, 5, D),
        "places": normal(toys.V, D),
    }
    extra = {name: array.astype(toys.TYPES[kind]) for name, array in extra.items()}
    integers = {
        "rows": [0, 0, D],
        "narrow": [0, 0, 2, 4],
        "eight": [0, 0, D // 2],
        "back": [-1, 5, D],
        "flat32": [-1, 32],
        "thirds": [D] * 3,
        "packs": [0, 0, 4, 12],
        "fours": [4] * 3,
        "pairs": [0, 0, 2, 4],
        "twice": [1, 1, 2, 2, 4],
        "heads4": [0, 0, 4, 4],
        "axis3": [3],
    }
    extra |= {name: np.array(value) for name, value in integers.items()}
    fixed = "fixed" in body or "back" in body
    rows = "h16[b,s,D]" if "h16" in body else f"h0[b,{5 if fixed else 's'},32]"
    inputs = "ids[b,s]" if "ids" in body else rows
    proto = toys.model(body, kind=kind, opset=opset, inputs=inputs, outputs=outputs, extra=extra)
    read = {name for node in proto.graph.node for name in node.input}
    unread = [one for one in proto.graph.initializer if one.name not in read]  # as attributes: beta
    for one in unread:
        proto.graph.initializer.remove(one)
    return proto


def merge(proto: onnx.ModelProto, tolerance: float = 4.0) -> tuple[onnx.ModelProto, PassResult]:
    model = ir.from_proto(proto)
    (result,) = run_passes(model, [MergeSkipless(tolerance)])
    return ir.to_proto(model), result


def parameters(proto: onnx.ModelProto) -> int:
    return sum(int(np.prod(one.dims)) for one in proto.graph.initializer if one.data_type != 7)


def products(proto: onnx.ModelProto) -> int:
    return sum(one.op_type in ("MatMul", "Gemm", "FusedMatMul") for one in proto.graph.node)


@pytest.mark.parametrize(("kind", "opset"), [("float", 17), ("double", 23)])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_loses_square_layers_and_computes_the_same(
    name: str, kind: str, opset: int
) -> None:
    body, count = BLOCKS[name]
    before = toy(body, kind, opset)
    after, result = merge(before)
    assert [skip.reason for skip in result.skipped] == []
    assert result.count == count
    saved = sum(row["parameters"] for site in result.applied for row in site.details())
    assert parameters(before) - parameters(after) == saved >= count * D * D
    packs = "packed" in name  # what is left of it becomes two
    assert products(after) == products(before) - count + 2 * packs
    assert not any(node.op_type == "Identity" for node in after.graph.node)
    (ours,), (theirs,) = (toys.run(one, toys.feeds(before)) for one in (before, after))
    assert toys.error(theirs, ours) <= 20 * float(np.finfo(ours.dtype).eps)
    again, second = merge(after)
    assert (second.count, second.skipped) == (0, [])
    assert again.SerializeToString() == after.SerializeToString()


REFUSALS = {
    "residual connection": (X + BLOCK.replace("MatMul(b, w_up)", "MatMul(r, w_up)").replace(
        "u = ", "r = Add(b, x) u = "), "y", "is a residual connection"),
    "norm before": ("n = MatMul(h0, w_o) x = LayerNormalization(n, g, beta) " + BLOCK, "y",
        "LayerNormalization 'x' stands before the linear layers"),
    "norm behind": (X + BLOCK.replace("MatMul(b, w_up)", "MatMul(n, w_up)").replace(
        "u = ", "n = SimplifiedLayerNormalization(b, g) u = "), "y", "is not linear in it"),
    "output": (X + BLOCK + " k2 = Identity(x)", "y, k2", "'k2' is an output of the graph"),
    "activation reads it too": (X + BLOCK + " k2 = Tanh(x)", "y, k2", "Tanh 'k2'"),
    "activation before": ("n = MatMul(h0, w_o) x = Tanh(n) " + BLOCK, "y", "Tanh 'x' stands"),
    "no weights before": ("x = Identity(h16) " + BLOCK, "y", "is written by no weights"),
    "tied head": ("x = Gather(table, ids) " + BLOCK.replace("y = MatMul(t, w_down)",
        "z = MatMul(t, w_down) w_head_t = Transpose<perm=[1,0]>(table) y = MatMul(z, w_head_t)"),
        "y", "'table' is also read by Transpose: a copy of its own would take 1,280 bytes"),
    "projection of another width": ("x = Gather(table, ids) "
        "q = MatMul(x, w_narrow) k = MatMul(x, w_narrow2) "
        "v = MatMul(x, w_narrow3) " + HEADS.replace("heads", "narrow") + MIX.replace(
        "rows", "eight") + FFN.replace("w_p", "w_wide"), "y", "none is square"),
    "scaled by channel": ("n = MatMul(h0, w_o) x = Mul(n, g) " + BLOCK, "y", "channel by channel"),
    "singular": (X + BLOCK.replace("w_q", "w_low").replace("w_k", "w_low2").replace(
        "w_v", "w_low3"), "y", "of condition number inf, rounding in FLOAT would bring inf times"),
    "quantised": (X + BLOCK.replace("q = MatMul(x, w_q)", "x8, xs, xz = DynamicQuantizeLinear(x) "
        "q = DequantizeLinear(x8, xs, xz)"), "y", "not understood between"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_qualify_is_refused_with_its_reason(case: str) -> None:
    body, outputs, reason = REFUSALS[case]
    before = toy(body, outputs=outputs)
    after, result = merge(before)
    reasons = " ".join(skip.reason for skip in result.skipped)
    assert reason in reasons
    # What lies on the other side of the attention may be merged all the same.
    assert result.count == (0 if case in ("residual connection", "quantised") else 1)
    inputs = toys.feeds(before)
    found, expected = toys.run(after, inputs), toys.run(before, inputs)
    assert max(toys.error(one, two) for one, two in zip(found, expected, strict=True)) < 1e-6


def test_a_badly_conditioned_layer_stays_until_more_error_is_allowed() -> None:
    before = toy(X + BLOCK)
    rng = np.random.default_rng(4)
    for one in before.graph.initializer:
        if one.name in ("w_q", "w_k", "w_v"):
            turn = np.linalg.qr(rng.standard_normal((D, D)))[0]
            array = turn * np.logspace(0, -5, D) @ ir.serde.deserialize_tensor(one).numpy()
            one.CopyFrom(ir.to_proto(ir.tensor(array.astype(np.float32), name=one.name)))
    result = merge(before)[1]
    assert result.count == 1
    (reason,) = (skip.reason for skip in result.skipped)
    assert "--merge-tolerance" in reason
    assert "condition number" in reason
    allowed = merge(before, tolerance=1e9)[1]
    assert allowed.count == 2
    assert allowed.applied[0].details()[0]["condition"] > 1e4


def test_channels_of_any_size_are_no_obstacle() -> None:
    before = toy(X + BLOCK)
    for one in before.graph.initializer:
        if one.name == "w_q":
            array = ir.serde.deserialize_tensor(one).numpy() * np.logspace(0, -5, D)
            one.CopyFrom(ir.to_proto(ir.tensor(array.astype(np.float32), name=one.name)))
    assert merge(before)[1].count == 2


ORTHOGONAL = {
    "series, MHA, RoPE": skipless.Variant(),
    "series, GQA, RoPE, biases": skipless.Variant(groups=2, bias=True, gated=False),
    "series, MQA, no positions, packed": skipless.Variant(groups=1, rotary=False, packed=True),
    "parallel, MHA, no positions, biases": skipless.Variant(parallel=True, rotary=False, bias=True),
    "parallel, GQA, RoPE": skipless.Variant(parallel=True, groups=2),
    "parallel, MQA, RoPE, packed": skipless.Variant(
        parallel=True, groups=1, packed=True, gated=False
    ),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trained skipless decoders, each trained and exported once."""
    folder = tmp_path_factory.mktemp("skipless")
    models: dict[skipless.Variant, skipless.Skipless] = {}

    def write(variant: skipless.Variant, exporter: str, *, half: bool = False) -> Path:
        if variant not in models:
            models[variant] = skipless.trained(variant)
        model = models[variant]
        path = folder / f"{list(models).index(variant)}-{exporter}-{half}.onnx"
        if not path.exists():
            model = model.half() if half else model.float()
            tokens.write(model, path, exporter, model.past())
        return path

    return write


CASES = [
    *[(name, "torchscript") for name in ORTHOGONAL],
    *[(name, "dynamo18") for name in list(ORTHOGONAL)[:4:3]],
    *[(name, "dynamo23") for name in list(ORTHOGONAL)[1:5:3]],
]


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_a_trained_decoder_loses_a_matrix_at_every_place_and_meets_the_error_rule(
    exports, name: str, exporter: str
) -> None:
    variant = ORTHOGONAL[name]
    path = exports(variant, exporter)
    model, report = onnx_tricks.optimize(path, passes=["merge-skipless"])
    # Two layers: in front of each attention and behind it; in parallel these meet.
    places = 3 if variant.parallel else 4
    assert report.passes[0].applied == places, report.passes[0].skipped
    assert report.passes[0].skipped == []
    assert report.before.parameters - report.after.parameters >= places * 48 * 48
    assert not [node for node in model.graph.all_nodes() if node.op_type == "Identity"]
    assert report.verification.status == "passed", report.verification.message
    assert report.verification.error_after <= 2 * report.verification.error_before


@pytest.mark.parametrize("name", ["series, MHA, RoPE", "parallel, GQA, RoPE"])
def test_in_half_precision_the_error_rule_decides_how_much_is_merged(exports, name: str) -> None:
    path = exports(ORTHOGONAL[name], "torchscript", half=True)
    report = onnx_tricks.optimize(path, passes=["merge-skipless"]).report
    assert report.passes[0].applied >= 2
    assert report.verification.status == "passed", report.verification.message


def test_every_place_can_be_verified_by_itself(exports, tmp_path: Path) -> None:
    """As it is done where a model is too large to run twice."""
    path = exports(ORTHOGONAL["series, GQA, RoPE, biases"], "torchscript")
    model = ir.load(path)
    (result,) = run_passes(model, [MergeSkipless()])
    ir.save(model, tmp_path / "merged.onnx")
    found = compare_sites(path, tmp_path / "merged.onnx", result.applied, lambda _: None)
    assert found.cases == 4
    for one in found.findings:
        assert one.problem == ""
        assert one.after <= 1e-6, one


def test_weights_that_started_as_independent_numbers_are_conditioned_too_badly(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model.onnx"
    tokens.write(skipless.trained(skipless.Variant(), orthogonal=False), path, "torchscript")
    report = onnx_tricks.optimize(path, passes=["merge-skipless"], dry_run=True).report
    assert report.passes[0].applied == 2  # the output projections, which need no inverse
    assert all("condition number" in one.reason for one in report.passes[0].skipped)
    # The proof decides where more is allowed, and lowers the tolerance until it succeeds.
    report = onnx_tricks.optimize(path, passes=[MergeSkipless(1000)]).report
    assert 2 <= report.passes[0].applied < 4
    assert report.verification.status == "passed"


@pytest.mark.parametrize("parallel", [False, True])
def test_what_is_merged_is_still_attention_to_the_passes_behind(exports, parallel: bool) -> None:
    """Queries, keys or values without a layer of their own; caches, and tables for the first."""
    path = exports(skipless.Variant(cache=True, parallel=parallel), "torchscript")
    names = ["fold-norm", "merge-skipless", "slim-attention", "precompute-first-layer"]
    passes = [*names[:3], onnx_tricks.PrecomputeFirstLayer(max_growth=1000)]
    report = onnx_tricks.optimize(path, passes=passes).report
    applied = {one.name: one.applied for one in report.passes}
    assert applied == dict(zip(names, (0, 3 if parallel else 4, 2, 1), strict=True))
    assert report.after.cache_values_per_token == report.before.cache_values_per_token / 2
    assert report.verification.status == "passed", report.verification.message


def test_a_table_for_the_first_layer_leaves_the_others_to_be_merged(exports) -> None:
    path = exports(skipless.Variant(cache=True), "torchscript")
    model = ir.load(path)
    first = [onnx_tricks.PrecomputeFirstLayer(max_growth=1000), MergeSkipless()]
    assert [one.count for one in run_passes(model, first)] == [1, 2]


def test_a_model_with_skip_connections_is_told_so(export: Export) -> None:
    report = onnx_tricks.optimize(
        export("smollm2-2", "optimum"), passes=["merge-skipless"], dry_run=True
    ).report
    assert report.passes[0].applied == 0
    reasons = [one.reason for one in report.passes[0].skipped]
    assert sum("stands before the linear layers and is none" in one for one in reasons) == 2
    assert any("is a residual connection: it adds what others read too" in one for one in reasons)
