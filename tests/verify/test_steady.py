"""Random numbers are the same in all runs that are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_tricks.runtime.sessions import Session
from onnx_tricks.verify import verify
from onnx_tricks.verify.reference import raise_to_double
from onnx_tricks.verify.steady import steady
from tests.verify.conftest import parse

LIKE = "g (float[b,n] x) => (float[b,n] y) { y = %s (x) }"
ALONE = "g (float[b,n] x) => (float[b,n] y) { r = %s () y = Add (x, r) }"


def drawn(body: str, *, double: bool = False, shape: tuple[int, int] = (3, 4000)) -> np.ndarray:
    model = ir.from_proto(parse(body))
    assert steady(model)
    if double:
        raise_to_double(model)
    return Session(model, optimised=False).run({"x": np.zeros(shape)})["y"]


@pytest.mark.parametrize(
    ("body", "mean", "deviation"),
    [
        (LIKE % "RandomNormalLike <mean = 2.0, scale = 3.0>", 2, 3),
        (LIKE % "RandomUniformLike <low = -1.0, high = 2.0>", 0.5, 3 / 12**0.5),
        (ALONE % "RandomNormal <shape = [3, 4000]>", 0, 1),
        (ALONE % "RandomUniform <shape = [3, 4000]>", 0.5, 1 / 12**0.5),
    ],
)
def test_noise_has_the_mean_and_spread_of_what_it_replaces(body, mean, deviation) -> None:
    numbers = drawn(body)
    assert numbers.mean() == pytest.approx(mean, abs=0.05)
    assert numbers.std() == pytest.approx(deviation, rel=0.05)
    assert len(np.unique(numbers)) > 10_000


def test_noise_is_the_same_in_float64() -> None:
    body = LIKE % "RandomUniformLike"
    np.testing.assert_array_equal(drawn(body), drawn(body, double=True))


def test_a_model_without_random_numbers_is_left_alone() -> None:
    model = ir.from_proto(parse("g (float[b,n] x) => (float[b,n] y) { y = Neg (x) }"))
    assert not steady(model)
    assert [node.op_type for node in model.graph] == ["Neg"]


def test_a_model_that_draws_random_numbers_is_compared(tmp_path: Path) -> None:
    body = """
    g (float[b,16] x) => (float[b,8] y) <float[16,8] w>
    { r = RandomNormalLike (x) q = %s (x) s = Add (q, r) y = MatMul (s, w) }"""
    right, wrong = tmp_path / "right.onnx", tmp_path / "wrong.onnx"
    onnx.save(parse(body % "Identity"), right)
    onnx.save(parse(body % "Neg"), wrong)
    result = verify(right, right)
    assert (result.status, result.reference) == ("passed", "float64")
    assert result.error_before < 1e-6
    assert verify(right, wrong).status == "failed"
