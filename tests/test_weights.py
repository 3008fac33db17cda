"""The weight algebra against plain float64, for any shape and type."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_tricks import weights

TYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]


@st.composite
def folds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """A weight, one gain per channel, and the channel axis."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(TYPES))
    gain = rng.standard_normal(shape[axis])
    if draw(st.booleans()):
        gain = gain.astype(dtype).astype(np.float64)
    return rng.standard_normal(shape).astype(dtype), gain, axis


@given(folds())
@settings(max_examples=200, deadline=None)
def test_scaling_rounds_the_exact_product_once(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    weight, gain, axis = case
    shape = [1] * weight.ndim
    shape[axis] = -1
    exact = weight.astype(np.float64) * gain.reshape(shape)
    found = weights.scale_axis(weight, gain, axis)
    assert found.dtype == weight.dtype
    np.testing.assert_array_equal(found, exact.astype(weight.dtype))


def test_scaling_in_blocks_gives_what_scaling_at_once_gives(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((50, 8)).astype(np.float32)
    gain = rng.standard_normal(8)
    whole = weights.scale_axis(weight, gain, 1)
    monkeypatch.setattr(weights, "_BLOCK", 24)
    np.testing.assert_array_equal(weights.scale_axis(weight, gain, 1), whole)
    np.testing.assert_allclose(
        weights.row_product(gain, weight.T), gain @ weight.T.astype(np.float64), rtol=1e-12
    )


def test_groups_scale_the_channels_that_their_part_reads() -> None:
    weight = np.ones((4, 3, 1), dtype=np.float32)
    gain = np.arange(1.0, 7.0)
    found = weights.scale_axis(weight, gain, 1, groups=2)
    np.testing.assert_array_equal(found[:2, :, 0], [[1, 2, 3]] * 2)
    np.testing.assert_array_equal(found[2:, :, 0], [[4, 5, 6]] * 2)


@pytest.mark.parametrize(
    ("gain", "lossy"), [(1.5, False), (1e-3, False), (1e-6, True), (6e4, True)]
)
def test_rounding_loss_tells_what_leaves_the_range_of_half_precision(gain, lossy) -> None:
    weight = np.random.default_rng(0).uniform(0.5, 2, (8, 8)).astype(np.float16)
    assert (weights.rounding_loss(weight, np.full(8, gain), 0) > 1) == lossy


@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 5, 3)])
def test_a_row_times_a_matrix_is_computed_in_float64(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal(shape).astype(np.float16)
    row = rng.standard_normal(5)
    exact = row @ matrix.astype(np.float64)
    np.testing.assert_allclose(weights.row_product(row, matrix), exact, rtol=1e-14)


@given(folds(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_centring_rounds_the_exact_difference_once(
    case: tuple[np.ndarray, np.ndarray, int], scaled: bool
) -> None:
    weight, scale, axis = case
    shape = [1] * weight.ndim
    shape[axis] = -1
    exact = weight.astype(np.float64) * (scale.reshape(shape) if scaled else 1)
    exact = exact - exact.mean(axis, keepdims=True)
    chosen = scale if scaled else None
    mean = weights.axis_mean(weight, axis, chosen)
    found = weights.subtract_mean(weight, mean, axis, chosen)
    assert found.dtype == weight.dtype
    unit = float(ml_dtypes.finfo(weight.dtype).eps)
    size = 1 + np.abs(weight.astype(np.float64)).max() * (1 + np.abs(scale).max())
    np.testing.assert_allclose(found.astype(np.float64), exact, rtol=unit, atol=1e-12 + unit * size)
    first = weights.subtract_mean(weight, mean, axis, chosen, slice(0, 1))
    np.testing.assert_array_equal(first, found[:1])


def test_rounding_errors_of_biases_do_not_add_up() -> None:
    rng = np.random.default_rng(0)
    vectors = [10 * rng.standard_normal(64) for _ in range(100)]
    types = [np.dtype(np.float16)] * 100
    exact = sum(vector - vector.mean() for vector in vectors)
    carried = sum(v.astype(np.float64) for v in weights.center_in_turn(vectors, types))
    apart = sum((v - v.mean()).astype(np.float16).astype(np.float64) for v in vectors)
    last = np.spacing(np.float16(40))
    assert np.abs(carried - exact).max() <= last / 2
    assert np.abs(apart - exact).max() > last
