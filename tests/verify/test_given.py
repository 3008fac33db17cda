"""Inputs that a user gives: they count by themselves, and none is taken that does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import onnx_tricks
from onnx_tricks.errors import UsageError
from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.passes import SlimAttention
from onnx_tricks.runtime.sessions import Session
from onnx_tricks.verify import Sample, verify
from onnx_tricks.verify.plans import plans
from onnx_tricks.verify.replay import replay
from tests.conftest import Export
from tests.verify.conftest import change, parse, rescaled, tensors

Arrays = dict[str, np.ndarray]
VOCABULARY, LAYERS = 256, 4  # of the demo model

# Series of which one is twice as long as the other: no name and no number tells that.
TWICE = """
g (float[b,n,16] p, float[b,m,16] q) => (float[b,n,8] y) <float[16] gain, float[16,8] w>
{ z = Concat<axis = 1>(q, q) s = Add(p, z) h = LayerNormalization(s, gain) y = MatMul(h, w) }"""


def prompt(rows: int = 2, tokens: int = 9, padding: int = 0) -> Arrays:
    """A batch for the demo model, the last row padded on the left."""
    ids = np.random.default_rng(3).integers(0, VOCABULARY, (rows, tokens))
    mask = np.ones_like(ids)
    mask[-1, :padding] = 0
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def step(original: Path, cached: int = 5) -> Arrays:
    """One token after a prompt, with the caches that the demo model makes of that."""
    before = prompt(tokens=cached)
    empty = read_interface(load_model(original).model).empty_caches(2)
    outputs = Session(original).run({**before, **empty})
    past = {
        n.replace("present", "past_key_values"): a for n, a in outputs.items() if "present" in n
    }
    return {
        "input_ids": np.array([[7], [8]]),
        "attention_mask": np.ones((2, cached + 1), np.int64),
        "position_ids": np.full((2, 1), cached),
        **past,
    }


def series(rows: int = 3, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    return {"p": random.standard_normal((rows, 6, 16)), "q": random.standard_normal((rows, 3, 16))}


def unused_token(original: Path) -> int:
    """A token that none of the cases that are made holds."""
    cases = next(plans(read_interface(load_model(original).model), lambda _name, _batch: None))
    used = {int(n) for case in cases for one in case.steps for n in one.feeds["input_ids"].flat}
    return min(set(range(VOCABULARY)) - used)


def spoil_token(model: onnx.ModelProto, token: int) -> None:
    """Change what one token is to a model, by one per cent."""
    (table,) = (one for one in tensors(model) if tuple(one.dims) == (VOCABULARY, 192))

    def edit(array: np.ndarray) -> np.ndarray:
        array[token] *= 1.01
        return array

    change(table, edit)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(arrays: Arrays, name: str = "given.npz") -> Path:
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return write


@pytest.fixture
def twice(tmp_path: Path) -> Path:
    onnx.save(parse(TWICE), tmp_path / "twice.onnx")
    return tmp_path / "twice.onnx"


def test_given_inputs_come_on_top_and_are_judged_by_themselves(demo, save) -> None:
    original, file = demo["fp32"], save(prompt())
    result = verify(original, original, inputs=[file, prompt(rows=1)])
    assert (result.status, result.cases, result.given) == ("passed", 5, 2)
    phases = {finding.phase for finding in result.findings}
    assert phases == {"prompt", "step", f"prompt of {file}", "prompt of inputs[1]"}
    assert result.to_dict() == verify(original, original, inputs=[file, prompt(rows=1)]).to_dict()


@pytest.mark.parametrize("name", ["path", "text", "mapping"])
def test_one_run_need_not_be_in_a_list(twice, save, name) -> None:
    file = save(series())
    given: Any = {"path": file, "text": str(file), "mapping": series()}[name]
    assert verify(str(twice), twice, inputs=given).given == 1


def test_a_real_export_is_optimised_on_given_inputs_and_a_second_run_finds_nothing(
    export: Export, tmp_path: Path
) -> None:
    source = export("bert") / "model.onnx"
    random = np.random.default_rng(0)
    given = {
        "input_ids": random.integers(0, 99, (2, 12)),
        "attention_mask": np.array([[1] * 12, [1] * 7 + [0] * 5]),
        "token_type_ids": np.zeros((2, 12), np.int32),
    }
    reports = []
    for before, after in (source, "once.onnx"), (tmp_path / "once.onnx", "twice.onnx"):
        report = onnx_tricks.optimize(before, tmp_path / after, inputs=given).report
        assert (report.verification.status, report.verification.given) == ("passed", 1)
        reports.append(report)
    assert reports[0].passes[0].applied > 0
    assert reports[1].passes[0].applied == 0


def test_what_only_given_inputs_show_is_caught(demo, edited) -> None:
    original, token = demo["fp32"], unused_token(demo["fp32"])
    wrong = edited(original, lambda model: spoil_token(model, token))
    assert verify(original, wrong).status == "passed"
    assert verify(original, wrong, inputs=prompt()).status == "passed"
    given = prompt()
    given["input_ids"][0, 4] = token
    result = verify(original, wrong, inputs=[prompt(), given])
    assert result.status == "failed"
    assert "of inputs[1])" in result.message


def test_padding_of_given_inputs_does_not_count(demo, edited) -> None:
    original, token = demo["fp32"], unused_token(demo["fp32"])
    wrong = edited(original, lambda model: spoil_token(model, token))
    given = prompt(padding=4)
    given["input_ids"][1, :4] = token
    assert verify(original, wrong, inputs=given).status == "passed"
    given["attention_mask"][1, 3] = 1
    assert verify(original, wrong, inputs=given).status == "failed"


def test_a_model_whose_inputs_cannot_be_guessed_is_verified_on_given_ones(twice, edited) -> None:
    result = verify(twice, twice)
    assert result.status == "skipped"
    assert result.message.endswith("; give inputs with --inputs FILE.npz")
    result = verify(twice, twice, inputs=series())
    assert (result.status, result.reference, result.cases) == ("passed", "float64", 1)
    assert "on the given inputs alone" in result.message
    wrong = edited(twice, lambda model: change(model.graph.initializer[1], lambda w: w * 1.01))
    assert verify(twice, wrong, inputs=series()).status == "failed"

    optimized, report = onnx_tricks.optimize(onnx.load(twice), inputs=series())
    assert isinstance(optimized, onnx.ModelProto)
    assert report.passes[0].applied == 1
    assert (report.verification.status, report.verification.cases) == ("passed", 1)


def test_few_numbers_of_given_inputs_are_judged_over_other_roundings_of_them(tmp_path) -> None:
    """The original happens to round these numbers well; no model is to fail for that."""
    body = """
    g (float[b,n] p, float[b,m] q) => (float[b,1] y) <float[16,1] w, float[16] c>
    { z = Concat<axis = 1>(q, q) s = Add(p, z) x = Mul(s, c) y = MatMul(x, w) }"""
    original, candidate, wrong = rescaled(body, tmp_path)
    for seed in (3, 9):
        random = np.random.default_rng(seed)
        given = {"p": random.standard_normal((1, 16)), "q": random.standard_normal((1, 8))}
        result = verify(original, candidate, inputs=given)
        assert (result.status, result.cases, result.given) == ("passed", 32, 1)
        assert verify(original, wrong, inputs=given).status == "failed"


def test_the_same_inputs_with_other_roundings_are_as_good_as_the_same(demo) -> None:
    original = demo["fp32"]
    interface = read_interface(load_model(original).model)
    arrays = prompt(tokens=12, padding=5) | {
        name: np.ones_like(array, np.float32) for name, array in interface.empty_caches(2).items()
    }
    arrays["past_key_values.0.key"] = np.ones((2, 6, 3, 32), np.float32)
    case = replay(Sample("given", arrays), interface)
    first, second = (case.again(seed).steps[0].feeds["input_ids"] for seed in (1, 2))
    assert (first != second).any()
    ids = arrays["input_ids"]
    for one in first, second:
        assert (one[1, :5] == ids[1, :5]).all()
        assert (np.sort(one[:, 5:]) == np.sort(ids[:, 5:]))[1].all()
        assert (np.sort(one[0]) == np.sort(ids[0])).all()
    cache = case.again(1).caches["past_key_values.0.key"]
    assert 0 < np.abs(cache - 1).max() < 1e-6


def test_given_caches_are_a_step_of_decoding(demo, edited) -> None:
    original = demo["fp32"]

    def edit(model: onnx.ModelProto) -> None:
        """Let a decoder clip what no key of a text that it knows is as large as."""
        name = "past_key_values.1.key"
        node = next(node for node in model.graph.node if name in node.input)
        node.input[:] = ["clipped" if n == name else n for n in node.input]
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(100, np.float32), "most")
        )
        model.graph.node.insert(0, helper.make_node("Min", [name, "most"], ["clipped"]))

    given = step(original)
    given["past_key_values.1.key"][0, 0, 2] = 101
    result = verify(original, original, inputs=given)
    assert (result.status, result.cases) == ("passed", 4)
    result = verify(original, edited(original, edit), inputs=given)
    assert result.status == "failed"
    assert "of inputs[0])" in result.message


def test_caches_of_an_encoder_have_to_be_given_and_those_of_a_decoder_need_not(tmp_path) -> None:
    text = """
    g (int64[b,s] input_ids, float[b,2,p,4] past_key_self, float[b,2,e,4] past_key_cross)
      => (float[b,s,4] y, float[b,2,t,4] present_key_self) <float[9,4] w>
    { y = Gather(w, input_ids) present_key_self = Identity(past_key_self) }"""
    model = tmp_path / "decoder.onnx"
    onnx.save(parse(text), model)
    ids, cross = np.array([[1, 2, 3]]), np.ones((1, 2, 6, 4))
    given = {"input_ids": ids, "past_key_cross": cross}
    assert verify(model, model, inputs=given).given == 1
    with pytest.raises(UsageError, match=r"lacks inputs: past_key_cross \(float \[b, 2, e, 4\]\)"):
        verify(model, model, inputs={"input_ids": ids})


def test_numbers_of_other_types_are_taken_where_nothing_is_lost(demo) -> None:
    given = {
        "input_ids": prompt()["input_ids"].astype(np.uint8),
        "attention_mask": np.ones((2, 9)),
        "position_ids": prompt()["position_ids"].tolist(),
    }
    assert verify(demo["fp32"], demo["fp32"], inputs=given).status == "passed"


def test_given_prompts_judge_a_decoder_with_other_caches(tmp_path, demo) -> None:
    original, slim = demo["fp32"], tmp_path / "slim.onnx"
    onnx_tricks.optimize(original, slim, passes=[SlimAttention()], verify=False)
    result = verify(original, slim, inputs=prompt())
    assert (result.status, result.given) == ("passed", 1)
    with pytest.raises(UsageError, match=r"inputs\[0\] holds filled caches.*give a prompt without"):
        verify(original, slim, inputs=step(original))


def test_files_of_a_folder_go_to_the_models_that_they_fit(export: Export, tmp_path, save) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("encoder_model.onnx", "decoder_model_merged.onnx"):
        shutil.copy(export("t5") / name, source)
    random = np.random.default_rng(0)
    ids, mask = random.integers(0, 99, (1, 11)), np.ones((1, 11), np.int64)
    encoder = Session(source / "encoder_model.onnx")
    states = encoder.run({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    text = save({"input_ids": ids, "attention_mask": mask}, "text.npz")
    answer = {
        "input_ids": ids[:, :4],
        "encoder_hidden_states": states,
        "encoder_attention_mask": mask,
    }
    given = [text, save(answer, "answer.npz")]
    report = onnx_tricks.optimize(source, output, inputs=given).report
    assert (report.verification.status, report.verification.given) == ("passed", 2)
    shutil.rmtree(output)
    del answer["encoder_attention_mask"]
    message = (
        r"answer\.npz lacks inputs: encoder_attention_mask \(int64 .* of .*decoder_model_merged"
    )
    with pytest.raises(UsageError, match=message):
        onnx_tricks.optimize(source, output, inputs=[text, save(answer, "answer.npz")])
    assert not output.exists()


def test_a_step_goes_to_the_decoder_of_steps_alone(tmp_path: Path) -> None:
    body = "{ s = Add(x, p) y = Identity(s) }"
    files = {
        "decoder_model.onnx": "g (float[b,4] x) => (float[b,4] y) { y = Relu(x) }",
        "decoder_with_past_model.onnx": f"g (float[b,4] x, float[b,4] p) => (float[b,4] y) {body}",
    }
    for name, text in files.items():
        onnx.save(parse(text), tmp_path / name)
    x = np.ones((1, 4))
    result = verify(tmp_path, tmp_path, inputs=[{"x": x}, {"x": x, "p": x}])
    assert (result.status, result.given, result.cases) == ("passed", 2, 4)


def test_a_model_too_large_to_run_whole_says_that_given_inputs_were_not_used(
    demo, tmp_path
) -> None:
    original, result = demo["fp32"], tmp_path / "out.onnx"
    _, report = onnx_tricks.optimize(original, result, verify=False)
    assert report.verification.given == 0
    model = load_model(original).model
    sites = [
        one for one in onnx_tricks.FoldNorm().sites(model) if isinstance(one, onnx_tricks.Site)
    ]
    found = verify(original, result, sites=sites, memory_limit=1 << 20, inputs=prompt())
    assert (found.status, found.reference, found.given) == ("passed", "sites", 0)
    assert "not on the given inputs" in found.message


def without(name: str) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.__delitem__(name)


def put(name: str, array: object) -> Callable[[Arrays], None]:
    return lambda arrays: arrays.update({name: np.asarray(array)})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("attention_mask"), r"lacks inputs: attention_mask \(int64 \[batch_size, past"),
        (put("inputs_id", [[1]]), r"holds inputs_id, which .*fp16\.onnx does not take"),
        (put("input_ids", [1, 2]), r"input_ids is int64 \[2\], declared .*: the shapes differ"),
        (put("past_key_values.0.key", np.ones((2, 5, 3, 32))), r"lacks .*past_key_values.0.value"),
        (put("input_ids", np.ones((2, 0), int)), "there are no numbers in it"),
        (put("input_ids", [[0.5] * 9] * 2), "18 numbers are not of that type"),
        (put("input_ids", [["a"] * 9] * 2), "only arrays of numbers"),
        (put("input_ids", [[VOCABULARY] * 9] * 2), "does not run on these inputs: .*out of"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(demo, tmp_path, save, edit, message) -> None:
    arrays = prompt()
    edit(arrays)
    with pytest.raises(UsageError, match=rf"given\.npz.*{message}"):
        onnx_tricks.optimize(demo["fp16"], tmp_path / "out.onnx", inputs=[save(arrays)])
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "computes NaN"), (1e6, "320 numbers are not of that type")],
)
def test_caches_that_hold_no_numbers_of_use_are_refused(demo, value, message) -> None:
    original = demo["fp16"]
    arrays = step(original)
    arrays["past_key_values.3.key"] = arrays["past_key_values.3.key"].astype(np.float64)
    arrays["past_key_values.3.key"][0, 0, :, :] = value
    arrays["past_key_values.3.key"][1, 0, :, :] = value
    with pytest.raises(UsageError, match=message):
        verify(original, original, inputs=arrays)


def test_a_cache_of_another_size_is_refused(demo) -> None:
    arrays = step(demo["fp32"])
    arrays["past_key_values.0.key"] = arrays["past_key_values.0.key"][:, :5]
    message = (
        r"past_key_values\.0\.key is float32 \[2, 5, 5, 32\], declared is float \[batch_size, 6"
    )
    with pytest.raises(UsageError, match=message):
        verify(demo["fp32"], demo["fp32"], inputs=arrays)


@pytest.mark.parametrize("kind", ["none", "folder", "text", "one array", "objects", "cut off"])
def test_files_that_hold_no_arrays_by_name_are_refused(twice, tmp_path, save, kind) -> None:
    file = tmp_path / "file.npz"
    if kind == "folder":
        file.mkdir()
    elif kind == "text":
        file.write_text("p, q")
    elif kind == "one array":
        with file.open("wb") as opened:
            np.save(opened, np.ones(3))
    elif kind == "objects":
        save({"p": np.array([None])}, "file.npz")
    elif kind == "cut off":
        file.write_bytes(save(series()).read_bytes()[:200])
    with pytest.raises(UsageError, match=r"file\.npz cannot be read as arrays by the names of"):
        verify(twice, twice, inputs=file)


def test_arguments_that_make_no_sense_are_refused(twice) -> None:
    with pytest.raises(UsageError, match=r"inputs\[0\]: give a \.npz file or a mapping.*not int"):
        verify(twice, twice, inputs=[3])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"inputs\[0\] cannot be read"):
        verify(twice, twice, inputs={"p": [[1], [2, 3]], "q": 1})
    with pytest.raises(UsageError, match="inputs are for the proof"):
        onnx_tricks.optimize(twice, verify=False, inputs=series())
