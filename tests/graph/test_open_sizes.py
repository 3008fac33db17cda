"""Sizes for what a graph leaves open, from the numbers that it holds."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.open_sizes import find_image, lengths
from tests.verify.conftest import parse


def image(text: str):
    return find_image(ir.from_proto(parse(text)).graph.inputs[0])


@pytest.mark.parametrize(
    ("table", "strides", "size"),
    [
        ("[1,50,8]", 4, (28, 28)),  # 7 by 7 and a class token
        ("[1,16,8]", 4, (16, 16)),
        ("[1,13,8]", 4, (12, 16)),  # 3 by 4 and a class token
        ("[1,16,8]", 2, (10, 10)),  # patches overlap
    ],
)
def test_patches_are_as_many_as_positions(table, strides, size) -> None:
    text = f"""
    g (float[b,3,h,w] pixels) => (float[b,8,i,j] y) <float[8,3,4,4] patch, float{table} positions>
    {{ y = Conv<strides = [{strides}, {strides}]>(pixels, patch) }}"""
    assert image(text).sizes[0] == size


def test_a_table_without_a_batch_axis_comes_after_usual_sizes() -> None:
    text = """
    g (float[b,3,h,w] pixels) => (float[b,8,i,j] y) <float[8,3,4,4] patch, float[10,8] positions>
    { c = Cast<to = 1>(pixels) y = Conv<strides = [4, 4]>(c, patch) }"""
    sizes = image(text).sizes
    assert sizes.index((64, 64)) < sizes.index((12, 12))


def test_maps_may_have_as_many_pixels_as_a_constant_has_rows() -> None:
    text = """
    g (float[b,3,h,w] pixels) => (float[b,8,i,j] y)
    <float[8,3,3,3] stem, float[25,25] biases>
    { y = Conv<strides = [2, 2]>(pixels, stem) }"""
    assert (5 * 16, 5 * 16) in image(text).sizes


def test_images_have_the_channels_that_the_convolution_reads() -> None:
    text = """
    g (float[b,c,h,w] pixels) => (float[b,8,i,j] y) <float[8,1,4,4] patch>
    { y = Conv(pixels, patch) }"""
    assert image(text).channels == 1


@pytest.mark.parametrize("dims", ["b,3,8,8", "b,n,8", "b", "b,n,points,2"])
def test_what_leaves_no_image_open_is_none(dims) -> None:
    assert image(f"g (float[{dims}] x) => (float[{dims}] y) {{ y = Neg(x) }}") is None


def test_the_longest_series_comes_first() -> None:
    text = """
    g (float[b,n,3] x) => (float[b,m,3] y)
    <int64[1] start = {4}, int64[1] end = {40}, int64[1] axis = {1}>
    { y = Slice(x, start, end, axis) }"""
    assert lengths(ir.from_proto(parse(text)).graph) == (40, 4)


def test_features_are_as_wide_as_the_weights_that_read_them() -> None:
    text = """
    g (float[b,n,width] x) => (float[b,n,4] y) <float[6,4] w> { y = MatMul(x, w) }"""
    assert read_interface(ir.from_proto(parse(text))).inputs[0].dims == ("b", "n", 6)
