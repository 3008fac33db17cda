"""Inverses of weights, and how well they are conditioned."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_tricks.inverse import condition


def test_the_condition_number_is_that_of_the_two_norm() -> None:
    w_k = np.random.default_rng(0).standard_normal((12, 20))
    assert condition(w_k) == pytest.approx(np.linalg.cond(w_k))
