"""Whisper's slim decoder on a spoken sentence: within the rule, word by word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnx_tricks.graph.interface import Interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.optimizer import optimize
from onnx_tricks.passes import FoldNorm, SlimAttention
from onnx_tricks.verify.cases import Case
from tests.conftest import import_recipes
from tests.slim.text import errors

import_recipes()  # or skip where the exporters, which bring Transformers, are not installed

from tests.slim.speech import encoder_states, greedy, spoken_case  # noqa: E402

Export = Callable[..., Path]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_transcript_of_a_spoken_sentence_has_no_more_than_twice_the_error(
    dtype: str, export: Export, tmp_path: Path
) -> None:
    source = export("whisper-tiny.en", "optimum", dtype)
    optimize(source, tmp_path, passes=[FoldNorm(), SlimAttention()], verify=False)
    states = encoder_states(source, 2)
    merged = source / "decoder_model_merged.onnx"
    tokens = greedy(merged, states, 16)

    def case(interface: Interface) -> Case:
        return spoken_case(interface, states, tokens)

    found = errors(merged, tmp_path / "decoder_model.onnx", case)
    assert set(found) == {"prompt", "step"}
    for finding in found.values():
        assert finding.after <= 2 * finding.before, str(finding)


def test_the_states_of_the_encoder_can_be_kept_in_half_precision(
    export: Export, tmp_path: Path
) -> None:
    source = export("whisper-tiny.en")
    passes = [FoldNorm(), SlimAttention(cache_dtype="fp16", encoder_dtype="fp16")]
    optimize(source, tmp_path, passes=passes, verify=False)
    decoder = tmp_path / "decoder_model.onnx"
    inputs = {value.name: value.dtype for value in load_model(decoder).model.graph.inputs}
    assert inputs["encoder_hidden_states"] == ir.DataType.FLOAT16
    states = encoder_states(source, 1)
    tokens = greedy(source / "decoder_model_merged.onnx", states, 16)
    np.testing.assert_array_equal(greedy(decoder, states.astype(np.float16), 16), tokens)
