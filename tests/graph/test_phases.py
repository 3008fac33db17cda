"""Decoders in two files, merged: what passes through in a step, and by which name."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from onnx_tricks.errors import ModelError
from onnx_tricks.graph.phases import merge_phases


def _phases(past: str) -> tuple[ir.Model, ir.Model]:
    head = '<ir_version: 8, opset_import: ["": 17]>'
    prompt = ir.from_onnx_text(
        f"{head} prompt (float[b, s] states) => (float[b, s] logits, float[b, s] present_cross_0) "
        "{ present_cross_0 = Neg(states) logits = Exp(present_cross_0) }"
    )
    step = ir.from_onnx_text(
        f"{head} step (float[b, s] {past}) => (float[b, s] logits) {{ logits = Exp({past}) }}"
    )
    return prompt, step


@pytest.mark.parametrize("past", ["past_cross_0", "past_key_values_cross_0"])
def test_a_cache_that_a_step_does_not_return_passes_through_it(past: str) -> None:
    merged = ir.to_proto(merge_phases(*_phases(past)))
    session = onnxruntime.InferenceSession(merged.SerializeToString())
    cache = np.ones((1, 2), np.float32)
    feeds = {"states": cache, past: 3 * cache, "use_cache_branch": np.array([True])}
    names = ["logits", "present_cross_0"]
    logits, present = session.run(names, feeds)
    np.testing.assert_array_equal(present, 3 * cache)
    np.testing.assert_allclose(logits, np.exp(3 * cache), rtol=1e-6)


def test_phases_of_different_decoders_are_refused() -> None:
    with pytest.raises(ModelError, match="neither returns nor takes"):
        merge_phases(*_phases("memory"))
