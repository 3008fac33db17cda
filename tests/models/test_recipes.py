"""The cache of exports, and the trained models in it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx
import pytest

from onnx_tricks.errors import UsageError
from tests.conftest import Export, import_recipes

recipes = import_recipes()

TRAINED = [
    ("smollm2-2", "optimum"),
    ("smollm2-2", "dynamo23"),
    ("whisper-tiny.en", "optimum"),
    ("mgm", "optimum"),
    ("mgm", "dynamo18"),
]


@pytest.fixture
def slow_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the exporters by one that takes a moment; returns where it wrote."""
    written: list[Path] = []

    def write(_name: str, _exporter: str, _dtype: str, out: Path) -> None:
        written.append(out)
        (out / "model.onnx").touch()
        time.sleep(0.2)

    monkeypatch.setenv("ONNX_TRICKS_CACHE", str(tmp_path))
    monkeypatch.setattr(recipes, "_export", write)
    return written


def test_callers_at_the_same_time_share_one_export(slow_export: list[Path]) -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(recipes.exported, ["bert"] * 3))
    assert len(set(folders)) == len(slow_export) == 1
    assert (folders[0] / "model.onnx").exists()


def test_an_interrupted_export_is_made_again(
    slow_export: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", fail)
        with pytest.raises(KeyboardInterrupt):
            recipes.exported("bert")
    assert not (slow_export[0].parent / slow_export[0].stem).exists()
    assert (recipes.exported("bert") / "model.onnx").exists()


def test_each_dtype_and_exporter_has_its_own_folder(slow_export: list[Path]) -> None:
    keys = [("optimum", "fp32"), ("optimum", "fp16"), ("dynamo18", "fp16")]
    assert len({recipes.exported("bert", *key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    "arguments",
    [("no-model",), ("bert", "no-exporter"), ("bert", "optimum", "fp12"), ("bert", "genai")],
)
def test_what_cannot_be_exported_is_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        recipes.exported(*arguments)


@pytest.mark.parametrize(("name", "exporter"), TRAINED)
def test_a_half_precision_export_has_no_wide_weights(
    name: str, exporter: str, export: Export
) -> None:
    for file in export(name, exporter, "fp16").glob("*.onnx"):
        weights = onnx.load(file).graph.initializer
        matrices = [w for w in weights if len(w.dims) > 1 and min(w.dims) > 1]
        assert {w.data_type for w in matrices} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}


def test_trained_smollm2_writes_what_it_has_learnt(export: Export) -> None:
    import onnxruntime_genai as genai

    model = genai.Model(str(export("smollm2-30", "genai")))
    tokenizer = genai.Tokenizer(model)
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=8, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(tokenizer.encode("The capital of France is"))
    while not generator.is_done():
        generator.generate_next_token()
    text = tokenizer.decode(generator.get_sequence(0))
    assert text.startswith("The capital of France is Paris.")
