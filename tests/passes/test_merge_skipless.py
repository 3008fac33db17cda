"""merge-skipless on toy blocks and on decoders without skip connections and norms."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_tricks
from onnx_tricks import MergeSkipless
from onnx_tricks.rewrite import PassResult, run_passes
from tests import toys
from tests.conftest import Export, import_recipes

import_recipes()

import torch  # noqa: E402 - where the exporters are not there, skip

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
        "wt = Transpose<perm=[1,0]>(w_kt) " + X + QKV.replace("w_k)", "wt)") + HEADS + MIX + FFN, 2),
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
        X + "qkv = MatMul(x, w_by_head) r = Reshape(qkv, packs) qs, ks, vs = Split<axis=-1>(r, fours) "
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
    inputs = (
        "ids[b,s]"
        if "ids" in body
        else f"h0[b,{5 if 'fixed' in body or 'back' in body else 's'},32]"
    )
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


@pytest.mark.parametrize(("kind", "opset"), [("float", 17), ("float16", 23)])
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
    exact = toys.run_exactly(raised(before, toy(body, "double", opset)), raised_feeds(before))[0]
    ours, theirs = (toys.run(one, toys.feeds(before))[0] for one in (before, after))
    assert toys.error(theirs, exact) <= 2 * toys.error(ours, exact) + 1e-7
    again, second = merge(after)
    assert (second.count, second.skipped) == (0, [])
    assert again.SerializeToString() == after.SerializeToString()


def raised(proto: onnx.ModelProto, wide: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float64, with the very weights that the original has."""
    for narrow, one in zip(proto.graph.initializer, wide.graph.initializer, strict=True):
        array = ir.serde.deserialize_tensor(narrow).numpy()
        if array.dtype.kind != "i":
            one.CopyFrom(ir.to_proto(ir.tensor(array.astype(np.float64), name=one.name)))
    return wide


def raised_feeds(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    feeds = toys.feeds(proto)
    return {k: v if v.dtype.kind == "i" else v.astype(np.float64) for k, v in feeds.items()}
