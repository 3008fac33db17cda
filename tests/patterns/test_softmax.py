"""Attention weights between the softmax and the values."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnx_tricks.patterns.softmax import Weights, follow_weights


@pytest.mark.parametrize(
    ("looked_at", "safe"), [("w", True), ("h", True), ("f", True), ("scores", False)]
)
def test_rows_of_nan_become_zeros_whatever_type_they_are_looked_at_in(
    looked_at: str, safe: bool
) -> None:
    model = ir.from_onnx_text(
        f"""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[H, T, S] scores, float[H, S, K] values) => (float[H, T, K] y)
        <float zero = {{0}}>
        {{
            w = Softmax(scores)
            h = Cast <to = 10> (w)
            f = Cast <to = 1> (h)
            nan = IsNaN({looked_at})
            kept = Where(nan, zero, f)
            y = MatMul(kept, values)
        }}
        """
    )
    found = follow_weights(model.graph[0])
    assert isinstance(found, Weights) == safe
    if isinstance(found, Weights):
        assert found.safe
