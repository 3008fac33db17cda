"""Which inputs are caches, whatever their names."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnx_tricks.graph.caches import find_caches
from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.sizes import measure

CACHE = "float[B, 4, P, 8] k"
APPENDED = "o = Concat <axis = 2> (k, new) read = Relu(o)"


def _model(inputs: str, outputs: str, nodes: str) -> ir.Model:
    return ir.from_onnx_text(
        f"""
        <ir_version: 9, opset_import: ["": 17, "com.microsoft": 1]>
        g ({inputs}, float[B, 4, T, 8] x) => ({outputs}) <float[2, 2] table = {{0, 1, 2, 3}}>
        {{ new = Relu(x) {nodes} }}
        """
    )


def test_an_input_that_is_appended_to_and_leaves_is_a_cache() -> None:
    model = _model(
        "float[B, 4, P, 8] k",
        "float[B, T, 4, 8] o",
        "whole = Concat <axis = 2> (k, new) o = Transpose <perm = [0, 2, 1, 3]> (whole) "
        "read = Relu(whole)",
    )
    assert read_interface(model).presents == {"k": "o"}
    (cache,) = read_interface(model).role("cache")
    assert (cache.growing, cache.rows, cache.sized(3, 7)) == (2, 0, [3, 4, 7, 8])


@pytest.mark.parametrize(
    ("image", "nodes"),
    [
        ("float[B, 4, P, 8] image", "o = Concat <axis = 2> (image, new)"),  # nothing attends to it
        ("float[B, 4, 9, 8] image", "o = Concat <axis = 2> (image, new) r = Relu(o)"),
        ("float[B, T, P, 8] image, int64[N, 4] i", "o = ScatterND(image, i, new) r = Relu(o)"),
        ("float[B, 4, 9, 8] image, int64[N, 4] i", "o = ScatterND(image, i, new)"),
    ],
)
def test_what_leaves_beside_an_image_is_no_cache(image: str, nodes: str) -> None:
    assert not find_caches(_model(image, "float[B, 4, S, 8] o", nodes))


def test_images_in_front_of_a_text_are_no_cache() -> None:
    model = _model(
        "float[B, 4, P, 8] image", "o", "whole = Concat <axis = 2> (image, new) o = Relu(whole)"
    )
    assert not find_caches(model)


def test_an_output_that_an_operator_appends_continues_its_cache() -> None:
    model = _model(
        "float[B, 4, P, 8] k, float[B, 4, P, 8] v, float[B, T, 32] q",
        "o, k2, v2",
        "o, k2, v2 = com.microsoft.MultiHeadAttention <num_heads = 4> (q, x, x, , , , k, v)",
    )
    assert read_interface(model).presents == {"k": "k2", "v": "v2"}


def test_outputs_of_a_branch_continue_caches() -> None:
    model = _model(
        "float[B, 4, P, 8] k, bool flag",
        "float[B, 4, S, 8] o",
        "o = If (flag) <then_branch = a () => (float[B, 4, S, 8] i) { i = Concat <axis = 2> "
        "(k, new) r = Relu(i) }, else_branch = b () => (float[B, 4, S, 8] j) "
        "{ j = Identity(new) }>",
    )
    assert read_interface(model).presents == {"k": "o"}


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("past_key_values.0.key", "present.0.key"),
        ("past_key_values.0.key", "present_key_values.0.key"),
        ("past_key_0", "present_key_0"),
    ],
)
def test_a_cache_that_the_graph_does_not_show_is_known_by_its_name(name: str, output: str) -> None:
    model = _model("float[B, 4, P, 8] k", "float[B, 4, P, 8] o", "o = Relu(k)")
    model.graph.inputs[0].name, model.graph.outputs[0].name = name, output
    assert read_interface(model).presents == {name: output}


def test_keys_and_values_in_one_tensor_have_their_batch_behind_the_two() -> None:
    model = _model(
        "float[2, B, 4, P, 8] past_0, float[B, T, 32] q, float[32, 96] w, float[96] c",
        "o, present_0",
        "o, present_0 = com.microsoft.Attention <num_heads = 4, unidirectional = 1> "
        "(q, w, c, , past_0)",
    )
    (cache,) = read_interface(model).role("cache")
    assert (cache.growing, cache.rows, cache.sized(3)) == (3, 1, [2, 3, 4, 0, 8])
    assert read_interface(model).presents == {"past_0": "present_0"}


def test_a_buffer_that_is_written_into_is_a_cache_that_does_not_grow() -> None:
    model = _model(
        "float[B, 4, 64, 8] k, int64[T] places",
        "float[B, 4, 64, 8] o",
        "i = Expand(places, size) o = ScatterElements <axis = 2> (k, i, new) "
        "size = Shape(x) n = Gather(table, places) r = Relu(o)",
    )
    (cache,) = read_interface(model).role("cache")
    assert (cache.buffer, cache.fixed, cache.sized(3)) == (True, True, [3, 4, 64, 8])
    assert measure(model).cache_values_per_token is None


@pytest.mark.parametrize(
    ("declared", "nodes", "placed"),
    [
        ("int64 n", "i = Cast <to = 7> (n) r = Range(i, i, i)", True),
        ("int64[1] n", "a = Range(zero, size, one) i = Squeeze(n) r = Add(a, i)", True),
        ("int64[T] n", "r = Gather(table, n)", True),
        ("int64[1] n", "r = Slice(table, n, n)", True),
        ("int64[1] n", "r = Add(n, n)", False),  # how many frames there are, and some more
        ("int64[T] n", "r = Gather(x, n)", False),  # which tokens are asked for
        ("int64[T] n", "r = Gather(n, zero)", False),
        ("int64[B] n", "r = Gather(table, n)", False),  # one a row: the voice that speaks, say
        ("int64 n", "r = Gather(table, n)", False),
        ("int64 n", "r = Neg(n)", False),  # how many logits to keep, as some exports ask
        ("float n", "r = Range(n, n, n)", False),
    ],
)
def test_positions_are_told_by_what_is_done_with_them(
    declared: str, nodes: str, placed: bool
) -> None:
    ends = "zero = Constant <value_int = 0> () one = Constant <value_int = 1> () size = Size(x)"
    model = _model(f"{CACHE}, {declared}", "o", f"{ends} {APPENDED} {nodes}")
    assert [one.name for one in read_interface(model).role("positions")] == ["n"] * placed


def test_positions_are_those_of_the_new_tokens() -> None:
    nodes = "a = Range(first, first, first) b = Gather(table, each)"
    model = _model(f"{CACHE}, int64 first, int64[T] each", "o", f"{APPENDED} {nodes}")
    valid = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    first, each = (one.places(valid, 2).tolist() for one in read_interface(model).role("positions"))
    assert (first, each) == (3, [3, 4])


@pytest.mark.parametrize(
    ("declared", "axis", "sized"),
    [
        ("float[P, B, 4, 8]", 0, [5, 3, 4, 8]),
        ("float[P, 1, 4, 8]", 0, [5, 1, 4, 8]),
        ("float[P, 4, 8]", 0, [5, 4, 8]),
        ("float[1, 4, P, 8]", 2, [1, 4, 5, 8]),
        ("float[B, 4, 8, P]", 3, [3, 4, 8, 5]),
    ],
)
def test_a_cache_is_sized_along_its_own_axes(declared: str, axis: int, sized: list[int]) -> None:
    nodes = f"o = Concat <axis = {axis}> (k, new) r = Relu(o)"
    (cache,) = read_interface(_model(f"{declared} k", "o", nodes)).role("cache")
    assert cache.sized(3, 5) == sized


def test_positions_that_are_a_state_have_no_batch() -> None:
    model = _model("int64[P] past", "o", "o = Relu(new)")
    model.graph.inputs[0].name = "past_key_values.positions"
    (cache,) = read_interface(model).role("cache")
    assert cache.sized(3, 5) == [5]


def test_a_past_that_is_appended_to_twice_is_a_cache() -> None:
    nodes = "o = Concat <axis = 2> (k, new) i = Concat <axis = 2> (k, new) r = Relu(i)"
    model = _model(CACHE, "o", nodes)
    assert read_interface(model).presents == {"k": "o"}
