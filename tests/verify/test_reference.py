"""Raising graphs to float64: every op at full precision, or counted as left in float32."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_tricks.runtime.sessions import Session
from onnx_tricks.verify.reference import CannotRaise, raise_to_double
from tests.verify.conftest import parse

RNG = np.random.default_rng(7)
X, SKIP = RNG.standard_normal((2, 2, 5, 64))
GAIN, SHIFT, BIAS = RNG.standard_normal((3, 64))
EPS = float(np.float32(1e-5))
CENTRED = X - X.mean(-1, keepdims=True)


def rms(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))
    return scores / scores.sum(-1, keepdims=True) @ v


def raised(
    op: str, inputs: list[np.ndarray], outputs: int = 1, opset: int = 23, **attributes: object
):
    """Run one op, raised: the last of its outputs, and what stayed in float32."""
    names = [f"x{index}" for index in range(len(inputs))]
    made = [f"y{index}" for index in range(outputs)]
    domain = "com.microsoft" if op.startswith("Skip") else ""
    node = helper.make_node(op, names, made, domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "op",
        [helper.make_tensor_value_info(n, 1, i.shape) for n, i in zip(names, inputs, strict=True)],
        [helper.make_tensor_value_info(made[-1], 1, None)],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))
    narrow = raise_to_double(model)
    feeds = dict(zip(names, inputs, strict=True))
    return Session(model, optimised=False).run(feeds)[made[-1]], narrow


def unfolded(x: np.ndarray, w: np.ndarray, stride: int, dilation: int, pad: int) -> np.ndarray:
    """A convolution, element by element."""
    x = np.pad(x, [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    span = dilation * (w.shape[2] - 1) + 1
    size = (x.shape[2] - span) // stride + 1
    y = np.zeros((len(x), len(w), size, size))
    for i, j in np.ndindex(size, size):
        part = x[:, :, i * stride :, j * stride :][:, :, :span:dilation, :span:dilation]
        y[:, :, i, j] = np.einsum("ncij,mcij->nm", part, w)
    return y


IMAGE, KERNEL = RNG.standard_normal((2, 3, 16, 16)), RNG.standard_normal((4, 3, 2, 2))
Q, K, V = RNG.standard_normal((3, 2, 4, 5, 16))
WAYS = {
    "rms": ("RMSNormalization", [X, GAIN], {"epsilon": 1e-5}, rms(X) * GAIN),
    "rms in float32 inside": (
        "RMSNormalization",
        [X, GAIN],
        {"epsilon": 1e-5, "stash_type": 1},
        rms(X) * GAIN,
    ),
    "layer norm": (
        "LayerNormalization",
        [X, GAIN, SHIFT],
        {"epsilon": 1e-5, "stash_type": 1},
        rms(CENTRED) * GAIN + SHIFT,
    ),
    "skip rms": (
        "SkipSimplifiedLayerNormalization",
        [X, SKIP, GAIN, BIAS],
        {"epsilon": 1e-5},
        rms(X + SKIP + BIAS) * GAIN,
    ),
    "attention": ("Attention", [Q, K, V], {"softmax_precision": 1}, attention(Q, K, V)),
    "erf": ("Erf", [3 * X], {}, np.vectorize(math.erf)(3 * X)),
    "instance norm": (
        "InstanceNormalization",
        [IMAGE, GAIN[:3], SHIFT[:3]],
        {"epsilon": 1e-5},
        rms((IMAGE - IMAGE.mean((2, 3), keepdims=True)).reshape(2, 3, -1)).reshape(IMAGE.shape)
        * GAIN[:3, None, None]
        + SHIFT[:3, None, None],
    ),
    "patches": ("Conv", [IMAGE, KERNEL], {"strides": [2, 2]}, unfolded(IMAGE, KERNEL, 2, 1, 0)),
    "dilated": (
        "Conv",
        [IMAGE, KERNEL],
        {"strides": [1, 1], "dilations": [3, 3], "pads": [1, 1, 1, 1]},
        unfolded(IMAGE, KERNEL, 1, 3, 1),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_op_is_raised_to_full_precision(way) -> None:
    op, inputs, attributes, right = WAYS[way]
    result, narrow = raised(op, inputs, **attributes)
    assert not narrow
    assert result.dtype == np.float64
    assert np.linalg.norm(result - right) < 1e-14 * np.linalg.norm(right)


def test_a_convolution_of_an_old_opset_is_left_in_float32() -> None:
    _, inputs, attributes, _ = WAYS["dilated"]
    with pytest.raises(CannotRaise, match=r"float32 kernels only \(Conv\)"):
        raised("Conv", inputs, opset=7, **attributes)


def test_the_residual_of_a_skip_norm_is_not_rounded() -> None:
    result, _ = raised("SkipSimplifiedLayerNormalization", [X, SKIP, GAIN], 4, epsilon=1e-5)
    np.testing.assert_array_equal(result, X + SKIP)


def test_an_op_without_a_double_kernel_stays_in_float32_and_is_counted() -> None:
    x = RNG.standard_normal((1, 2, 8, 8))
    graph = """
    g (float[1,2,8,8] x) => (float[1,2,4,4] y)
    <float[8,8] w>
    { a = MatMul(x, w) y = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(a) }"""
    proto = parse(graph)
    w = numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float64)
    model = ir.from_proto(proto)
    assert raise_to_double(model) == {"AveragePool": 1}
    result = Session(model, optimised=False).run({"x": x})["y"]
    right = (x @ w).reshape(1, 2, 4, 2, 4, 2).mean((3, 5))
    assert 1e-9 < np.linalg.norm(result - right) / np.linalg.norm(right) < 1e-6


def test_a_cast_to_half_precision_rounds_nothing() -> None:
    text = """
    g (float[3,8] x) => (float[3,8] y)
    <float[8,8] w>
    { a = Cast<to = 10>(x) b = Cast<to = 1>(a) y = MatMul(b, w) }"""
    proto = parse(text)
    w = numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float64)
    model = ir.from_proto(proto)
    raise_to_double(model)
    x = RNG.standard_normal((3, 8))
    result = Session(model, optimised=False).run({"x": x})["y"]
    np.testing.assert_allclose(result, x @ w, rtol=1e-13)


def test_both_branches_of_an_if_are_raised() -> None:
    text = """
    g (float[3,8] x, bool c) => (float[3,8] y)
    <float[8,8] w>
    {
      y = If (c) <
        then_branch = one () => (float[3,8] p) { p = MatMul(x, w) },
        else_branch = two () => (float[3,8] q) { t = Shape(x) q = ConstantOfShape(t) }>
    }"""
    proto = parse(text)
    w = numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float64)
    model = ir.from_proto(proto)
    raise_to_double(model)
    session, x = Session(model, optimised=False), RNG.standard_normal((3, 8))
    np.testing.assert_allclose(session.run({"x": x, "c": np.array(True)})["y"], x @ w, rtol=1e-13)
    assert not session.run({"x": x, "c": np.array(False)})["y"].any()


def test_a_model_in_float64_is_not_raised() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.DOUBLE, [2])
    y = helper.make_tensor_value_info("y", TensorProto.DOUBLE, [2])
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "g", [x], [y])
    with pytest.raises(CannotRaise, match="float64"):
        raise_to_double(ir.from_proto(helper.make_model(graph)))


def test_positions_fall_into_the_buckets_that_the_model_says() -> None:
    """T5 rounds a logarithm down in float32; in float64 edges would fall elsewhere."""
    model = ir.from_proto(
        parse(
            """buckets (int64[N] position, float[N] x) => (int64[N] bucket, float[N] y)
            <float part = {0.7}> {
              p = Cast <to = 1> (position) q = Mul (p, part) bucket = Cast <to = 7> (q)
              b = Cast <to = 1> (bucket) y = Add (x, b)
            }"""
        )
    )
    position = np.arange(200)
    expected = (position.astype(np.float32) * np.float32(0.7)).astype(np.int64)
    assert np.any(expected != (position * float(np.float32(0.7))).astype(np.int64))
    raise_to_double(model)
    feeds = {"position": position, "x": np.zeros(200)}
    found = Session(model, optimised=False).run(feeds)
    np.testing.assert_array_equal(found["bucket"], expected)
    assert found["y"].dtype == np.float64


def test_buckets_inside_a_branch_are_those_of_the_model() -> None:
    """DeBERTa works them out in an If, from lengths that come from outside."""
    branch = helper.make_graph(
        [
            helper.make_node("Cast", ["position"], ["inner"], to=TensorProto.FLOAT),
            helper.make_node("Cast", ["seven"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["inner", "wide"], ["tenth"]),
            helper.make_node("Cast", ["tenth"], ["bucket"], to=TensorProto.INT64),
            helper.make_node("Cast", ["bucket"], ["result"], to=TensorProto.FLOAT),
        ],
        "branch",
        [],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(7, np.int64), "seven")],
    )
    model = parse("g (int64[N] position, bool c, float[N] x) => (float[N] y) { y = Neg(x) }")
    del model.graph.node[:]
    model.graph.node.extend(
        [
            helper.make_node("If", ["c"], ["bias"], then_branch=branch, else_branch=branch),
            helper.make_node("Add", ["x", "bias"], ["y"]),
        ]
    )
    wide = ir.from_proto(model)
    raise_to_double(wide)
    position = np.arange(50)
    feeds = {"position": position, "c": np.array(True), "x": np.zeros(50)}
    found = Session(wide, optimised=False).run(feeds)["y"]
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, position // 7)
