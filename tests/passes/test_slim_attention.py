"""slim-attention on trained weights and on the families: smaller caches, the same function."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnx_tricks.errors import ParityError
from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.save import save_model
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.models import demo_path
from onnx_tricks.operators.signature import STATE_KEY
from onnx_tricks.optimizer import optimize
from onnx_tricks.passes import FoldNorm, PrecomputeFirstLayer, SlimAttention
from onnx_tricks.patterns.projection import Projection
from onnx_tricks.rewrite import Site, Skip
from onnx_tricks.runtime.sessions import Session
from onnx_tricks.slim.layers import Layer, find_layers
from tests.native.conftest import use
from tests.slim.text import cache_type, errors, long_case

Export = Callable[..., Path]
DEMO = demo_path() / "model.onnx"


def _slim(source: Path, out: Path, *, verify: bool = True, **options: object) -> dict[str, object]:
    done = optimize(
        source,
        out,
        passes=[FoldNorm(), SlimAttention(**options)],
        verify=verify,  # type: ignore[arg-type]
    )
    report = done.report
    assert not verify or report.verification.status == "passed"
    sizes = (report.before.cache_values_per_token, report.after.cache_values_per_token)
    slim = report.passes[1]
    return {"sizes": sizes, "applied": slim.applied, "skipped": slim.skipped, "rows": slim.details}


@pytest.fixture(params=["body", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the operators by their functions, and by the native library."""
    use(request.param, monkeypatch)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("cache", ["auto", "fp16", "bf16"])
def test_keys_and_a_residual_are_half_the_cache_of_the_demo_model_within_the_rule(
    cache: str, tmp_path: Path
) -> None:
    found = _slim(DEMO, tmp_path / "slim.onnx", verify=cache == "auto", cache_dtype=cache)
    before, after = found["sizes"]  # type: ignore[misc]
    assert before / after >= 1.9
    for finding in errors(DEMO, tmp_path / "slim.onnx").values():
        assert finding.after <= 2 * finding.before, str(finding)


@pytest.mark.parametrize(("dtype", "cache"), [("fp32", "auto"), ("fp32", "bf16"), ("fp16", "auto")])
def test_a_lower_tolerance_comes_within_a_fifth_of_the_originals_error(
    dtype: str, cache: str, export: Export, tmp_path: Path
) -> None:
    source = DEMO if dtype == "fp32" else export("tiny-llama", "optimum", dtype) / "model.onnx"
    options = {"tolerance": 4.0, "cache_dtype": cache}
    found = _slim(source, tmp_path / "slim.onnx", verify=False, **options)
    before, after = found["sizes"]  # type: ignore[misc]
    assert before / after >= 1.84
    for finding in errors(source, tmp_path / "slim.onnx").values():
        assert finding.after <= 1.2 * finding.before, str(finding)


def test_a_half_precision_model_keeps_its_error_with_half_the_cache(
    export: Export, tmp_path: Path
) -> None:
    source = export("tiny-llama", "optimum", "fp16") / "model.onnx"
    found = _slim(source, tmp_path / "slim.onnx")
    before, after = found["sizes"]  # type: ignore[misc]
    assert before / after >= 1.9
    assert cache_type(tmp_path / "slim.onnx") == {ir.DataType.FLOAT16}
    for finding in errors(source, tmp_path / "slim.onnx").values():
        assert finding.after <= 2 * finding.before, str(finding)


def test_large_keys_and_masked_rows_bring_no_nan_in_half_precision(
    export: Export, tmp_path: Path
) -> None:
    model = load_model(export("tiny-llama", "optimum", "fp16") / "model.onnx").model
    # One pair of channels near the end of the range; the scores stay what they are.
    for kind, factor in (("keys", 2.0**13), ("query", 2.0**-13)):
        heads = getattr(_layer(model).view, kind)
        for channel in (0, 16):
            _scale_column(heads.projection, heads.projection.columns[0, channel], factor)
    save_model(model, tmp_path / "large.onnx")
    keys = Session(tmp_path / "large.onnx")
    case = long_case(read_interface(load_model(tmp_path / "large.onnx").model))
    caches = {**case.caches, **case.steps[0].feeds}
    assert np.abs(keys.run(caches)["present.0.key"]).max() > 8192
    _slim(tmp_path / "large.onnx", tmp_path / "slim.onnx", verify=False)
    for finding in errors(tmp_path / "large.onnx", tmp_path / "slim.onnx").values():
        assert finding.after <= 2 * finding.before, str(finding)


def _scale_column(projection: Projection, column: int, factor: float) -> None:
    assert projection.linear is not None
    stored = projection.linear.weight.stored
    assert stored.const_value is not None
    array = stored.const_value.numpy().copy()
    array[:, column] *= factor
    stored.const_value = ir.Tensor(array, name=stored.name)


def test_the_plain_inverse_is_worse_by_orders_of_magnitude_and_verification_notices(
    tmp_path: Path,
) -> None:
    with pytest.raises(ParityError) as failure:
        optimize(DEMO, tmp_path / "slim.onnx", passes=[FoldNorm(), SlimAttention(rank=0)])
    report = failure.value.report
    assert report is not None
    worst = max(f.after / f.before for f in report.verification.findings)
    assert worst > 1000
    assert not (tmp_path / "slim.onnx").exists()


def test_states_follow_the_contract(tmp_path: Path) -> None:
    _slim(DEMO, tmp_path / "slim.onnx", verify=False)
    model = load_model(tmp_path / "slim.onnx").model
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = [value.name for value in model.graph.outputs]
    assert list(inputs)[3:7] == [
        "past_key_values.0.key",
        "past_key_values.0.residual",
        "past_key_values.1.key",
        "past_key_values.1.residual",
    ]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.residual"]
    assert not any("value" in name.rpartition(".")[2] for name in (*inputs, *outputs) if name)
    key, residual = inputs["past_key_values.0.key"], inputs["past_key_values.0.residual"]
    assert key.shape is not None
    assert residual.shape is not None
    assert [d for d in key.shape if isinstance(d, int)] == [6, 32]
    assert residual.shape[0] == key.shape[0]
    assert residual.shape[1] == key.shape[2]
    layout = json.loads(model.metadata_props[STATE_KEY])
    assert [layer["slots"] for layer in layout["layers"]] == [["key", "residual"]] * 4
    assert ("onnx_tricks", "SlimAttention", "") in model.functions


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    _slim(DEMO, tmp_path / "once.onnx", verify=False)
    found = _slim(tmp_path / "once.onnx", tmp_path / "twice.onnx", verify=False)
    assert found["applied"] == 0
    assert found["skipped"] == []
    assert (tmp_path / "once.onnx").read_bytes() == (tmp_path / "twice.onnx").read_bytes()


def test_positions_can_be_a_state_of_their_own(tmp_path: Path) -> None:
    _slim(DEMO, tmp_path / "slim.onnx", positions="state")
    names = {value.name for value in load_model(tmp_path / "slim.onnx").model.graph.inputs}
    assert "past_key_values.positions" in names


def test_it_stacks_with_folding_and_the_first_layer_table(tmp_path: Path) -> None:
    passes = [FoldNorm(), SlimAttention(), PrecomputeFirstLayer(max_growth=100)]
    report = optimize(DEMO, tmp_path / "all.onnx", passes=passes).report
    assert report.verification.status == "passed"
    assert [one.applied for one in report.passes] == [9, 4, 1]


def test_gpt2_caches_its_layer_inputs(export: Export, tmp_path: Path) -> None:
    found = _slim(export("mgm") / "model.onnx", tmp_path / "slim.onnx")
    assert found["sizes"] == (4096, 2048)
    assert {row["operator"] for row in found["rows"]} == {"SlimHiddenAttention"}  # type: ignore[attr-defined, index]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_whisper_keeps_one_decoder_and_no_cross_caches(
    dtype: str, export: Export, tmp_path: Path
) -> None:
    source = export("whisper-tiny.en", "optimum", dtype)
    found = _slim(source, tmp_path / "slim")
    assert sorted(path.name for path in (tmp_path / "slim").glob("*.onnx")) == [
        "decoder_model.onnx",
        "encoder_model.onnx",
    ]
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["model_type"] == "whisper"
    assert len(config["onnx_tricks"]["states"]["decoder_model.onnx"]["layers"]) == 8
    rows = found["rows"]
    assert isinstance(rows, list)
    crossing = [row for row in rows if row["operator"] == "SlimCrossAttention"]
    own = [row for row in rows if row["operator"] == "SlimHiddenAttention"]
    assert len(crossing) == len(own) == 4
    before = sum(1500 * row["cache_values_before"] for row in crossing)
    before += sum(448 * row["cache_values_before"] for row in own)
    after = sum(448 * row["cache_values_after"] for row in own)
    assert round(before / after, 1) == 8.7
    assert round(before / (after + 1500 * 384), 1) == 4.7


@pytest.mark.parametrize("exporter", ["dynamo18-cache", "dynamo23-cache"])
def test_torch_dynamo_exports_are_slimmed_too(
    exporter: str, export: Export, tmp_path: Path
) -> None:
    found = _slim(export("tiny-llama", exporter) / "model.onnx", tmp_path / "slim.onnx")
    assert found["applied"] == 4


@pytest.mark.parametrize(
    ("family", "factor"),
    [
        # Rotated keys: the whole head, a part of it, neighbours as pairs, packed with queries.
        *[(name, 1.8) for name in ("phi", "gpt_neox", "gptj", "phi3_heads")],
        *[("olmo_heads", 1.8), ("stablelm_heads", 1.8)],
        ("gemma_wide", 1.9),
        # Normalised before that: all heads together, each by itself, with gains of its own.
        *[("olmo2_heads", 1.7), ("qwen3_heads", 1.7), ("cohere_normed", 1.9), ("phi_normed", 1.9)],
        # Not every layer rotates its keys.
        ("smollm3_heads", 1.7),
        # No rotation: learned positions, ALiBi.
        *[(name, 2.0) for name in ("opt", "bloom", "mpt")],
        # Encoder and decoder: nothing is cached for the encoder.
        *[(name, 4.0) for name in ("bart", "marian", "pegasus", "m2m_100")],
        ("trocr", 4.0),
        ("t5_wide", 32.0),
        # Several codes a token, and states that the decoder projects and masks before its layers.
        ("musicgen", 4.0),
    ],
)
def test_families_with_a_key_head_for_every_head_are_slimmed(
    family: str, factor: float, export: Export, tmp_path: Path
) -> None:
    source = export(family)
    single = source / "model.onnx"
    alone = single.exists()
    found = _slim(single if alone else source, tmp_path / ("slim.onnx" if alone else "slim"))
    before, after = found["sizes"]  # type: ignore[misc]
    assert not found["skipped"]
    assert before / after >= factor


@pytest.mark.parametrize("family", ["llama", "mistral", "falcon", "smollm2-2"])
def test_grouped_queries_are_refused_with_their_dimensions(family: str, export: Export) -> None:
    model = load_model(export(family) / "model.onnx").model
    annotate(model)
    found = list(SlimAttention().sites(model))
    assert len(found) == 2
    assert all(
        isinstance(one, Skip) and "cannot determine an input of" in one.reason for one in found
    )


def test_layers_that_could_not_share_an_operator_are_told(export: Export) -> None:
    model = load_model(export("smollm3_heads") / "model.onnx").model
    annotate(model)
    skip, site = SlimAttention(mode="k", calibrate=False).sites(model)
    assert isinstance(skip, Skip)
    assert isinstance(site, Site)
    assert "in the rotation of its keys" in skip.reason
    assert site.count == 1


def test_layers_that_stay_are_told_beside_those_that_do_not(export: Export, tmp_path: Path) -> None:
    source = export("smollm3_heads") / "model.onnx"
    passes = [SlimAttention(mode="k", calibrate=False)]
    once, twice = tmp_path / "once.onnx", tmp_path / "twice.onnx"
    first = optimize(source, once, passes=passes, verify=False).report.passes[0]
    assert first.applied == 1
    assert len(first.skipped) == 1
    again = optimize(once, twice, passes=passes, verify=False).report.passes[0]
    assert again.applied == 0
    assert again.skipped == first.skipped
    assert once.read_bytes() == twice.read_bytes()


def test_keys_normalised_behind_their_rotation_are_slimmed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    families, exporters = (
        pytest.importorskip(f"onnx_tricks.models.{name}") for name in ("families", "export")
    )
    grouped = families.FAMILIES["hunyuan_v1_dense"]
    sizes = {**grouped.sizes, "num_key_value_heads": 4, "head_dim": 12}
    heads = dataclasses.replace(grouped, sizes=sizes)
    monkeypatch.setitem(families.FAMILIES, "hunyuan_heads", heads)
    exporters.export_dynamo(families.tiny("hunyuan_heads"), tmp_path, opset=18, cache=True)
    found = _slim(tmp_path / "model.onnx", tmp_path / "slim.onnx")
    assert found["applied"] == 2
    before, after = found["sizes"]  # type: ignore[misc]
    assert before / after >= 1.8


def test_normalised_keys_are_slimmed_in_half_precision(export: Export, tmp_path: Path) -> None:
    found = _slim(export("olmo2_heads", "optimum", "fp16") / "model.onnx", tmp_path / "slim.onnx")
    assert found["applied"] == 2


def _layer(model: ir.Model) -> Layer:
    annotate(model)
    return next(layer for layer in find_layers(model) if isinstance(layer, Layer))


def _change_keys(model: ir.Model, change: Callable[[np.ndarray], np.ndarray]) -> None:  # type: ignore[type-arg]
    """Change the key weights [in, out] of the first layer."""
    projection = _layer(model).view.keys.projection
    assert projection is not None
    stored = projection.linear.weight.stored
    assert stored.const_value is not None
    stored.const_value = ir.Tensor(change(stored.const_value.numpy().copy()), name=stored.name)


def _repeat_heads(weight: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return np.tile(weight[:, : weight.shape[1] // 2], 2)


def _forget_inputs(weight: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    weight[0] = weight[1]
    return weight


def test_repeated_key_heads_are_noticed() -> None:
    model = load_model(DEMO).model
    _change_keys(model, _repeat_heads)
    found = list(SlimAttention(calibrate=False).sites(model))
    skips = [one for one in found if isinstance(one, Skip)]
    assert [skip.node for skip in skips] == [_layer(model).label]
    assert "repeated key heads" in skips[0].reason


def test_what_deficient_keys_do_not_hold_goes_into_the_residual(tmp_path: Path) -> None:
    model = load_model(DEMO).model
    _change_keys(model, _forget_inputs)
    save_model(model, tmp_path / "deficient.onnx")
    found = _slim(tmp_path / "deficient.onnx", tmp_path / "slim.onnx")
    assert found["applied"] == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "x"}, "its keys are rotated, so its input cannot take their place"),
        ({"tolerance": 0.1}, "no residual smaller than the values themselves"),
    ],
)
def test_options_that_leave_nothing_to_do_are_answered(
    options: dict[str, object], reason: str
) -> None:
    model = load_model(DEMO).model
    annotate(model)
    found = list(SlimAttention(calibrate=False, **options).sites(model))  # type: ignore[arg-type]
    assert len(found) == 4
    assert all(isinstance(one, Skip) and reason in one.reason for one in found)


def test_off_finds_nothing() -> None:
    model = load_model(DEMO).model
    annotate(model)
    assert list(SlimAttention(mode="off").sites(model)) == []


def test_one_phase_alone_asks_for_the_folder(export: Export) -> None:
    folder = export("t5_wide")
    for file in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        model = load_model(folder / file).model
        annotate(model)
        found = list(SlimAttention().sites(model))
        assert found
        assert not any(isinstance(one, Site) for one in found if "decoder_model" in file)


def test_a_decoder_in_two_files_is_merged_on_the_way(export: Export, tmp_path: Path) -> None:
    source = tmp_path / "two"
    source.mkdir()
    for path in export("t5_wide").iterdir():
        if path.name != "decoder_model_merged.onnx":
            (source / path.name).symlink_to(path.resolve())
    found = _slim(source, tmp_path / "slim")
    assert found["applied"] == 4
    names = {path.name for path in (tmp_path / "slim").glob("*.onnx")}
    assert names == {"decoder_model.onnx", "encoder_model.onnx"}


def test_a_failed_proof_is_tried_again_with_less_room_for_error() -> None:
    stricter = SlimAttention(tolerance=5.0).stricter()
    assert stricter is not None
    assert stricter.tolerance < 5.0
    assert dataclasses.replace(stricter, rank=8).stricter() is None
