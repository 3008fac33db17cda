"""What a step of a graph reads, on toy graphs and on real exports."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_tricks.graph.load import load_model
from onnx_tricks.inspect.from_config import read_config
from onnx_tricks.inspect.from_onnx import (
    find_decode_step,
    graph_dimensions,
    graph_traffic,
    has_tied_head,
    item_bytes,
)
from onnx_tricks.models import demo_path
from tests import toys

D, F, V = toys.D, toys.F, toys.V


def toy(body: str, **options) -> ir.Model:
    return ir.from_proto(toys.model(body, **options))


def test_rows_of_a_table_are_looked_up_and_matrices_are_read_whole() -> None:
    model = toy("x = Gather(table, ids) y = MatMul(x, w)", inputs="ids[b,s]")
    traffic = graph_traffic(model)
    assert (traffic.weights.values, traffic.rows.values) == (D * F, D)
    assert traffic.weights.bytes == 4 * D * F
    assert not has_tied_head(model)


def test_a_tied_table_counts_as_both() -> None:
    body = "x = Gather(table, ids) t = Transpose<perm=[1, 0]>(table) y = MatMul(x, t)"
    model = toy(body, inputs="ids[b,s]", kind="float16")
    traffic = graph_traffic(model)
    assert (traffic.weights.values, traffic.rows.values) == (V * D, D)
    assert traffic.weights.bytes == 2 * V * D
    assert has_tied_head(model)


def test_a_table_that_is_stored_transposed_is_looked_up_all_the_same() -> None:
    table = toys.weights()["table"].T.astype(np.float32)
    body = "t = Transpose<perm=[1, 0]>(turned) x = Gather(t, ids) y = MatMul(x, w)"
    traffic = graph_traffic(toy(body, inputs="ids[b,s]", extra={"turned": table}))
    assert (traffic.weights.values, traffic.rows.values) == (D * F, D)


def test_a_weight_that_two_layers_share_is_read_once() -> None:
    traffic = graph_traffic(toy("a = MatMul(x, w_square) y = MatMul(a, w_square)"))
    assert traffic.weights.values == D * D


def test_of_a_merged_decoder_the_step_counts(export) -> None:
    folder = export("t5")
    models = {path: load_model(path).model for path in sorted(folder.glob("*.onnx"))}
    step = find_decode_step(models)
    assert step.name == "decoder_with_past_model.onnx"
    apart = graph_traffic(models[step])
    merged = graph_traffic(models[folder / "decoder_model_merged.onnx"])
    prompt = graph_traffic(models[folder / "decoder_model.onnx"])
    assert abs(merged.weights.values - apart.weights.values) < 0.005 * apart.weights.values
    assert merged.caches == apart.caches
    assert prompt.weights.values > apart.weights.values  # it makes the keys of cross-attention
    assert {one.kind for one in apart.caches} == {"self", "cross"}


@pytest.mark.parametrize(
    ("recipe", "exporter", "dtype"),
    [("t5", "optimum", "fp32"), ("llama", "dynamo18-cache", "fp32"), ("falcon", "optimum", "fp16")],
)
def test_graph_and_config_agree(export, recipe: str, exporter: str, dtype: str) -> None:
    folder = export(recipe, exporter, dtype)
    models = {path: load_model(path).model for path in sorted(folder.glob("*.onnx"))}
    model = models[find_decode_step(models)]
    stated, read = read_config(folder / "config.json"), graph_traffic(model)
    # Biases, gains and rotary tables are what the dimensions leave out.
    assert 0 <= read.weights.values - stated.traffic.weights.values < 0.03 * read.weights.values
    for kind in ("self", "cross"):
        expected = stated.traffic.cache_per_token(kind).values
        assert read.cache_per_token(kind).values == expected
    shown = graph_dimensions(model)
    assert shown is not None
    assert (shown.width, shown.layers, shown.vocabulary) == (48, 2, 97)
    assert shown.attention.key_width == stated.attention.key_width
    assert item_bytes(model) == ((2, 2) if dtype == "fp16" else (4, 4))


def test_the_demo_reads_what_its_dimensions_say() -> None:
    stated = read_config(demo_path() / "config.json").traffic
    read = graph_traffic(load_model(demo_path() / "model.onnx").model)
    assert 0 < read.weights.values - stated.weights.values < 2000  # 9 gains, rotary frequencies
    assert (read.rows, read.caches) == (stated.rows, stated.caches)


def test_a_model_without_cache_has_none(tmp_path: Path) -> None:
    path = tmp_path / "toy.onnx"
    onnx.save(toys.model("y = MatMul(x, w)"), path)
    model = load_model(path).model
    assert graph_traffic(model).caches == ()
    assert graph_dimensions(model) is None
