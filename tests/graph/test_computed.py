"""Weights that a graph makes of others: stored where that takes no more room, and then folded."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_tricks
from onnx_tricks.errors import ModelError
from onnx_tricks.graph.computed import store_weights
from tests import toys

NORM = "z = LayerNormalization(x, g, beta) "
BOUNDS = {"own": np.array([toys.D, 2 * toys.D]), "cut": np.array([toys.D])}
END = {"end": np.array([3 * toys.D])}
MADE = {
    "split": NORM + "u, v = Split<axis=1>(w_packed, own) q = MatMul(z, u) k = MatMul(m, v) "
    "y = Concat<axis=-1>(q, k)",
    "sliced": NORM + "u = Slice(w_packed, axis0, cut, axis1) v = Slice(w_packed, cut, end, axis1) "
    "q = MatMul(z, u) k = MatMul(m, v) y = Concat<axis=-1>(q, k)",
    "sliced by a length of the input": NORM + "sx = Shape(m) d = Gather(sx, last) "
    "u = Slice(w_packed, axis0, d, axis1) v = Slice(w_packed, d, end, axis1) "
    "q = MatMul(z, u) k = MatMul(m, v) y = Concat<axis=-1>(q, k)",
    "turned behind a split": NORM + "wt = Transpose<perm=[1,0]>(w_packed) "
    "u, v = Split<axis=0>(wt, own) ut = Transpose<perm=[1,0]>(u) vt = Transpose<perm=[1,0]>(v) "
    "q = MatMul(z, ut) k = MatMul(m, vt) y = Concat<axis=-1>(q, k)",
    "normalised": NORM + "l = ReduceL2<keepdims=1>(w_square, axis0) u = Div(w_square, l) "
    "v = Mul(u, g3) y = MatMul(z, v)",
    "joined": NORM + "u = Concat<axis=1>(w, w2) y = MatMul(z, u)",
}


def _model(body: str) -> onnx.ModelProto:
    return toys.model(body, inputs="x[b,s,D] m[b,s,D]", extra=BOUNDS | END)


def _numbers(proto: onnx.ModelProto) -> int:
    return sum(int(np.prod(one.dims)) for one in proto.graph.initializer)


@pytest.mark.parametrize("name", MADE)
def test_a_norm_folds_into_a_weight_that_is_computed_from_others(name: str) -> None:
    before = _model(MADE[name])
    after, report = onnx_tricks.optimize(before, passes=["fold-norm"])
    assert (report.passes[0].applied, report.passes[0].skipped) == (1, [])
    assert report.verification.status == "passed"
    assert not {"Div", "Slice", "Split"} & {node.op_type for node in after.graph.node}
    assert _numbers(after) <= _numbers(before) + toys.D
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6


def test_a_weight_that_something_else_reads_whole_is_not_stored_twice() -> None:
    before = _model(
        MADE["split"].replace("y = ", "h = ") + " t = MatMul(m, w_packed) y = Add(h, t)"
    )
    after, report = onnx_tricks.optimize(before, passes=["fold-norm"])
    (skip,) = report.passes[0].skipped
    assert "computes from another, which stays" in skip.reason
    assert "Split" in {node.op_type for node in after.graph.node}


def test_a_model_that_no_pass_changes_keeps_its_computed_weights() -> None:
    before = _model(MADE["split"].replace(NORM, "z = Identity(x) "))
    after, report = onnx_tricks.optimize(before, passes=["fold-norm"])
    assert report.passes[0].applied == 0
    assert [node.op_type for node in after.graph.node] == [
        node.op_type for node in before.graph.node
    ]


@pytest.mark.parametrize(
    "body",
    [
        "u = Gather<axis=1>(w, far) y = MatMul(z, u)",
        "u = Slice(w, axis0, cut, far) y = MatMul(z, u)",
        "u = Concat(w, w) y = MatMul(z, u)",
        "u = MatMul(w, beta2) y = MatMul(z, u)",
    ],
)
def test_a_weight_that_cannot_be_computed_is_told_with_its_node(body: str) -> None:
    extra = BOUNDS | {"far": np.array([99]), "beta2": np.ones((toys.D + 1, 1), np.float32)}
    before = toys.model(NORM + body, inputs="x[b,s,D]", extra=extra)
    with pytest.raises(ModelError, match=r"node .* cannot be computed from its constants of shap"):
        onnx_tricks.optimize(before, verify=False)


def test_stored_weights_are_computed_when_they_are_read() -> None:
    model = ir.serde.deserialize_model(_model(MADE["normalised"]))
    store_weights(model)
    weight = next(node.inputs[1] for node in model.graph if node.op_type == "MatMul")
    assert weight is not None
    assert isinstance(weight.const_value, ir.LazyTensor)
