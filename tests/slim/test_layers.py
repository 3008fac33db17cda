"""Which files have layers to speak of."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.graph.sizes import measure
from onnx_tricks.rewrite import Skip
from onnx_tricks.slim.layers import find_layers
from tests.conftest import Export
from tests.verify.conftest import parse


def test_a_decoder_without_a_cache_is_told_once_how_to_get_one(export: Export) -> None:
    model = load_model(export("tiny-llama", "dynamo18") / "model.onnx").model
    annotate(model)
    (skip,) = find_layers(model)
    assert isinstance(skip, Skip)
    assert "-with-past" in skip.reason


@pytest.mark.parametrize("family", ["donut", "bart"])
def test_an_encoder_that_keeps_nothing_is_passed_over_in_silence(
    family: str, export: Export
) -> None:
    model = load_model(export(family) / "encoder_model.onnx").model
    annotate(model)
    assert not list(find_layers(model))


def test_series_of_the_past_are_no_cache() -> None:
    text = "g (float[b,s,3] past_values) => (float[b,s,3] y) { y = Relu(past_values) }"
    assert measure(ir.from_proto(parse(text))).cache_values_per_token is None
