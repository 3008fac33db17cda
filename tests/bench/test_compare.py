"""Timing models side by side: which workloads, on what, and what is counted. Never how fast."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from onnx_tricks.bench import Comparison, Workload, compare, generation
from onnx_tricks.bench.files import find_files
from onnx_tricks.bench.results import spread
from onnx_tricks.bench.subject import open_subject
from onnx_tricks.bench.workload import Settings
from onnx_tricks.errors import ModelError, UsageError
from onnx_tricks.models import demo_path
from tests import toys
from tests.conftest import Export
from tests.runtime.conftest import Slim

DEMO_VALUES, DEMO_LAYERS = 4 * 2 * 192, 4  # of keys and values, for a token
TINY = {"batch": (2,), "cached": (16,), "prompt": (8,), "rounds": 2, "threads": 1}


def kinds(comparison: Comparison) -> list[tuple[str, int]]:
    return [(str(one.workload), one.workload.batch) for one in comparison.measurements]


def test_a_model_beside_itself_is_timed_in_pairs() -> None:
    asked = {**TINY, "batch": (1, 2), "cached": (24, 16)}
    found = compare("demo", "demo", **asked, memory=False)
    works = ("step at 16", "step at 24", "prompt of 8")
    assert kinds(found) == [(work, batch) for work in works for batch in (1, 2)]
    assert not found.refusals
    for one in found.measurements:
        assert len(one.times) == 2
        assert all(seconds > 0 for pair in one.times for seconds in pair)
        ratios = [reference / candidate for reference, candidate in one.times]
        assert min(ratios) <= one.speedup.low <= one.speedup.median <= one.speedup.high
        expected = one.workload.batch * one.workload.cached * DEMO_VALUES * 4
        assert one.reference.cache_bytes == one.candidate.cache_bytes == expected
        assert one.reference.caches == ("prompt" if one.workload.cached else "")
        assert one.reference.peak_bytes is None


def test_slim_caches_are_counted_as_they_are(slim: Slim) -> None:
    found = compare(*slim("demo"), **TINY, memory=False)
    step = found.measurements[0]
    keys_and_residual = DEMO_VALUES // 2 + DEMO_LAYERS * 32
    assert step.reference.cache_bytes == 2 * 16 * DEMO_VALUES * 4
    assert step.candidate.cache_bytes == 2 * 16 * keys_and_residual * 4
    assert step.candidate.caches == "prompt"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
def test_peak_memory_holds_the_caches_of_the_workload(slim: Slim) -> None:
    asked = {**TINY, "batch": (16,), "cached": (1024,), "prompt": ()}
    step = compare(*slim("demo"), **asked).measurements[0]
    model = (slim("demo")[0] / "model.onnx").stat().st_size
    for side in (step.reference, step.candidate):
        assert side.peak_bytes is not None
        # Those that a step reads and those that it writes.
        assert side.peak_bytes > model + 2 * side.cache_bytes
    assert step.candidate.peak_bytes < step.reference.peak_bytes


def test_an_encoder_and_its_decoder_run_in_one_file_two_or_slim(
    export: Export, slim: Slim, tmp_path: Path
) -> None:
    merged, small = slim("t5")
    for name in ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"):
        shutil.copy(merged / name, tmp_path)
    asked = {**TINY, "encoder": 40, "memory": False}
    for candidate in (tmp_path, small):
        found = compare(merged, candidate, **asked)
        assert kinds(found) == [("step at 16", 2), ("prompt of 8", 2)]
        step = found.measurements[0]
        # Two layers of four heads of 14: keys and values of 16 tokens and 40 positions.
        assert step.reference.cache_bytes == 2 * 2 * 2 * 4 * 14 * (16 + 40) * 4
        assert step.reference.caches == "prompt"
        if candidate == tmp_path:
            assert step.candidate.cache_bytes == step.reference.cache_bytes
            assert step.candidate.encoder_bytes == 0
        else:
            assert step.candidate.cache_bytes == 2 * 2 * 48 * 16 * 4
            assert step.candidate.encoder_bytes == 2 * 40 * 48 * 4


def test_a_file_whose_caches_another_fills_steps_behind_random_ones(export: Export) -> None:
    path = export("t5") / "decoder_with_past_model.onnx"
    found = compare(path, path, **TINY, encoder=40, memory=False)
    assert kinds(found) == [("step at 16", 2)]
    assert found.measurements[0].candidate.caches == "random"


def test_caches_are_random_where_a_prompt_would_take_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generation, "_MOST_SECONDS", 0.0)
    found = compare("demo", "demo", **TINY, memory=False)
    assert found.measurements[0].candidate.caches == "random"
    assert found.measurements[0].candidate.cache_bytes == 2 * 16 * DEMO_VALUES * 4


def test_steps_feed_each_other_and_begin_again_before_the_caches_are_others() -> None:
    subject = open_subject(find_files(demo_path()), Settings(threads=1))
    run = subject.prepare(Workload(2, 1, cached=16))
    lengths = []
    for _ in range(5):
        assert run() > 0
        lengths.append(run._current.length)
    assert lengths == [17, 18, 17, 18, 17]


def test_models_without_caches_run_forward(export: Export, tmp_path: Path) -> None:
    encoder = export("t5") / "encoder_model.onnx"
    found = compare(encoder, encoder, **TINY, memory=False)
    assert kinds(found) == [("prompt of 8", 2)]
    onnx.save(toys.model("y = MatMul(x, w)"), tmp_path / "toy.onnx")
    found = compare(tmp_path, tmp_path / "toy.onnx", **TINY, memory=False)
    assert kinds(found) == [("forward", 2)]
    assert found.measurements[0].candidate.cache_bytes == 0


def test_a_decoder_without_caches_is_compared_by_prompts_alone(export: Export) -> None:
    found = compare(export("tiny-llama"), export("tiny-llama", "dynamo18"), **TINY, memory=False)
    assert kinds(found) == [("prompt of 8", 2)]


def test_what_a_model_does_not_run_is_named_with_its_reason(export: Export) -> None:
    folder = export("whisper")  # of 64 positions
    found = compare(folder, folder, **{**TINY, "cached": (16, 200)}, memory=False)
    assert kinds(found) == [("step at 16", 2), ("prompt of 8", 2)]
    (refusal,) = found.refusals
    assert (str(refusal.workload), refusal.model) == ("step at 200", "reference")
    assert "Gather" in refusal.reason
    with pytest.raises(ModelError, match=r"nothing was timed: reference: .*Gather"):
        compare(folder, folder, **{**TINY, "cached": (200,), "prompt": ()})


def test_inputs_that_do_not_go_together_are_told(export: Export, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"demo takes tokens, but .* takes tokens, encoder_hidden"):
        compare("demo", export("t5"), **TINY)
    onnx.save(toys.model("y = MatMul(x, w)"), tmp_path / "toy.onnx")
    with pytest.raises(ModelError, match=r"takes x, but .* takes tokens"):
        compare(tmp_path, "demo", **TINY)
    narrow = onnx.load(tmp_path / "toy.onnx")
    narrow.graph.input[0].type.tensor_type.shape.dim[-1].dim_value //= 2
    onnx.save(narrow, tmp_path / "narrow.onnx")
    with pytest.raises(ModelError, match=r"x is \[.*\] in .*toy.onnx, but \[.*\] in .*narrow.onnx"):
        compare(tmp_path / "toy.onnx", tmp_path / "narrow.onnx", **TINY)


def test_a_model_that_the_runtime_refuses_is_named(tmp_path: Path) -> None:
    model = toys.model("y = MatMul(x, w)")
    onnx.save(model, tmp_path / "toy.onnx")
    model.graph.node[0].op_type = "Nonsense"
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(ModelError, match=r"odd.onnx: ONNX Runtime refuses the model: .*Nonsense"):
        compare(tmp_path / "toy.onnx", tmp_path / "odd.onnx", **TINY)


@pytest.mark.parametrize(
    "wrong", [{"batch": (1, 0)}, {"cached": (-1,)}, {"prompt": (0,)}, {"rounds": 0}, {"encoder": 0}]
)
def test_impossible_workloads_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} .* above 0"):
        compare("demo", "demo", **{**TINY, **wrong})


def test_the_spread_of_numbers_is_their_quartiles() -> None:
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert spread([7.0]).high == 7.0
