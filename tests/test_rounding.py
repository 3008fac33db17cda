"""Rounding to the types of caches and weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnx_tricks.rounding import round_jointly, storage_error


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_the_error_of_storage_is_that_of_numbers_of_any_magnitude(dtype) -> None:
    numbers = np.exp2(np.random.default_rng(0).uniform(-2, 2, 10**5))
    error = numbers.astype(dtype).astype(np.float64) / numbers - 1
    assert np.sqrt(np.mean(error**2)) == pytest.approx(storage_error(dtype), rel=0.02)


def test_joint_rounding_of_independent_inputs_is_rounding_to_the_nearest() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 5))
    found = round_jointly(weight, np.diag(np.arange(1.0, 9.0)), np.float16)
    np.testing.assert_array_equal(found, weight.astype(np.float16))


def test_a_weight_beyond_half_precision_is_rounded_to_infinity() -> None:
    found = round_jointly(np.full((2, 2), 1e6), np.eye(2) + 0.1, np.float16)
    assert not np.isfinite(found).any()
