"""What values are known to be before the model runs: as the operators' own reference has it."""

from __future__ import annotations

import numpy as np
import onnx.reference
import onnx_ir as ir
import pytest

from onnx_tricks.graph.constants import evaluate, is_constant, scalar
from onnx_tricks.graph.shapes import annotate
from tests import toys

EXTRA = {
    "i": np.array([7, -7, 9]),
    "j": np.array([2, 2, -4]),
    "back": np.array([-1]),
    "sizes": np.array([5, 11]),
    "wide": np.array([2, 1, toys.D]),
}
NODES = {
    "slice": "y = Slice(w, start, stop, axis0)",
    "slice backwards": "y = Slice(w, last, before_all, axis0, back)",
    "slice without axes": "y = Slice(w, start, stop)",
    "split": "a, y = Split<axis=0>(w, sizes)",
    "split evenly": "a, y = Split<axis=1, num_outputs=2>(w)",
    "gather": "y = Gather<axis=1>(w, picks)",
    "divided whole numbers": "k = Div(i, j) y = Cast<to=1>(k)",
    "divided": "y = Div(w, half)",
    "power": "y = Pow(w, two)",
    "product": "t = Transpose(w) y = MatMul(t, w)",
    "length": "y = ReduceL2<keepdims=0>(w, axis1)",
    "sum of all": "y = ReduceSum(w)",
    "sum of nothing": "y = ReduceSum<noop_with_empty_axes=1>(w)",
    "filled": "y = ConstantOfShape<value=float[1] {3.0}>(pair)",
    "chosen": "k = Equal(i, j) f = Cast<to=9>(i) l = Where(f, i, j) y = Cast<to=1>(l)",
    "clipped": "y = Clip(w, half)",
    "expanded": "y = Expand(g, wide)",
    "part of a static shape": "s = Shape(x) l = Gather(s, last) y = Cast<to=1>(l)",
    "slice of a static shape": "s = Shape<start=1>(x) l = Slice(s, start, far) y = Cast<to=1>(l)",
}


@pytest.mark.parametrize("name", NODES)
def test_constants_are_what_the_operators_compute(name: str) -> None:
    proto = toys.model(NODES[name], extra=EXTRA)
    model = ir.from_proto(proto)
    annotate(model)
    found = evaluate(model.graph.outputs[0])
    (right,) = onnx.reference.ReferenceEvaluator(proto).run(None, toys.feeds(proto))
    assert found is not None
    assert found.dtype == right.dtype
    np.testing.assert_allclose(found, right, rtol=1e-6)


def test_lengths_that_are_not_static_are_no_constants() -> None:
    proto = toys.model("s = Shape(x) l = Gather(s, axis1) k = Slice(s, axis0, stop) y = Add(l, k)")
    model = ir.from_proto(proto)
    annotate(model)
    assert not any(is_constant(value) for node in model.graph for value in node.outputs)


def test_bounds_that_are_left_out_are_not_guessed() -> None:
    proto = toys.model("y = Clip(w, , half)")
    assert evaluate(ir.from_proto(proto).graph.outputs[0]) is None


def test_a_number_is_read_from_one_entry_alone() -> None:
    proto = toys.model("y = Div(half, two)")
    assert scalar(ir.from_proto(proto).graph.outputs[0]) == 0.25
    assert scalar(ir.from_proto(toys.model("y = Div(w, two)")).graph.outputs[0]) is None
