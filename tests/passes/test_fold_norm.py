"""fold-norm on toy graphs: every spelling, every reader, every refusal."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_tricks import FoldNorm
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.patterns.norm import Norm
from onnx_tricks.patterns.norms import find_norms
from onnx_tricks.rewrite import PassResult, run_passes
from tests import toys

MEAN_SQUARE = "p = Pow(x, two) m = ReduceMean<keepdims=1>(p, last) a = Add(m, eps) "
CENTRED = "mu = ReduceMean<keepdims=1>(x, last) d = Sub(x, mu) "
VARIANCE = CENTRED + "p = Pow(d, two) m = ReduceMean<keepdims=1>(p, last) a = Add(m, eps) "

RMS = {
    "div sqrt": MEAN_SQUARE + "r = Sqrt(a) n = Div(x, r) z = Mul(n, g)",
    "one over sqrt": MEAN_SQUARE + "r = Sqrt(a) i = Div(one, r) n = Mul(x, i) z = Mul(g, n)",
    "reciprocal": MEAN_SQUARE + "r = Sqrt(a) i = Reciprocal(r) n = Mul(x, i) z = Mul(g, n)",
    "root of reciprocal": MEAN_SQUARE + "i = Reciprocal(a) r = Sqrt(i) n = Mul(x, r) z = Mul(n, g)",
    "power": MEAN_SQUARE + "i = Pow(a, minus_half) n = Mul(x, i) z = Mul(n, g)",
    "gain first": MEAN_SQUARE + "r = Sqrt(a) n = Mul(x, g) z = Div(n, r)",
    "gain on the scale": MEAN_SQUARE + "r = Sqrt(a) i = Reciprocal(r) n = Mul(i, g) z = Mul(x, n)",
    "square by Mul": MEAN_SQUARE.replace("Pow(x, two)", "Mul(x, x)")
    + "r = Sqrt(a) n = Div(x, r) z = Mul(n, g)",
    "sum over width": "p = ReduceSumSquare<keepdims=1>(x, last) m = Div(p, width) a = Add(eps, m) "
    "r = Sqrt(a) n = Div(x, r) z = Mul(n, g)",
    "sum times inverse width": "q = Mul(x, x) p = ReduceSum<keepdims=1>(q, last) "
    "m = Mul(p, inverse_width) a = Add(m, eps) r = Sqrt(a) n = Div(x, r) z = Mul(n, g)",
    "one plus w": MEAN_SQUARE + "h = Add(one, g1) r = Sqrt(a) n = Div(x, r) z = Mul(n, h)",
    "gain of rank 3": MEAN_SQUARE + "r = Sqrt(a) n = Div(x, r) z = Mul(n, g3)",
    "scaled input": "x0 = Mul(x, root_width) "
    + MEAN_SQUARE.replace("(x,", "(x0,")
    + "r = Sqrt(a) n = Div(x0, r) z = Mul(n, g)",
    "with a bias": MEAN_SQUARE + "r = Sqrt(a) n = Div(x, r) k = Mul(n, g) z = Add(k, beta)",
}
LAYER = {
    "div sqrt": VARIANCE + "r = Sqrt(a) n = Div(d, r) k = Mul(n, g) z = Add(k, beta)",
    "reciprocal": VARIANCE
    + "r = Sqrt(a) i = Reciprocal(r) n = Mul(d, i) k = Mul(n, g) z = Add(beta, k)",
    "no bias": VARIANCE + "r = Sqrt(a) n = Div(d, r) z = Mul(n, g)",
    "centred twice": VARIANCE
    + "mu2 = ReduceMean<keepdims=1>(x, last) d2 = Sub(x, mu2) r = Sqrt(a) n = Div(d2, r) "
    "k = Mul(n, g) z = Add(k, beta)",
    "mean of squares": CENTRED
    + "p = Mul(x, x) m = ReduceMean<keepdims=1>(p, last) q = Mul(mu, mu) v = Sub(m, q) "
    "a = Add(v, eps) r = Sqrt(a) n = Div(d, r) k = Mul(n, g) z = Add(k, beta)",
    "multiplied out": VARIANCE
    + "r = Sqrt(a) i = Reciprocal(r) s = Mul(i, g3) e = Neg(mu) l = Mul(x, s) k = Mul(e, s) "
    "h = Add(k, beta) z = Add(l, h)",
    "multiplied out, the mean subtracted": VARIANCE
    + "r = Sqrt(a) i = Reciprocal(r) s = Mul(i, g) k = Mul(mu, s) h = Sub(beta, k) l = Mul(x, s) "
    "z = Add(h, l)",
    "multiplied out, no bias": VARIANCE
    + "r = Sqrt(a) i = Reciprocal(r) s = Mul(i, g) l = Mul(x, s) k = Mul(mu, s) z = Sub(l, k)",
    "a variance floored at zero": CENTRED
    + "p = Mul(x, x) m = ReduceMean<keepdims=1>(p, last) q = Mul(mu, mu) v0 = Sub(m, q) "
    "v = Max(v0, zero) a = Add(v, eps) r = Sqrt(a) n = Div(d, r) k = Mul(n, g) z = Add(k, beta)",
}
FUSED = {
    "LayerNormalization": (18, "z = LayerNormalization<epsilon=0.00001>(x, g, beta)"),
    "LayerNormalization without bias": (18, "z = LayerNormalization(x, g)"),
    "RMSNormalization": (23, "z = RMSNormalization<epsilon=0.00001>(x, g)"),
    "SimplifiedLayerNormalization": (18, "z = SimplifiedLayerNormalization(x, g)"),
    "SkipLayerNormalization": (18, "z = com.microsoft.SkipLayerNormalization(x, x, g, beta)"),
    "SkipSimplifiedLayerNormalization": (
        18,
        "z = com.microsoft.SkipSimplifiedLayerNormalization(x, x, g)",
    ),
}
OTHER = {
    "DyT": "h = Mul(x, half) t = Tanh(h) k = Mul(t, g) z = Add(k, beta)",
    "L2": "l = ReduceL2<keepdims=1>(x, last) m = Max(l, eps) n = Div(x, m) k = Mul(n, root_width) "
    "z = Mul(k, g)",
    "epsilon outside": "p = Mul(x, x) m = ReduceMean<keepdims=1>(p, last) r = Sqrt(m) "
    "a = Add(r, eps) n = Div(x, a) z = Mul(n, g)",
    "L2 as torch has it": "l = ReduceL2<keepdims=1>(x, last) m = Max(l, eps) sx = Shape(x) "
    "e = Expand(m, sx) n = Div(x, e) k = Mul(n, root_width) z = Mul(k, g)",
    "Derf": "h = Mul(x, half) t = Erf(h) k = Mul(t, g) z = Add(k, beta)",
    "a number before the bias": "n = LayerNormalization(x, ones) k = Mul(n, g) h = Mul(k, half) "
    "z = Add(h, beta)",
    "more bias behind an operator": "n = LayerNormalization(x, g, beta) z = Add(n, g1)",
    "gain behind an operator": "n = LayerNormalization(x, ones) k = Mul(n, g) z = Add(k, beta)",
}
SIDES = (
    "sx = Shape(x) n0 = Gather(sx, axis0) n1 = Gather(sx, axis1) n2 = Slice(sx, pair, far, axis0) "
)
STRIDES = (
    "m1 = ReduceMean<keepdims=1>(z, axis1) v = Reshape(m1, last) sz = Shape(z) "
    "n0 = Gather(sz, index) i0 = Range(index, n0, second) i1 = Mul(i0, row_length) "
    "i2 = Unsqueeze(i1, last) i3 = Add(i2, places) k = Gather(v, i3) "
)
READERS = {
    "MatMul": "y = MatMul(z, w)",
    "MatMul and bias": "q = MatMul(z, w) y = Add(c, q)",
    "two MatMuls": "q = MatMul(z, w) k = MatMul(z, w2) y = Add(q, k)",
    "transposed weight": "t = Transpose<perm=[1,0]>(w_transposed) y = MatMul(z, t)",
    "Constant node weight": "t = Identity(w) y = MatMul(z, t)",
    "FusedMatMul": "y = com.microsoft.FusedMatMul<transB=1, alpha=0.5>(z, w_transposed)",
    "weight on the left": "t = Transpose<perm=[0,2,1]>(z) q = MatMul(w_transposed, t) "
    "y = Transpose<perm=[0,2,1]>(q)",
    "vector": "y = MatMul(z, w_vector)",
    "Gemm": "q = Reshape(z, flat) y = Gemm(q, w, c)",
    "Gemm without bias": "q = Reshape(z, flat) y = Gemm<alpha=0.5, beta=2.0>(q, w)",
    "Gemm transposed": "q = Reshape(z, flat) "
    "y = Gemm<transB=1, alpha=0.5, beta=2.0>(q, w_transposed, c)",
    "experts": "q = Unsqueeze(z, axis1) y = MatMul(q, w_experts)",
    "Conv": "t = Transpose<perm=[0,2,1]>(z) y = Conv(t, w_conv, c)",
    "Conv without bias": "t = Transpose<perm=[0,2,1]>(z) y = Conv(t, w_conv)",
    "Conv of width 3": "t = Transpose<perm=[0,2,1]>(z) y = Conv(t, w_conv3, c)",
    "grouped Conv": "t = Transpose<perm=[0,2,1]>(z) y = Conv<group=2>(t, w_grouped)",
    "shape read too": "sh = Shape(z) q = MatMul(z, w) f = Cast<to=TYPE>(sh) y = Mul(q, f0) "
    "fs = ReduceSum<keepdims=0>(f) f0 = Identity(fs)",
    "Split": "u, v = Split<axis=-1>(z, halves) q = MatMul(u, w_half_channels) "
    "k = MatMul(v, w_half_channels2) y = Add(q, k)",
    "rows moved": "q = Transpose<perm=[1,0,2]>(z) u = Slice(q, start, stop, axis0) "
    "k = Concat<axis=0>(u, q) v = Gather(k, picks) f = Unsqueeze(v, axis1) e = Squeeze(f, axis1) "
    "y = MatMul(e, w)",
    "Reshape to a computed shape": "s1 = Shape(z) s2 = Slice(s1, last, far, axis0) "
    "n1 = Squeeze(s2, axis0) n2 = Unsqueeze(n1, axis0) r1 = Concat<axis=0>(last, n2) "
    "q = Reshape(z, r1) y = MatMul(q, w)",
    "tiled": "s1 = Shape(z) n1 = Gather(s1, axis0) r1 = Concat<axis=0>(n1, axis1, axis1) "
    "q = Tile(z, r1) y = MatMul(q, w)",
    "mean of rows": "k = ReduceMean<keepdims=0>(z, axis1) q = MatMul(k, w) y = Unsqueeze(q, axis1)",
    "mean of rows in a pool": "t = Transpose<perm=[0,2,1]>(z) k = GlobalAveragePool(t) "
    "y = Conv(k, w_conv, c)",
    "mean of rows in a pool, flat": "t = Transpose<perm=[0,2,1]>(z) v = GlobalAveragePool(t) "
    "k = Flatten(v) y = MatMul(k, w)",
    "a row beside the mean of all": "u = Gather<axis=1>(z, index) "
    "v = ReduceMean<keepdims=0>(z, axis1) k = Concat<axis=-1>(u, v) y = MatMul(k, w_twice)",
    "halves changed over": "u = Slice(z, axis0, half_width, last) "
    "v = Slice(z, half_width, far, last) k = Concat<axis=-1>(v, u) y = MatMul(k, w)",
    "map": SIDES + "t = Transpose<perm=[0,2,1]>(z) to = Concat<axis=0>(n0, n2, n1, axis1) "
    "k = Reshape(t, to) y = Conv(k, w_map3)",
    "map of a batch worked out": SIDES + "t = Transpose<perm=[0,2,1]>(z) "
    "to = Concat<axis=0>(last, n2, n1, axis1) k = Reshape(t, to) y = Conv(k, w_map, c)",
    "map of channels worked out": SIDES + "to = Concat<axis=0>(n0, n1, axis1, last) "
    "t = Reshape(z, to) k = Transpose<perm=[0,3,1,2]>(t) y = Conv(k, w_map, c)",
    "map taken apart": SIDES + "t = Transpose<perm=[0,2,1]>(z) n02 = Mul(n0, n2) "
    "to = Concat<axis=0>(n02, n1) u = Reshape(t, to) k = Transpose<perm=[1,0]>(u) "
    "back = Concat<axis=0>(n1, n0, last) v = Reshape(k, back) y = MatMul(v, w)",
    "picked by a tiled index": "i = ArgMax<axis=1>(x) i1 = Slice(i, axis0, axis1, last) "
    "s1 = Shape(z) n1 = Slice(s1, last, far, axis0) r1 = Concat<axis=0>(axis1, axis1, n1) "
    "i2 = Tile(i1, r1) q = GatherElements<axis=1>(z, i2) y = MatMul(q, w)",
    "picked by an expanded index": "i = ArgMax<axis=1>(x) i1 = Slice(i, axis0, axis1, last) "
    "s1 = Shape(z) i2 = Expand(i1, s1) q = GatherElements<axis=1>(z, i2) y = MatMul(q, w)",
    "scaled": "q = Mul(z, half) k = Neg(q) y = MatMul(k, w)",
    "packed": "q = MatMul(z, w_packed) y = Add(q, c_packed)",
    "picked by strides": STRIDES + "y = MatMul(k, w)",
    "GRU": "y = GRU<hidden_size=4>(z, w_gates, w_states3, c_gates)",
    "LSTM": "y = LSTM<hidden_size=3>(z, w_gates, w_states4, c_gates)",
    "rows repeated by a Resize": SIDES + "t = Transpose<perm=[0,2,1]>(z) n11 = Add(n1, n1) "
    "to = Concat<axis=0>(n0, n2, n11) k = Resize(t, , , to) y = Conv(k, w_conv, c)",
}


def fold(proto: onnx.ModelProto, **options: object) -> tuple[onnx.ModelProto, PassResult]:
    folded = ir.from_proto(proto)
    (result,) = run_passes(folded, [FoldNorm(**options)])  # type: ignore[arg-type]
    return ir.to_proto(folded), result


def in_order(body: str) -> str:
    """Nodes in the order in which they can run, for bodies that read better otherwise."""
    return body.replace(
        "y = Mul(q, f0) fs = ReduceSum<keepdims=0>(f) f0 = Identity(fs)",
        "fs = ReduceSum<keepdims=0>(f) f0 = Identity(fs) y = Mul(q, f0)",
    )


def check(
    body: str, kind: str, opset: int, *, reference_body: str = "", bias_stays: bool = False
) -> onnx.ModelProto:
    """Fold a toy graph and hold the result to the error rule; returns the folded model."""
    body = in_order(body)
    extra = {"w_half_channels2": toys.weights(7)["w_half_channels"].astype(toys.TYPES[kind])}
    before = toys.model(body, kind=kind, opset=opset, extra=extra)
    exact = toys.model(
        reference_body or body,
        kind="double",
        opset=opset,
        extra={k: v.astype(float) for k, v in extra.items()},
    )
    rounded = {one.name: one for one in before.graph.initializer}
    for one in exact.graph.initializer:
        array = ir.serde.deserialize_tensor(rounded[one.name]).numpy()
        if one.data_type == onnx.TensorProto.DOUBLE:
            one.CopyFrom(ir.to_proto(ir.tensor(array.astype(np.float64), name=one.name)))
    after, result = fold(before)
    assert [skip.reason for skip in result.skipped] == []
    assert result.count == 1
    again, second = fold(after)
    assert second.count == 0
    assert again.SerializeToString() == after.SerializeToString()
    gone = {"g", "g1", "g3"} if bias_stays else {"g", "g1", "g3", "beta"}
    assert not gone & {one.name for one in after.graph.initializer}
    inputs = toys.feeds(before)
    (reference,) = toys.run_exactly(exact, {k: v.astype(np.float64) for k, v in inputs.items()})
    (original,), (optimised,) = toys.run(before, inputs), toys.run(after, inputs)
    # In float64 the reference is no more exact than what it judges.
    unit = float(np.finfo(toys.TYPES[kind]).eps) * (16 if kind == "double" else 1)
    assert toys.error(optimised, reference) <= 2 * toys.error(original, reference) + unit
    return after


@pytest.mark.parametrize("kind", ["float", "float16", "double"])
@pytest.mark.parametrize("opset", [13, 17, 18, 23])
@pytest.mark.parametrize("spelling", RMS)
def test_every_spelling_of_an_rms_norm_folds(spelling: str, opset: int, kind: str) -> None:
    body = f"{RMS[spelling]} y = MatMul(z, w)"
    if opset < 18:
        body = body.replace("<keepdims=1>", "<axes=[-1], keepdims=1>").replace(", last)", ")")
        if "ReduceSum<" in body:
            body = body.replace(
                "ReduceSum<axes=[-1], keepdims=1>(q)", "ReduceSum<keepdims=1>(q, last)"
            )
    after = check(body, kind, opset)
    assert sum(node.op_type == "RMSNormalization" for node in after.graph.node) == (
        opset == 23 and kind != "double"
    )


@pytest.mark.parametrize("kind", ["float", "float16", "double"])
@pytest.mark.parametrize("opset", [16, 18])
@pytest.mark.parametrize("spelling", LAYER)
def test_every_spelling_of_a_layer_norm_folds(spelling: str, opset: int, kind: str) -> None:
    body = f"{LAYER[spelling]} y = MatMul(z, w)"
    if opset < 18:
        body = body.replace("<keepdims=1>", "<axes=[-1], keepdims=1>").replace(", last)", ")")
    after = check(body, kind, opset)
    assert sum(node.op_type == "LayerNormalization" for node in after.graph.node) == (
        opset == 18 and kind != "double"
    )


@pytest.mark.parametrize("opset", [13, 18])
def test_a_norm_that_pools_the_channels_of_its_rows_folds(opset: int) -> None:
    check(
        "mu = GlobalAveragePool(x) d = Sub(x, mu) p = Mul(d, d) m = GlobalAveragePool(p) "
        "a = Add(m, eps) r = Sqrt(a) i = Reciprocal(r) s = Mul(i, g) e = Neg(mu) l = Mul(x, s) "
        "k = Mul(e, s) h = Add(k, beta) z = Add(l, h) y = MatMul(z, w)",
        "float",
        opset,
    )


@pytest.mark.parametrize("name", FUSED)
def test_every_norm_operator_folds(name: str) -> None:
    opset, norm = FUSED[name]
    # The Skip operators have no float64 kernel.
    if name.startswith("SkipSimplified"):
        plain = "xx = Add(x, x) z = SimplifiedLayerNormalization(xx, g)"
    elif name.startswith("Skip"):
        plain = "xx = Add(x, x) z = LayerNormalization<epsilon=0.00001>(xx, g, beta)"
    else:
        plain = norm
    after = check(
        f"{norm} y = MatMul(z, w)", "float", opset, reference_body=f"{plain} y = MatMul(z, w)"
    )
    assert name.split()[0] in {node.op_type for node in after.graph.node}


@pytest.mark.parametrize("reader", ["MatMul and bias", "experts"])
def test_a_bias_behind_an_operator_that_adds_up_the_stream_folds(reader: str) -> None:
    norm = "n = com.microsoft.SkipSimplifiedLayerNormalization(x, x, g) z = Add(beta, n) "
    plain = "xx = Add(x, x) n = SimplifiedLayerNormalization(xx, g) z = Add(beta, n) "
    after = check(
        norm + READERS[reader],
        "float",
        18,
        reference_body=plain + READERS[reader],
        bias_stays=reader == "experts",
    )
    # One Add each: that of the linear layer, or that of the bias which cannot move there.
    assert [node.op_type for node in after.graph.node].count("Add") == 1


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("name", OTHER)
def test_other_norms_fold(name: str, kind: str) -> None:
    check(f"{OTHER[name]} y = MatMul(z, w)", kind, 18)


@pytest.mark.parametrize("norm", ["RMS", "LayerNorm"])
@pytest.mark.parametrize("name", READERS)
def test_every_linear_reader_takes_gain_and_bias(name: str, norm: str) -> None:
    body = {
        "RMS": RMS["div sqrt"],
        "LayerNorm": "z = LayerNormalization<epsilon=0.00001>(x, g, beta)",
    }[norm]
    # Three experts without bias would need more numbers than the norm's bias holds.
    check(f"{body} {READERS[name]}", "float", 18, bias_stays=name == "experts")


def test_half_precision_with_casts_around_the_norm_folds() -> None:
    inner = MEAN_SQUARE.replace("(x,", "(xx,").replace("two", "two32").replace("eps", "eps32")
    body = f"xx = Cast<to=1>(x) {inner} r = Sqrt(a) n = Div(xx, r) h = Cast<to=10>(n) z = Mul(g, h)"
    extra = {"two32": np.float32(2), "eps32": np.float32(1e-5)}
    extra = {name: np.asarray(number) for name, number in extra.items()}
    for opset in (18, 23):
        before = toys.model(f"{body} y = MatMul(z, w)", kind="float16", opset=opset, extra=extra)
        after, result = fold(before)
        assert result.count == 1
        inputs = toys.feeds(before)
        assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-3
        casts = sum(node.op_type == "Cast" for node in after.graph.node)
        assert casts == (0 if opset == 23 else 2)


def test_bfloat16_weights_are_folded_and_rounded_once() -> None:
    before = toys.model(
        f"{FUSED['LayerNormalization without bias'][1]} y = MatMul(z, w)", kind="bfloat16"
    )
    after, result = fold(before)
    assert result.count == 1
    arrays = {
        one.name: ir.serde.deserialize_tensor(one).numpy() for one in before.graph.initializer
    }
    (folded,) = (one for one in after.graph.initializer if one.name == "w")
    exact = arrays["g"].astype(np.float64)[:, None] * arrays["w"].astype(np.float64)
    expected = exact.astype(toys.TYPES["bfloat16"])
    np.testing.assert_array_equal(ir.serde.deserialize_tensor(folded).numpy(), expected)


@pytest.mark.parametrize("norm", ["LayerNormalization", "SimplifiedLayerNormalization"])
def test_a_norm_of_heads_folds_into_the_layer_that_reads_all_of_them(norm: str) -> None:
    gains = {"g_head": toys.weights(4)["g"][: toys.D // 4].astype(np.float32)}
    body = (
        f"h = Reshape(x, heads) z = {norm}(h, g_head) t = Transpose<perm=[0,2,1,3]>(z) "
        "u = Transpose<perm=[0,2,1,3]>(t) k = Reshape(u, all_heads) y = MatMul(k, w)"
    )
    before = toys.model(body, extra=gains)
    after, result = fold(before)
    assert result.count == 1
    assert "g_head" not in {one.name for one in after.graph.initializer}
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


def test_channels_first_norm_folds_into_a_convolution() -> None:
    body = (
        "mu = ReduceMean<keepdims=1>(x, axis1) d = Sub(x, mu) p = Pow(d, two) "
        "m = ReduceMean<keepdims=1>(p, axis1) a = Add(m, eps) r = Sqrt(a) n = Div(d, r) "
        "k = Mul(n, g_channel) z = Add(k, beta_channel) y = Conv(z, w_conv)"
    )
    before = toys.model(body, inputs="x[b,D,s]")
    after, result = fold(before)
    assert result.count == 1
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


LN = "z = LayerNormalization(x, g, beta) "
MAPS = {
    "InstanceNormalization": "z = InstanceNormalization(x, g, beta)",
    "GroupNormalization": "z = GroupNormalization<num_groups=4>(x, g, beta)",
    "groups as rows": "k = Reshape(x, grouped) n = InstanceNormalization(k, ones4, zeros4) "
    "sx = Shape(x) u = Reshape(n, sx) h = Mul(u, g_channel) z = Add(h, beta_channel)",
}


@pytest.mark.parametrize(("reader", "bias_stays"), [("w_conv", False), ("w_conv3", True)])
@pytest.mark.parametrize("name", MAPS)
def test_norms_of_maps_fold_into_convolutions(name: str, reader: str, bias_stays: bool) -> None:
    extra = {"ones4": np.ones(4, np.float32), "zeros4": np.zeros(4, np.float32)}
    extra["grouped"] = np.array([0, 4, -1])
    pads = "<pads=[1,1]>" if bias_stays else ""
    body = f"{MAPS[name]} y = Conv{pads}(z, {reader}, c)"
    before = toys.model(body, inputs="x[b,D,s]", opset=21, extra=extra)
    after, result = fold(before)
    assert (result.count, result.skipped) == (1, [])
    assert fold(after)[1].count == 0
    assert not {"g", "g_channel"} & {one.name for one in after.graph.initializer}
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


@pytest.mark.parametrize("second", ["g1", "g"])
def test_a_gain_behind_a_norm_folds_into_the_same_weight(second: str) -> None:
    before = toys.model(
        f"n = LayerNormalization(x, g, beta) z = Mul(n, {second}) q = MatMul(z, w) y = Add(q, c)"
    )
    after, result = fold(before)
    assert (result.count, result.skipped) == (2, [])
    assert [node.op_type for node in after.graph.node] == ["LayerNormalization", "MatMul", "Add"]
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


def test_a_norm_filled_with_ones_has_nothing_to_fold() -> None:
    body = "sx = Shape(x) n = ConstantOfShape<value=float[1] {1.0}>(sx) z = RMSNormalization(x, n) "
    _, result = fold(toys.model(body + "y = MatMul(z, w)", opset=23))
    assert (result.count, result.skipped) == (0, [])


@pytest.mark.parametrize("word", ["g", "w"])
def test_defaults_that_callers_may_override_are_refused_with_the_way_out(word: str) -> None:
    before = toys.model(LN + "y = MatMul(z, w)")
    tensor = next(one for one in before.graph.initializer if one.name == word)
    value = onnx.helper.make_tensor_value_info(word, tensor.data_type, tensor.dims)
    before.graph.input.append(value)
    _, result = fold(before)
    (skip,) = result.skipped
    assert "keep_initializers_as_inputs=False" in skip.reason


def test_what_scales_one_of_several_uses_of_a_norm_is_no_norm() -> None:
    body = (
        "z = LayerNormalization(x, g) k = Mul(z, g3) q = Pad(z, no_pads) r = Slice(q, axis0, last, "
        "axis1) h = Mul(r, g1) s = Add(k, h) y = MatMul(s, w)"
    )
    before = toys.model(body)
    after, result = fold(before)
    assert (result.count, result.skipped) == (1, [])
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


def test_weights_in_constant_nodes_fold(caplog: pytest.LogCaptureFixture) -> None:
    before = toys.model(f"{RMS['div sqrt']} y = MatMul(z, w)")
    (weight,) = (one for one in before.graph.initializer if one.name == "w")
    node = onnx.helper.make_node("Constant", [], ["w"], value=weight)
    before.graph.initializer.remove(weight)
    before.graph.node.insert(0, node)
    after, result = fold(before)
    assert result.count == 1
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6
    assert not caplog.records  # the file names the types of all that has a shape


def test_a_norm_of_values_that_one_number_fills_folds() -> None:
    """The decoder of a detector begins with such values, as wide as its learnt queries."""
    filled = RMS["div sqrt"].replace("(x,", "(h,")
    before = toys.model(f"s = Shape(x) h = Expand(half, s) {filled} y = MatMul(z, w)")
    after, result = fold(before)
    assert (result.count, result.skipped) == (1, [])
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


def test_norms_of_one_width_share_one_vector_of_ones() -> None:
    body = (
        "z = LayerNormalization(x, g, beta) h = MatMul(z, w_square) "
        "z2 = LayerNormalization(h, g3_flat) y = MatMul(z2, w)"
    )
    after, result = fold(
        toys.model(body, extra={"g3_flat": toys.weights(3)["g"].astype(np.float32)})
    )
    assert result.count == 2
    scales = {node.input[1] for node in after.graph.node if node.op_type == "LayerNormalization"}
    assert scales == {"onnx_tricks.ones.16.float"}


IF_BODY = """
flag = Cast<to=9>(f)
y = If(flag) <
  then_branch = yes () => (float[b,s,F] t) {
    zt = LayerNormalization(x, g, beta) t = MatMul(zt, w)
  },
  else_branch = no () => (float[b,s,F] e) {
    ze = LayerNormalization(x, g, beta) q = MatMul(ze, w) e = Neg(q)
  }
>
"""


def test_branches_that_share_outer_weights_fold_together() -> None:
    before = toys.model(IF_BODY, inputs="x[b,s,D] f[]")
    after, result = fold(before)
    assert result.count == 2
    assert len(result.applied) == 1
    for flag in (0.0, 1.0):
        inputs = toys.feeds(before) | {"f": np.array(flag, dtype=np.float32)}
        assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


@pytest.mark.parametrize("spelled", [RMS["div sqrt"], LAYER["div sqrt"], OTHER["L2"]])
def test_a_norm_that_reads_a_layer_with_a_new_bias_reads_it_with_that_bias(spelled: str) -> None:
    body = f"h = LayerNormalization(h0, g, beta) x = MatMul(h, w_square) {spelled} y = MatMul(z, w)"
    before = toys.model(body, inputs="h0[b,s,D]")
    after, result = fold(before)
    assert result.count == 2
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 2e-6


TIED = (
    "x = Gather(table, ids) z = LayerNormalization(x, g) "
    "t = Transpose<perm=[1,0]>(table) y = MatMul(z, t)"
)


@pytest.mark.parametrize(
    ("policy", "folded", "tables"), [("rescale", 1, 1), ("copy", 1, 2), ("skip", 0, 1)]
)
def test_a_tied_head_is_rescaled_copied_or_skipped(policy: str, folded: int, tables: int) -> None:
    before = toys.model(TIED, inputs="ids[b,s]")
    after, result = fold(before, shared_weights=policy)
    assert result.count == folded
    assert sum(list(one.dims) == [toys.V, toys.D] for one in after.graph.initializer) == tables
    if policy == "skip":
        (skip,) = result.skipped
        assert f"{toys.V * toys.D * 4:,} bytes" in skip.reason
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


def test_a_head_tied_through_a_transposed_lookup_is_rescaled() -> None:
    body = (
        "e = Transpose<perm=[1,0]>(w_square) x = Gather(e, ids) z = LayerNormalization(x, g) "
        "y = MatMul(z, w_square)"
    )
    before = toys.model(body, inputs="ids[b,s]")
    after, result = fold(before)
    assert result.count == 1
    inputs = {"ids": np.arange(10).reshape(2, 5)}
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


def test_a_weight_that_two_norms_of_one_gain_read_is_folded_once() -> None:
    body = (
        "z = LayerNormalization(x, g) h = MatMul(z, w_square) "
        "z2 = LayerNormalization(h, g) y = MatMul(z2, w_square)"
    )
    before = toys.model(body)
    after, result = fold(before)
    assert (result.count, len(result.applied)) == (2, 1)
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


def test_a_bias_that_outweighs_the_output_of_the_layer_stays_in_the_norm() -> None:
    body = "z = LayerNormalization(x, g, large) q = MatMul(z, w) y = Add(q, c)"
    for size, inputs in ((0.1, 2), (10.0, 3)):
        large = np.full(toys.D, size, dtype=np.float32)
        after, result = fold(toys.model(body, extra={"large": large}))
        assert result.count == 1
        assert len(after.graph.node[0].input) == inputs


REFUSALS = {
    "residual": (LN + "q = MatMul(z, w_square) y = Add(q, z)", "as a residual connection does"),
    "residual and norm": (
        LN + "k = LayerNormalization(z, ones) q = MatMul(k, w_square) y = Add(q, z)",
        "as a residual connection does",
    ),
    "picked channels": (
        LN + "i = ArgMax<axis=1>(x) k = GatherElements<axis=1>(z, i) y = MatMul(k, w)",
        "picks single channels",
    ),
    "padded channels": (
        LN + "k = Pad(z, channel_pads) y = MatMul(k, w_double)",
        "adds channels",
    ),
    "positions": (LN + "k = Add(z, g_matrix) y = MatMul(k, w)", "adds a constant to it"),
    "graph output": (LN + "q = MatMul(z, w) y = Identity(z)", "is an output of the graph"),
    "activation": (LN + "q = Sigmoid(z) y = MatMul(q, w)", "is not linear in it"),
    "gain from outside": (
        "z = LayerNormalization(x, x1) y = MatMul(z, w)",
        "gain is not a constant",
    ),
    "bias from outside": (
        "z = LayerNormalization(x, g, x1) y = MatMul(z, w)",
        "bias is not a constant",
    ),
    "weight from outside": (LN + "y = MatMul(z, x2)", "not a constant weight"),
    "no reader": (
        "z = LayerNormalization(x, g) sh = Shape(z) y = Cast<to=1>(sh)",
        "no linear layer",
    ),
    "two axes": (
        "z = LayerNormalization<axis=1>(x4, g_matrix) y = MatMul(z, w)",
        "more than the last axis",
    ),
    "masked bias behind a gain with zeros": (
        "z = LayerNormalization(x, zeros, beta) k = Mul(z, x_row) y = MatMul(k, w)",
        "not the same in every row, and it cannot stay behind a gain with zeros",
    ),
    "heads": (
        LN + "k = Reshape(z, heads) y = MatMul(k, w_head)",
        "all heads of it with one weight",
    ),
    "rows picked by other strides": (
        LN + STRIDES.replace("places", "places_turned") + "y = MatMul(k, w)",
        "lie on one axis",
    ),
    "resized channels": (
        LN + "sz = Shape(z) s2 = Add(sz, sz) k = Resize(z, , , s2) y = MatMul(k, w_double)",
        "changes the number of its channels",
    ),
    "positions among channels": (
        LN + "t = Transpose<perm=[0,2,1]>(z) k = Reshape(t, mixed) y = Conv(k, w_map)",
        "does not keep its channels",
    ),
    "channels among positions": (
        LN + "t = Transpose<perm=[0,2,1]>(z) q = Reshape(t, flat) y = MatMul(q, w)",
        "does not keep its channels",
    ),
    "rotated": (
        LN + "u = Slice(z, axis0, half_width, last) v = Slice(z, half_width, far, last) n = Neg(v) "
        "k = Concat<axis=-1>(n, u) q = Mul(z, x1) r = Mul(k, x1) s = Add(q, r) y = MatMul(s, w)",
        "as rotary positions do",
    ),
    "with itself": (
        LN + "t = Transpose<perm=[0,2,1]>(z) k = MatMul(t, z) y = MatMul(k, w)",
        "is not linear in it",
    ),
    "attention": (
        LN + "y = com.microsoft.MultiHeadAttention<num_heads=4>(z, x, x)",
        "as queries, keys or values",
    ),
    "joined": (LN + "k = Concat<axis=1>(z, x) y = MatMul(k, w)", "not scaled alike"),
    "joined channels": (LN + "k = Concat<axis=-1>(z, x) y = MatMul(k, w_double)", "other channels"),
    "Gemm as bias": (
        "x0 = Reshape(x, flat) z = LayerNormalization(x0, g) y = Gemm(x0, w_square, z)",
        "adds it as a bias",
    ),
    "shared weight": (
        "z = SimplifiedLayerNormalization(x, g) q = MatMul(z, w_square) y = MatMul(q, w_square)",
        "is also read by",
    ),
    "quantised": (
        LN + "q, s, o = DynamicQuantizeLinear(z) k = DequantizeLinear(q, s, o) y = MatMul(k, w)",
        "before quantising",
    ),
    "stored narrower": (LN + "k = Cast<to=1>(w16) y = MatMul(z, k)", "stored in FLOAT16"),
}


KEPT = {
    "padded": "t = Transpose<perm=[0,2,1]>(z) y = Conv<pads=[1,1]>(t, w_conv3)",
    "rows of zeros": "rows = Pad(z, no_pads) y = MatMul(rows, w)",
    "windows of padded rows": "sz = Shape(z) long = Slice(sz, axis1, pair, axis0) "
    "odd = Mod(long, pair) p1 = Concat<axis=0>(axis0, axis0, axis0, odd, axis0, axis0) "
    "p2 = Reshape(p1, pairs) p3 = Slice(p2, last, before_all, axis0, last) "
    "p4 = Transpose<perm=[1,0]>(p3) p5 = Reshape(p4, last) rows = Pad(z, p5) sr = Shape(rows) "
    "wide = Gather(sr, last) to = Concat<axis=0>(axis0, last, pair, wide) "
    "windows = Reshape(rows, to) y = MatMul(windows, w)",
    "masked": "top = ReduceMax<keepdims=1>(x, last) mask = Sigmoid(top) rows = Mul(z, mask) "
    "y = MatMul(rows, w)",
    "padded map": SIDES + "t = Transpose<perm=[0,2,1]>(z) to = Concat<axis=0>(n0, n2, n1, axis1) "
    "v = Reshape(t, to) y = Conv<pads=[1,0,1,0]>(v, w_map3, c)",
    "padded map, each channel": SIDES + "t = Transpose<perm=[0,2,1]>(z) "
    "to = Concat<axis=0>(n0, n2, n1, axis1) v = Reshape(t, to) "
    "y = Conv<pads=[1,0,1,0], group=16>(v, w_each)",
    "summed up": "rows = CumSum(z, second) y = MatMul(rows, w)",
    "rows between others": SIDES + "t = Transpose<perm=[0,2,1]>(z) n11 = Add(n1, n1) "
    'to = Concat<axis=0>(n0, n2, n11) v = Resize<mode="linear">(t, , , to) y = Conv(v, w_conv, c)',
    "a transposed Conv": "t = Transpose<perm=[0,2,1]>(z) y = ConvTranspose<strides=[2]>(t, w_up)",
    "one weight for each of a batch": "sz = Shape(z) n0 = Slice(sz, axis0, axis1, axis0) "
    "sw = Shape(w) to = Concat<axis=0>(n0, sw) t = Expand(w, to) y = MatMul(z, t)",
    "rows mixed": "t = Transpose<perm=[0,2,1]>(x) u = MatMul(x, t) v = Softmax<axis=-1>(u) "
    "rows = MatMul(v, z) y = MatMul(rows, w)",
    "rows mixed in an Einsum": "t = Transpose<perm=[0,2,1]>(x) u = MatMul(x, t) "
    'rows = Einsum<equation="...nd,...ng->...gd">(z, u) y = MatMul(rows, w)',
    "gated": "top = Sigmoid(x) rows = Mul(z, top) y = MatMul(rows, w)",
    "rows added up": "u = Gather<axis=1>(z, picks) v = ReduceMean<keepdims=1>(z, axis1) "
    "rows = Add(u, v) y = MatMul(rows, w)",
    "Einsum": 'y = Einsum<equation="bsd,df->bsf">(z, w)',
    "a wide head without bias": "y = MatMul(z, w_packed)",
}


@pytest.mark.parametrize("norm", ["fused", "decomposed", "rms"])
@pytest.mark.parametrize("case", KEPT)
def test_a_bias_that_cannot_be_folded_or_would_outgrow_the_norm_stays(case: str, norm: str) -> None:
    spelled = {
        "fused": "z = LayerNormalization<epsilon=0.00001>(x, g, beta)",
        "decomposed": LAYER["div sqrt"],
        "rms": RMS["with a bias"],
    }[norm]
    after = check(f"{spelled} {KEPT[case]}", "float", 18, bias_stays=True)
    vectors = [one for one in after.graph.initializer if list(one.dims) == [toys.D]]
    assert len(vectors) == 2  # ones and what is left of the bias


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_qualify_is_refused_with_its_reason(case: str) -> None:
    body, reason = REFUSALS[case]
    inputs = {"x1": "[D]", "x2": "[D,m]", "x4": "[b,4,D]", "x_row": "[b,s,1]"}
    named = [
        f"{name}{shape}"
        for name, shape in inputs.items()
        if f"{name})" in body or f"{name}," in body
    ]
    extra = {
        "w_head": np.ones((toys.D // 4, 3), dtype=np.float32),
        "w_double": np.ones((2 * toys.D, 3), dtype=np.float32),
        "w16": np.ones((toys.D, 3), dtype=np.float16),
    }
    before = toys.model(body, inputs=" ".join(["x[b,s,D]", *named]), extra=extra)
    after, result = fold(before)
    assert result.count == 0
    assert reason in " ".join(skip.reason for skip in result.skipped)
    assert after.SerializeToString() == ir.to_proto(ir.from_proto(before)).SerializeToString()


def test_a_fold_that_overflows_half_precision_is_refused() -> None:
    body = "z = SimplifiedLayerNormalization(x, big) y = MatMul(z, w_wide)"
    for factor in (6e4, 1e-7):
        gain = np.full(toys.D, factor, dtype=np.float16)
        weight = np.full((toys.D, 3), 1.5, dtype=np.float16) / (1 if factor > 1 else 100)
        proto = toys.model(body, kind="float16", extra={"big": gain, "w_wide": weight})
        _, result = fold(proto)
        assert "leaves the range of FLOAT16" in result.skipped[0].reason


def test_the_experts_of_an_operator_take_gain_and_bias() -> None:
    rng = np.random.default_rng(5)
    experts = 3
    sizes = {"router": (toys.D, experts), "up": (experts, 2 * toys.F, toys.D)}
    sizes |= {"up_bias": (experts, 2 * toys.F), "down": (experts, toys.D, toys.F)}
    extra = {name: rng.standard_normal(size).astype(np.float32) / 4 for name, size in sizes.items()}
    before = toys.model(
        "n = LayerNormalization(x, g, beta) z = Reshape(n, flat) r = MatMul(z, router) "
        'y = com.microsoft.MoE<k=2, activation_type="swiglu", swiglu_fusion=1, '
        "normalize_routing_weights=1>(z, r, up, up_bias, down)",
        extra=extra,
    )
    after, result = fold(before)
    assert (result.count, result.skipped) == (1, [])
    assert not {"g", "beta"} & {one.name for one in after.graph.initializer}
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 2e-6


def test_a_weight_that_is_normalised_is_no_norm() -> None:
    body = "l = ReduceL2<keepdims=1>(w_square, last) n = Div(w_square, l) k = Mul(n, g_channel) "
    _, result = fold(toys.model(body + "y = MatMul(x, k)"))
    assert (result.count, result.skipped) == (0, [])


def test_einsum_takes_a_gain() -> None:
    body = 'z = LayerNormalization(x, g) y = Einsum<equation="bsd,df->bsf">(z, w)'
    check(body, "float", 18)


NODE_TESTS = ("test_rms_normalization", "test_layer_normalization")


def _node_test_models() -> list[tuple[str, onnx.ModelProto]]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    cases = []
    for case in found:
        if not case.name.startswith(NODE_TESTS):
            continue
        proto = onnx.ModelProto()
        proto.CopyFrom(case.model)
        for value, array in zip(list(proto.graph.input), case.data_sets[0][0], strict=True):
            if value.name in ("W", "B"):
                proto.graph.initializer.append(ir.to_proto(ir.tensor(array, name=value.name)))
                proto.graph.input.remove(value)
        cases.append((case.name, proto))
    return cases


def test_the_operator_tests_of_onnx_are_recognised_or_rightly_refused() -> None:
    cases = _node_test_models()
    assert len(cases) == 95
    for name, proto in cases:
        given = ir.from_proto(proto)
        annotate(given)
        found = list(find_norms(given))
        assert len(found) == 1, name
        shape = next(list(one.dims) for one in proto.graph.initializer if one.name == "W")
        flattened = "layer" in name and "expanded" in name
        if len(shape) == 1 or flattened:
            # The expanded LayerNormalization flattens all normalised axes into one.
            assert isinstance(found[0], Norm), name
            assert found[0].width == np.prod(shape), name
            assert found[0].kind == ("rms" if "rms" in name else "layer"), name
        else:
            assert "more than the last axis" in found[0].reason, name


GENERATING = """{name} (int32[b, t] input_ids, int32[b, t] position_ids, int32[b, a] attention_mask,
    float[2, b, 1, p, D] past_0) => (float[b, t, 9] logits, float[2, b, 1, a, D] present_0)
{{
    x{name} = Gather(table, input_ids)
    n{name} = LayerNormalization(x{name}, g, beta)
    h{name} = MatMul(n{name}, w{name})
    {then}
    logits = MatMul(r{name}, head)
    u{name} = Unsqueeze(x{name}, axes)
    new{name} = Expand(u{name}, twice)
    present_0 = Concat<axis=3>(past_0, new{name})
}}"""


def test_graphs_by_which_one_operator_generates_share_no_constant_that_one_alone_reads() -> None:
    # ONNX Runtime hands what any graph of GreedySearch reads from outside to all of them. One has a
    # bias to fold into here; the other is given one, which the first does not read.
    first = GENERATING.format(name="first", then="rfirst = Add(hfirst, cfirst)")
    later = GENERATING.format(name="later", then="rlater = Relu(hlater)")
    text = f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        g (int32[b, t] ids, int32[1] longest, int32[1] least) => (int32[b, n] tokens) {{
            tokens = com.microsoft.GreedySearch<eos_token_id: int = 8, pad_token_id: int = 0,
                model_type: int = 0, init_decoder: graph = {first}, decoder: graph = {later}>
                (ids, longest, least)
        }}"""
    before = onnx.parser.parse_model(text.replace("D]", f"{toys.D}]"))
    graphs = {one.g.name: one.g for one in before.graph.node[0].attribute if one.HasField("g")}
    rng = np.random.default_rng(1)
    wide = (toys.D, toys.D)
    for graph, name, shape in (
        (before.graph, "table", (9, toys.D)),
        (before.graph, "g", toys.D),
        (before.graph, "beta", toys.D),
        (before.graph, "head", (toys.D, 9)),
        (graphs["first"], "wfirst", wide),
        (graphs["first"], "cfirst", toys.D),
        (graphs["later"], "wlater", wide),
    ):
        array = rng.standard_normal(shape).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    for name, numbers in (("axes", [0, 2]), ("twice", [2, 1, 1, 1, 1])):
        before.graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers), name))
    after, result = fold(before)
    assert result.count == 2
    inputs = {"ids": [[1, 2, 3], [4, 5, 6]], "longest": [12], "least": [10]}
    feeds = {name: np.array(numbers, np.int32) for name, numbers in inputs.items()}
    np.testing.assert_array_equal(toys.run(after, feeds)[0], toys.run(before, feeds)[0])
