"""Other bases: exact on both sides, and rounding felt as predicted."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_tricks.skipless.basis import Basis
from onnx_tricks.weights import change_rows

D, N = 24, 4000


def turned(sizes: np.ndarray, seed: int) -> np.ndarray:
    """A matrix [D, D] of these singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((D, D)))[0] for _ in range(2))
    return left * sizes @ right


@pytest.mark.parametrize("inverse", [False, True])
def test_what_is_written_and_read_in_another_basis_is_the_same(inverse: bool) -> None:
    rng = np.random.default_rng(0)
    basis = Basis(turned(np.linspace(1, 3, D), 1), inverse)
    rows, weight = rng.standard_normal((7, D)), rng.standard_normal((D, 5))
    shift = rng.standard_normal(D)
    np.testing.assert_allclose(basis.write(rows) @ basis.read(weight.T).T, rows @ weight)
    np.testing.assert_allclose(basis.write(rows, shift), basis.write(rows) + shift)


def test_a_layer_that_nothing_else_writes_beside_need_not_be_square() -> None:
    rng = np.random.default_rng(0)
    writer, reader = rng.standard_normal((30, D)), rng.standard_normal((D, 5))
    np.testing.assert_allclose(Basis(writer, True).read(reader.T).T, writer @ reader)


@pytest.mark.parametrize("spread", [0, 2, 4])
def test_the_error_of_rounding_is_about_what_is_predicted(spread: int) -> None:
    rng = np.random.default_rng(2)
    rows, reader = rng.standard_normal((N, D)), turned(np.ones(D), 3)
    basis = Basis(turned(np.logspace(0, -spread, D), 4))
    growth, error = basis.felt(rows, [reader], np.zeros(()))
    unit = 0.42 * 2.0**-11  # of rounding to float16, root mean square
    kept = half(rows @ half(basis.matrix))
    found = kept @ half(basis.read(reader.T).T)
    measured = np.linalg.norm(half(found) - rows @ reader) / np.linalg.norm(rows @ reader)
    assert measured == pytest.approx(error * unit, rel=0.35)
    original = half(half(rows) @ reader) - rows @ reader
    assert measured / (np.linalg.norm(original) / np.linalg.norm(rows @ reader)) == pytest.approx(
        growth, rel=0.35
    )


def half(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float64)


def test_a_singular_matrix_is_felt_without_end() -> None:
    singular = turned(np.ones(D), 5) * (np.arange(D) > 2)
    with np.errstate(all="ignore"):
        growth, _ = Basis(singular).felt(np.eye(D), [turned(np.ones(D), 6)], np.zeros(()))
    assert not np.isfinite(growth) or growth > 1e12


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_weight_is_changed_along_any_axis_and_rounded_once(axis: int) -> None:
    rng = np.random.default_rng(7)
    shape = [3, 4, 5]
    weight = rng.standard_normal(shape).astype(np.float32)
    matrix = rng.standard_normal((shape[axis], 6))
    found = change_rows(weight, axis, lambda rows: rows @ matrix)
    exact = np.moveaxis(np.moveaxis(weight.astype(np.float64), axis, -1) @ matrix, -1, axis)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, exact.astype(np.float32))
