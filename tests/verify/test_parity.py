"""The proof: what it lets pass, and what it must not."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import onnx_tricks
from onnx_tricks.errors import UsageError
from onnx_tricks.verify import Verification, verify
from tests import toys
from tests.verify.conftest import change, parse, rescaled

LN = "z = LayerNormalization(x, g, beta) y = MatMul(z, w)"
DEEP = (
    "z = LayerNormalization(x, g, beta) h = MatMul(z, w_square) r = Add(h, x) "
    "n = LayerNormalization(r, g1, beta) y = MatMul(n, w)"
)


def weight(model: onnx.ModelProto, shape: tuple[int, ...], index: int = 0) -> onnx.TensorProto:
    found = [t for t in model.graph.initializer if tuple(t.dims) == shape]
    return found[index]


def reader(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if name in node.input)


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., Path]:
    def write(body: str, name: str = "toy.onnx", **options: object) -> Path:
        onnx.save(toys.model(body, **options), tmp_path / name)
        return tmp_path / name

    return write


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_a_model_equals_itself(demo, kind) -> None:
    result = verify(demo[kind], demo[kind])
    assert (result.status, result.reference, result.cases) == ("passed", "float64", 3)
    assert result.error_before == result.error_after > 0
    assert {finding.phase for finding in result.findings} == {"prompt", "step"}


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *(("fp32", shape) for shape in [(256, 192), (192,), (192, 192), (192, 512), (512, 192)]),
        *(("fp16", shape) for shape in [(192, 192), (512, 192)]),
        ("bf16", (192, 512)),
    ],
)
def test_one_percent_in_one_weight_is_caught(demo, edited, kind, shape) -> None:
    wrong = edited(demo[kind], lambda model: change(weight(model, shape, -1), lambda w: w * 1.01))
    result = verify(demo[kind], wrong)
    assert result.status == "failed"
    assert result.error_after > 2 * result.error_before
    assert "allowed" in result.message


@pytest.mark.parametrize("shape", [(192,), (192, 192), (192, 512), (512, 192)])
def test_one_percent_in_one_large_element_is_caught_in_fp32(demo, edited, shape) -> None:
    def edit(w: np.ndarray) -> np.ndarray:
        w.flat[np.argmax(abs(w))] *= 1.01
        return w

    wrong = edited(demo["fp32"], lambda model: change(weight(model, shape), edit))
    assert verify(demo["fp32"], wrong).status == "failed"


def test_a_dropped_node_is_caught(demo, edited) -> None:
    def drop(model: onnx.ModelProto) -> None:
        name = "/model/layers.2/Add_1_output_0"
        node = next(node for node in model.graph.node if name in node.output)
        node.op_type = "Identity"
        del node.input[1:]

    assert verify(demo["fp32"], edited(demo["fp32"], drop)).status == "failed"


def test_nan_is_caught(demo, edited) -> None:
    def poison(w: np.ndarray) -> np.ndarray:
        w.flat[5] = np.nan
        return w

    wrong = edited(demo["fp32"], lambda model: change(weight(model, (192, 256)), poison))
    result = verify(demo["fp32"], wrong)
    assert result.status == "failed"
    assert "NaN" in result.message


def test_a_swapped_pair_of_outputs_is_caught(demo, edited) -> None:
    swap = {"present.0.key": "present.0.value", "present.0.value": "present.0.key"}

    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [swap.get(name, name) for name in names]

    result = verify(demo["fp32"], edited(demo["fp32"], edit))
    assert result.status == "failed"
    assert "present.0" in result.message


def test_a_model_that_ignores_the_padding_is_caught(demo, edited) -> None:
    def edit(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.input[:] = ["seen" if n == "attention_mask" else n for n in node.input]
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "least"))
        model.graph.node.insert(0, helper.make_node("Max", ["attention_mask", "least"], ["seen"]))

    result = verify(demo["fp32"], edited(demo["fp32"], edit))
    assert result.status == "failed"
    assert "left padding" in result.message


def test_a_model_that_decodes_wrongly_after_its_prompt_is_caught(demo, edited) -> None:
    def edit(model: onnx.ModelProto) -> None:
        node = reader(model, "past_key_values.1.key")
        node.input[:] = ["scaled" if n == "past_key_values.1.key" else n for n in node.input]
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(1.01, np.float32), "scale")
        )
        multiply = helper.make_node("Mul", ["past_key_values.1.key", "scale"], ["scaled"])
        model.graph.node.insert(0, multiply)

    result = verify(demo["fp32"], edited(demo["fp32"], edit))
    assert result.status == "failed"
    wrong = {finding.phase for finding in result.findings if not finding.passed}
    assert wrong == {"step"}


@pytest.mark.parametrize("kind", ["float", "float16", "bfloat16", "double"])
@pytest.mark.parametrize("body", [LN, DEEP])
def test_a_fold_passes_in_every_type(toy, tmp_path, kind, body) -> None:
    original, folded = toy(body, kind=kind), tmp_path / "folded.onnx"
    onnx_tricks.optimize(original, folded, verify=False)
    result = verify(original, folded)
    assert result.status == "passed", result.message
    assert result.error_after <= 2 * max(result.error_before, np.finfo(np.float32).eps)


def test_a_model_in_float64_is_its_own_reference() -> None:
    # Its own error is none: what rounding its weights once amounts to is the measure instead.
    proto = toys.model(
        "f = Cast<to=1>(one) d = Cast<to=11>(f) u = Mul(x, d) h = MatMul(u, w_square) "
        "z = LayerNormalization(h, g, beta) y = MatMul(z, w_packed)",
        kind="double",
    )
    _, report = onnx_tricks.optimize(proto, passes=["fold-norm"])
    assert report.passes[0].applied == 1
    result = report.verification
    assert (result.status, result.reference) == ("passed", "original")
    assert "float64 itself" in result.message
    assert 0 < result.error_before < 1e-13


def test_a_type_that_the_runtime_lacks_is_compared_in_float64_and_says_so(demo) -> None:
    result = verify(demo["bf16"], demo["bf16"])
    assert (result.status, result.reference) == ("passed", "float64")
    assert "in its own type" in result.message
    assert result.error_after == result.error_before == 0


def test_a_model_that_cannot_be_raised_is_compared_with_itself_and_says_so(toy, edited) -> None:
    original = toy(DEEP, kind="double")
    same = verify(original, original)
    assert (same.status, same.reference) == ("passed", "original")
    assert "no float64 reference" in same.message

    def scale(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "w":
                array = onnx.numpy_helper.to_array(tensor) * (1 + 1e-12)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array, "w"))

    assert verify(original, edited(original, scale)).status == "failed"


def test_a_loop_is_not_raised_but_still_verified(tmp_path) -> None:
    text = """
    g (float[b,4] x) => (float[b,4] y)
    <int64 n = {3}, bool on = {1}, float[4,4] w>
    {
      y = Loop (n, on, x) <body = step (int64 i, bool c, float[b,4] a) => (bool d, float[b,4] z) {
        d = Identity(c)
        m = MatMul(a, w)
        z = Tanh(m)
      }>
    }"""
    model = parse(text)
    path, wrong = tmp_path / "loop.onnx", tmp_path / "wrong.onnx"
    onnx.save(model, path)
    change(model.graph.initializer[2], lambda w: w * 1.01)
    onnx.save(model, wrong)
    assert (verify(path, path).status, verify(path, path).reference) == ("passed", "original")
    assert verify(path, wrong).status == "failed"


def test_integer_outputs_must_be_equal(toy) -> None:
    body = "y = MatMul(x, w) k = ArgMax<axis = -1>(y)"
    other = "y = MatMul(x, w) m = Neg(y) k = ArgMax<axis = -1>(m)"
    paths = [toy(b, f"{i}.onnx", outputs="y,k") for i, b in enumerate([body, other])]
    for path in paths:
        model = onnx.load(path)
        model.graph.output[1].type.tensor_type.elem_type = onnx.TensorProto.INT64
        onnx.save(model, path)
    assert verify(paths[0], paths[0]).status == "passed"
    result = verify(*paths)
    assert result.status == "failed"
    assert "elements" in result.message


def test_a_missing_output_is_caught(toy) -> None:
    both = toy("y = MatMul(x, w) v = MatMul(x, w2)", "both.onnx", outputs="y,v")
    result = verify(both, toy("y = MatMul(x, w)"))
    assert result.status == "failed"
    assert "v (prompt" in result.message
    assert "missing" in result.message


def test_a_candidate_that_does_not_load_fails(toy, edited) -> None:
    def break_it(model: onnx.ModelProto) -> None:
        model.graph.node[-1].op_type = "NoSuchOp"

    original = toy(LN)
    result = verify(original, edited(original, break_it))
    assert (result.status, result.error_after) == ("failed", None)
    assert "NoSuchOp" in result.message


def test_an_original_that_does_not_run_is_skipped_with_the_runtimes_message(toy, edited) -> None:
    def break_it(model: onnx.ModelProto) -> None:
        model.graph.node[-1].domain = "example.com"
        model.opset_import.append(helper.make_opsetid("example.com", 1))

    original = edited(toy(LN), break_it)
    result = verify(original, original)
    assert (result.status, result.reference) == ("skipped", "")
    assert "example.com" in result.message


def test_an_original_newer_than_the_runtime_is_skipped_with_the_runtimes_message(
    toy, edited
) -> None:
    def age(model: onnx.ModelProto) -> None:
        model.ir_version = 99

    path = edited(toy("y = MatMul(x, w)"), age)
    result = verify(path, path)
    assert result.status == "skipped"
    assert "ONNX Runtime refuses the original" in result.message
    assert "Unsupported model IR version: 99" in result.message


def test_folders_are_paired_by_name_and_the_worst_counts(toy, tmp_path, edited) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        shutil.copy(toy(LN), before / name)
    shutil.copytree(before, after)
    assert (verify(before, after).status, verify(before, after).cases) == ("passed", 2)

    wrong = edited(
        before / "decoder_model.onnx", lambda m: change(m.graph.initializer[0], np.negative)
    )
    shutil.copy(wrong, after / "decoder_model.onnx")
    assert verify(before, after).status == "failed"
    (after / "encoder_model.onnx").unlink()
    with pytest.raises(UsageError, match=r"lacks encoder_model\.onnx"):
        verify(before, after)


def test_without_a_runtime_the_error_says_what_to_install(demo, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"pip install onnx-tricks\[cpu\]"):
        verify(demo["fp32"], demo["fp32"])


def test_the_worst_of_several_results_is_failed_then_skipped_then_passed() -> None:
    results = [
        Verification(status, "", None, None, 1, status)
        for status in ("passed", "failed", "skipped", "passed")
    ]
    assert Verification.worst(results).status == "failed"
    assert Verification.worst(r for r in results if r.status != "failed").status == "skipped"
    assert Verification.worst(results).cases == 4


def test_a_report_holds_plain_numbers(demo) -> None:
    report = verify(demo["fp32"], demo["fp32"]).to_dict()
    assert report["status"] == "passed"
    assert math.isfinite(report["error_before"])


def test_few_numbers_are_judged_over_more_cases(tmp_path: Path) -> None:
    """The original happens to round two numbers well, here; no model is to fail for that."""
    body = """
    g (float[b,16] x) => (float[b,1] y) <float[16,1] w, float[16] c>
    { z = Mul (x, c) y = MatMul (z, w) }"""
    original, candidate, wrong = rescaled(body, tmp_path)
    result = verify(original, candidate)
    assert (result.status, result.cases) == ("passed", 32)
    assert verify(original, wrong).status == "failed"


@pytest.mark.parametrize(
    "family",
    [
        "patchtst",  # a series, of a length that only constants tell
        "layoutlmv3",  # boxes and images beside the tokens
        "vit_mae",  # random numbers
        "deberta-v2",  # buckets of positions inside an If
    ],
)
def test_inputs_are_found_for_models_that_ask_for_more_than_tokens(export, family) -> None:
    model = export(family) / "model.onnx"
    result = verify(model, model)
    assert (result.status, result.reference) == ("passed", "float64")
    assert 0 < result.error_before < 1e-5
