"""What is a function of the token id alone, and what only looks like it."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_tricks.graph.shapes import annotate
from onnx_tricks.patterns.region_search import find_regions
from onnx_tricks.patterns.states import Row
from tests import toys

D, V = toys.D, toys.V
LOOKUP = "x = Gather(table, ids) "

# Bodies that make y, and the layout of y: T and B are the axes of the ids.
B, T = "#0", "#1"
ROWS = {
    "scale": ("y = Mul(x, half)", ((B,), (T,), (D,))),
    "vector": ("y = Add(x, beta)", ((B,), (T,), (D,))),
    "product": ("y = MatMul(x, w)", ((B,), (T,), (12,))),
    "product of a vector": ("y = MatMul(x, w_vector)", ((B,), (T,))),
    "product from the left": (
        "t = Transpose<perm=[0,2,1]>(x) y = MatMul(w_transposed, t)",
        ((B,), (12,), (T,)),
    ),
    "experts": ("u = Unsqueeze(x, axis1) y = MatMul(u, w_experts4)", ((B,), (3,), (T,), (12,))),
    "einsum": ('y = Einsum<equation="bti,io->bto">(x, w)', ((B,), (T,), (12,))),
    "norm": ("y = LayerNormalization(x, g, beta)", ((B,), (T,), (D,))),
    "softmax": ("y = Softmax<axis=-1>(x)", ((B,), (T,), (D,))),
    "mean": ("y = ReduceMean<keepdims=1>(x, last)", ((B,), (T,), ())),
    "largest": ("y, i = TopK<axis=-1>(x, three)", ((B,), (T,), (3,))),
    "picked by its own numbers": (
        "u = ArgMax<axis=-1,keepdims=0>(x) y = Gather(w, u)",
        ((B,), (T,), (12,)),
    ),
    "flattened": ("y = Reshape(x, flat)", ((B, T), (D,))),
    "heads": ("y = Reshape(x, heads)", ((B,), (T,), (4,), (D // 4,))),
    "heads in front": (
        "u = Reshape(x, heads) y = Transpose<perm=[0,2,1,3]>(u)",
        ((B,), (4,), (T,), (D // 4,)),
    ),
    "heads beside tokens": ("y = Reshape(x, rows_of_heads)", ((B,), (T, 4), (D // 4,))),
    "there and back": (
        "sh = Shape(x) u = Reshape(x, flat) v = MatMul(u, w_square) y = Reshape(v, sh)",
        ((B,), (T,), (D,)),
    ),
    "shape worked out": (
        "sh = Shape(ids) n = ReduceProd(sh) to = Concat<axis=0>(n, last) y = Reshape(x, to)",
        ((B, T), (D,)),
    ),
    "root of its width": (
        "sh = Shape(x) w0 = Gather(sh, index2) f = Cast<to=1>(w0) r = Sqrt(f) y = Div(x, r)",
        ((B,), (T,), (D,)),
    ),
    "parts": ("u, v = Split<axis=-1>(x, halves) y = Concat<axis=-1>(v, u)", ((B,), (T,), (D,))),
    "slice": ("y = Slice(x, start, stop, last)", ((B,), (T,), (2,))),
    "zeros like it": (
        "sh = Shape(x) z = ConstantOfShape(sh) y = Add(x, z)",
        ((B,), (T,), (D,)),
    ),
    "repeated": (
        "u = Unsqueeze(x, place2) y = Expand(u, twice)",
        ((B,), (T,), (2,), (D,)),
    ),
    "product of its own parts": (
        "u = Reshape(x, heads) v = Transpose<perm=[0,1,3,2]>(u) y = MatMul(u, v)",
        ((B,), (T,), (4,), (4,)),
    ),
}
OTHERS = {
    "softmax over tokens": "y = Softmax<axis=1>(x)",
    "mean over tokens": "m = ReduceMean<keepdims=1>(x, axis1) y = Sub(x, m)",
    "running sum": "y = CumSum(x, one_int)",
    "attention": "t = Transpose<perm=[0,2,1]>(x) s = MatMul(x, t) y = MatMul(s, x)",
    "tokens and batch swapped by a reshape": (
        "sh = Shape(x) p = Gather(sh, swapped) z = Reshape(x, p) y = Transpose<perm=[1,0,2]>(z)"
    ),
    "positions added": "y = Add(x, places)",
    "times the number of tokens": (
        "u = ArgMax<axis=-1>(x) n = Shape<start=1,end=2>(x) v = Mul(u, n) f = Cast<to=1>(v) "
        "y = Add(x, f)"
    ),
    "shifted": (
        "u = Slice(x, start, far, axis1) v = Slice(x, axis0, start, axis1) y = Concat<axis=1>(u, v)"
    ),
    "scaled by the largest": "z, s, p = DynamicQuantizeLinear(x) y = DequantizeLinear(z, s, p)",
    "random": "u = RandomUniformLike(x) y = Add(x, u)",
}


def model(body: str) -> onnx.ModelProto:
    extra = {
        "w_experts4": toys.weights()["w_experts"].astype(np.float32),
        "places": np.arange(5 * D, dtype=np.float32).reshape(1, 5, D),
        "rows_of_heads": np.array([0, -1, D // 4]),
        "swapped": np.array([1, 0, 2]),
        "index2": np.array(2),
        "place2": np.array([2]),
        "one_int": np.array(1),
        "three": np.array([3]),
        "twice": np.array([1, 1, 2, 1]),
    }
    return toys.model(LOOKUP + body, inputs="ids[b,s]", extra=extra)


def layout(proto: onnx.ModelProto) -> object:
    graph = ir.from_proto(proto)
    annotate(graph)
    region = find_regions(graph)[0]
    (y,) = graph.graph.outputs
    state = region.states.get(y)
    return state.layout if isinstance(state, Row) else None


def tokens(
    array: np.ndarray, axes: tuple[tuple[int | str, ...], ...], ids: np.ndarray
) -> np.ndarray:
    """An output as [B, T, numbers]."""
    factors = [factor for axis in axes for factor in axis]
    lengths = {B: ids.shape[0], T: ids.shape[1]}
    apart = array.reshape([lengths.get(one, one) for one in factors])
    order = sorted(range(len(factors)), key=lambda one: str(factors[one]))
    return apart.transpose(order).reshape(*ids.shape, -1)


@pytest.mark.parametrize(("body", "axes"), ROWS.values(), ids=ROWS)
def test_a_function_of_the_id_is_found_with_its_axes(body: str, axes) -> None:
    proto = model(body)
    assert layout(proto) == axes
    # And it is one: equal ids give equal numbers, wherever they stand.
    ids = np.random.default_rng(0).integers(0, V, (3, 5))
    single = toys.run(proto, {"ids": np.arange(V)[None]}, optimise=False)[0]
    rows = tokens(single, axes, np.arange(V)[None])[0]
    found = tokens(toys.run(proto, {"ids": ids}, optimise=False)[0], axes, ids)
    np.testing.assert_allclose(found, rows[ids], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_what_only_looks_like_a_function_of_the_id_is_told_apart(body: str) -> None:
    proto = model(body)
    assert layout(proto) is None
    # And it is none: equal tokens differ, or other tokens or another number of them are felt.
    ids = np.random.default_rng(0).integers(0, V, (2, 5))
    changed, alike = ids.copy(), np.full_like(ids, 3)
    changed[0, 0] = (ids[0, 0] + 1) % V
    run = functools.partial(toys.run, proto, optimise=False)
    (first,), (other,), (equal,) = (run({"ids": one}) for one in (ids, changed, alike))
    felt = not np.allclose(first[:, 1:], other[:, 1:]) or not np.allclose(equal[:, 0], equal[:, 1])
    if "places" not in body:  # which fix the number of tokens
        felt = felt or not np.allclose(first[:1, :4], run({"ids": ids[:1, :4]})[0])
    assert felt


def test_the_ids_are_found_before_they_are_rearranged() -> None:
    proto = toys.model(
        "i = Reshape(ids, last) x = Gather(table, i) y = MatMul(x, w)", inputs="ids[b,s]"
    )
    graph = ir.from_proto(proto)
    (region,) = find_regions(graph)
    assert region.ids.name == "ids"
    assert layout(proto) == ((B, T), (12,))


def test_a_table_of_other_length_is_another_region() -> None:
    proto = toys.model(
        "x = Gather(table, ids) p = Gather(short, ids) y = Add(x, p)",
        inputs="ids[b,s]",
        extra={"short": np.ones((7, D), np.float32)},
    )
    assert [region.vocabulary for region in find_regions(ir.from_proto(proto))] == [V, 7]
    assert {len(region.operations) for region in find_regions(ir.from_proto(proto))} == {1}
