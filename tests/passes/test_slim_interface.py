"""slim-attention on decoders whose inputs and outputs other tools have changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest
from onnxruntime.quantization import quantize_dynamic

from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.save import save_model
from onnx_tricks.models import demo_path
from onnx_tricks.optimizer import Optimized, optimize
from onnx_tricks.passes import SlimAttention
from tests.native.conftest import use
from tests.slim.interface import (
    cast_outside,
    converted,
    fixed,
    four_bits,
    named_alike,
    renamed,
    transposed,
    without_names,
)
from tests.slim.text import cache_type, errors

Export = Callable[..., Path]
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
DEMO = demo_path() / "model.onnx"


def _slim(source: Path, out: Path, **options: object) -> Optimized:
    done = optimize(source, out, passes=[SlimAttention(**options)])  # type: ignore[arg-type]
    assert done.report.verification.status == "passed"
    assert not done.report.passes[0].skipped
    return done


def _saved(model: ir.Model, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_model(model, path)
    return path


def _inputs(path: Path) -> dict[str | None, ir.Value]:
    return {value.name: value for value in load_model(path).model.graph.inputs}


@pytest.fixture(params=["body", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the operators by their functions, and by the native library."""
    use(request.param, monkeypatch)


NAMES = {
    "k_cache": ("{1}_cache_{0}", "{1}_cache_{0}_out"),
    "past_key_0": ("past_{1}_{0}", "present_{1}_{0}"),
    "numbers": ("onnx::Concat_1{0}{1}", "2{0}{1}"),
    "inputs alone": ("past_key_values.{0}.{1}", "cat_{1}_{0}"),
}


@pytest.mark.parametrize(
    ("exporter", "spelled"),
    [
        ("optimum", "k_cache"),
        ("optimum", "numbers"),
        ("dynamo23-cache", "past_key_0"),
        ("dynamo23-cache", "inputs alone"),
    ],
)
def test_caches_of_any_name_become_states_of_the_usual_names(
    exporter: str, spelled: str, export: Export, tmp_path: Path
) -> None:
    odd = renamed(export("gpt_neox", exporter) / "model.onnx", *NAMES[spelled])
    source = _saved(odd, tmp_path / "odd.onnx")
    _slim(source, tmp_path / "slim.onnx")
    model = load_model(tmp_path / "slim.onnx").model
    for layer in ("0", "1"):
        assert f"past_key_values.{layer}.key" in {one.name for one in model.graph.inputs}
        assert f"present.{layer}.key" in {one.name for one in model.graph.outputs}
    assert len({one.name for one in model.graph.inputs}) == len(model.graph.inputs)


def test_states_are_called_like_no_cache_of_a_layer_that_is_left(
    export: Export, tmp_path: Path
) -> None:
    model = renamed(export("gpt_neox") / "model.onnx", "kv_{0}_{1}", "kv_{0}_{1}_out")
    first = next(node for node in model.graph if node.op_type == "Softmax")
    odd = ir.node("Sigmoid", [first.outputs[0]])
    odd.outputs[0].name = "odd"
    first.outputs[0].replace_all_uses_with(odd.outputs[0])
    odd.replace_input_with(0, first.outputs[0])
    model.graph.insert_after(first, odd)
    for value in model.graph.inputs:  # as the second layer's states would be called
        value.name = (value.name or "").replace("kv_0_", "past_key_values.0.")
    source = _saved(model, tmp_path / "odd.onnx")
    done = optimize(source, tmp_path / "slim.onnx", passes=[SlimAttention()])
    assert (done.report.passes[0].applied, done.report.verification.status) == (1, "passed")
    assert {"past_key_values.0.key", "past_key_values.1.key"} <= _inputs(
        tmp_path / "slim.onnx"
    ).keys()


@pytest.mark.parametrize("names", [("past_{1}_{0}", "present_{1}_{0}"), ("kv_{0}_{1}", "{1}_{0}")])
def test_a_decoder_whose_caller_makes_the_keys_of_an_encoder_is_slimmed_beside_them(
    names: tuple[str, str], export: Export, tmp_path: Path
) -> None:
    step = export("bart") / "decoder_with_past_model.onnx"
    source = _saved(renamed(step, *names), tmp_path / "odd.onnx")
    done = optimize(source, tmp_path / "slim.onnx", passes=[SlimAttention()])
    assert done.report.verification.status == "passed"
    assert (done.report.passes[0].applied, len(done.report.passes[0].skipped)) == (2, 2)


def test_one_phase_of_a_decoder_is_slimmed_beside_the_other(export: Export, tmp_path: Path) -> None:
    """The file for prompts would fill caches that the result no longer has."""
    step = export("bart") / "decoder_with_past_model.onnx"
    done = optimize(step, tmp_path / "slim.onnx", passes=[SlimAttention()])
    assert done.report.verification.status == "passed"
    assert done.report.passes[0].applied == 2


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("cache", "dtype"), [("auto", HALF), ("fp32", FLOAT)])
@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_half_precision_behind_float32_caches_is_slimmed(
    family: str, cache: str, dtype: ir.DataType, export: Export, tmp_path: Path
) -> None:
    source = converted(export(family) / "model.onnx", tmp_path / "half.onnx")
    assert cache_type(source) == {FLOAT}
    done = _slim(source, tmp_path / "slim.onnx", cache_dtype=cache)
    assert done.report.passes[0].applied == 2
    assert cache_type(tmp_path / "slim.onnx") == {dtype}


def test_angles_that_half_precision_would_round_are_computed_in_float32(tmp_path: Path) -> None:
    source = converted(DEMO, tmp_path / "half.onnx")
    passes = [SlimAttention(tolerance=3.0)]
    report = optimize(source, tmp_path / "slim.onnx", passes=passes, verify=False).report
    assert report.passes[0].applied == 4
    for finding in errors(source, tmp_path / "slim.onnx").values():
        assert finding.after <= 2 * finding.before, str(finding)


def test_states_of_an_encoder_keep_the_type_that_the_encoder_gives_them(
    export: Export, tmp_path: Path
) -> None:
    for name in ("encoder_model", "decoder_model", "decoder_with_past_model"):
        converted(export("bart") / f"{name}.onnx", tmp_path / "half" / f"{name}.onnx")
    done = _slim(tmp_path / "half", tmp_path / "slim")
    assert done.report.passes[0].applied == 4
    assert cache_type(tmp_path / "slim" / "decoder_model.onnx") == {HALF}
    states = _inputs(tmp_path / "slim" / "decoder_model.onnx")["encoder_hidden_states"]
    assert states.dtype == FLOAT


def test_casts_around_the_branches_of_a_merged_decoder_go_with_its_caches(
    export: Export, tmp_path: Path
) -> None:
    merged = export("bart", "optimum", "fp16") / "decoder_model_merged.onnx"
    source = _saved(cast_outside(merged), tmp_path / "merged.onnx")
    assert cache_type(source) == {FLOAT}
    done = _slim(source, tmp_path / "slim.onnx")
    assert done.report.passes[0].applied == 4
    assert cache_type(tmp_path / "slim.onnx") == {HALF}


@pytest.mark.parametrize("change", [without_names, named_alike])
@pytest.mark.parametrize("family", ["opt", "gptj"])
def test_no_names_of_axes_are_needed(
    family: str, change: Callable[[Path], ir.Model], export: Export, tmp_path: Path
) -> None:
    source = _saved(change(export(family) / "model.onnx"), tmp_path / "unnamed.onnx")
    done = _slim(source, tmp_path / "slim.onnx")
    assert done.report.passes[0].applied == 2


def test_axes_of_states_have_names_where_those_of_caches_have_none(
    export: Export, tmp_path: Path
) -> None:
    source = _saved(without_names(export("opt") / "model.onnx"), tmp_path / "unnamed.onnx")
    passes = [SlimAttention()]
    optimize(source, tmp_path / "slim.onnx", passes=passes, verify=False)
    state = _inputs(tmp_path / "slim.onnx")["past_key_values.0.hidden"]
    assert state.shape == ["batch_size", "past_sequence_length", 48]
    outputs = load_model(tmp_path / "slim.onnx").model.graph.outputs
    assert outputs[1].shape == ["batch_size", "total_sequence_length", 48]


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("family", ["opt", "gpt_neox"])
def test_caches_may_be_arranged_and_typed_in_another_way(
    family: str, dtype: ir.DataType, export: Export, tmp_path: Path
) -> None:
    model = transposed(export(family) / "model.onnx", dtype)
    done = _slim(_saved(model, tmp_path / "moved.onnx"), tmp_path / "slim.onnx")
    assert done.report.passes[0].applied == 2


def test_a_cache_of_one_length_alone_is_refused_with_it(export: Export, tmp_path: Path) -> None:
    source = _saved(fixed(export("opt") / "model.onnx", 31), tmp_path / "fixed.onnx")
    done = optimize(source, None, passes=[SlimAttention()], verify=False)
    (slim,) = done.report.passes
    assert slim.applied == 0
    assert len(slim.skipped) == 2
    assert all("exactly 31 earlier tokens" in str(skip) for skip in slim.skipped)


@pytest.mark.parametrize("family", ["gpt_neox", "opt"])
def test_quantised_weights_are_named_as_what_stands_in_the_way(
    family: str, export: Export, tmp_path: Path
) -> None:
    source = export(family) / "model.onnx"
    four_bits(source, tmp_path / "four.onnx")
    quantize_dynamic(source, tmp_path / "eight.onnx")
    for name, operator in (("four", "MatMulNBits"), ("eight", "MatMulInteger")):
        passes = [SlimAttention()]
        report = optimize(tmp_path / f"{name}.onnx", None, passes=passes, verify=False).report
        reasons = [str(skip) for skip in report.passes[0].skipped]
        assert len(reasons) == 2
        assert all(f"the weights of {operator}" in one for one in reasons)
