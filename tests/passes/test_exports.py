"""fold-norm on trained models as exporters write them: all norms found, the error rule met."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_tricks
from onnx_tricks import FoldNorm, Report
from tests.conftest import Export, import_recipes

trained = import_recipes().trained

from onnx_tricks.models import normalised, tokens  # noqa: E402 - where the exporters are not, skip

TIED = "is also read by"
OUTPUT = "is an output of the graph"

# recipe, exporter, type, norms folded, reasons why others are not. In half precision the norm
# before a tied head stays. Whisper's encoder ends in a norm; its merged decoder holds two decoders.
MODELS = [
    ("smollm2-2", "optimum", "fp32", 2 * 2 + 1, []),
    ("smollm2-2", "dynamo18", "fp32", 2 * 2 + 1, []),
    ("smollm2-2", "dynamo23", "fp32", 2 * 2 + 1, []),
    ("smollm2-2", "dynamo18-cache", "fp32", 2 * 2 + 1, []),
    ("smollm2-2", "genai", "fp32", 2 * 2 + 1, []),
    ("smollm2-2", "optimum", "fp16", 2 * 2, [TIED]),
    ("smollm2-2", "dynamo18", "fp16", 2 * 2, [TIED]),
    ("smollm2-2", "dynamo23", "fp16", 2 * 2, [TIED]),
    ("smollm2-30", "optimum", "fp32", 2 * 30 + 1, []),
    ("mgm", "optimum", "fp32", 2 * 8 + 1, []),
    ("mgm", "optimum", "fp16", 2 * 8, [TIED]),
    ("whisper-tiny.en", "optimum", "fp32", 8 + 4 * 13, [OUTPUT]),
    ("whisper-tiny.en", "optimum", "fp16", 8 + 4 * 12, [TIED] * 4 + [OUTPUT]),
]


def hold(report: Report, folded: int, reasons: list[str]) -> None:
    """What must be true of every run."""
    (fold,) = report.passes
    assert fold.applied == folded
    assert len(fold.skipped) == len(reasons)
    for reason in reasons:
        assert any(reason in skip.reason for skip in fold.skipped)
    result = report.verification
    assert result.status == "passed", result.message
    assert result.error_after <= 2 * result.error_before
    assert report.after.bytes <= report.before.bytes


@pytest.mark.parametrize(("recipe", "exporter", "dtype", "folded", "reasons"), MODELS)
def test_a_trained_model_folds_and_meets_the_error_rule(
    export: Export, tmp_path: Path, recipe: str, exporter: str, dtype: str, folded: int, reasons
) -> None:
    source = export(recipe, exporter, dtype)
    hold(onnx_tricks.optimize(source, tmp_path / "out").report, folded, reasons)
    again = onnx_tricks.optimize(tmp_path / "out", dry_run=True).report
    assert again.passes[0].applied == 0
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("exporter", ["dynamo18", "dynamo23"])
def test_thirty_layers_fold_by_every_exporter(export: Export, exporter: str) -> None:
    report = onnx_tricks.optimize(export("smollm2-30", exporter), dry_run=True).report
    assert (report.passes[0].applied, report.passes[0].skipped) == (2 * 30 + 1, [])


@pytest.mark.parametrize("exporter", ["optimum", "dynamo18", "dynamo23"])
def test_a_tied_head_in_half_precision_folds_into_a_copy_when_asked(
    export: Export, exporter: str
) -> None:
    source = export("smollm2-2", exporter, "fp16")
    report = onnx_tricks.optimize(source, passes=[FoldNorm(shared_weights="copy")]).report
    assert (report.passes[0].applied, report.passes[0].skipped) == (2 * 2 + 1, [])
    assert report.verification.status == "passed"
    assert report.verification.error_after <= 2 * report.verification.error_before
    table = 49152 * 576 * 2
    assert table - 10_000 < report.after.bytes - report.before.bytes < table


def test_the_vision_transformer_folds_every_norm_before_a_matmul() -> None:
    report = onnx_tricks.optimize(trained.vit_path()).report
    hold(report, 25, [])


def test_a_post_norm_model_is_refused_because_the_residual_reads_the_norm() -> None:
    report = onnx_tricks.optimize(trained.minilm_path()).report
    assert report.passes[0].applied == 0
    assert len(report.passes[0].skipped) == 7
    residual = [s for s in report.passes[0].skipped if "residual connection" in s.reason]
    assert len(residual) == 6
    assert report.verification.status == "passed"


def test_the_genai_model_generates_the_same_text(export: Export, tmp_path: Path) -> None:
    import onnxruntime_genai as genai

    source, target = export("smollm2-2", "genai"), tmp_path / "out"
    onnx_tricks.optimize(source, target, verify=False)

    def text(folder: Path) -> str:
        model = genai.Model(str(folder))
        tokenizer = genai.Tokenizer(model)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=40, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(tokenizer.encode("The capital of France is"))
        while not generator.is_done():
            generator.generate_next_token()
        return str(tokenizer.decode(generator.get_sequence(0)))

    assert text(target) == text(source)
    operators = {node.op_type for node in onnx.load(target / "model.onnx").graph.node}
    assert {"SkipSimplifiedLayerNormalization", "GroupQueryAttention"} <= operators


def test_what_the_runtime_fuses_stays_fused(export: Export, tmp_path: Path) -> None:
    """The spelling that ONNX Runtime does not fuse comes out as the one that it does."""
    import onnxruntime

    source = export("smollm2-2", "dynamo18") / "model.onnx"
    onnx_tricks.optimize(source, tmp_path / "out.onnx", verify=False)

    def kernels(path: Path) -> list[str]:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "session.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / "session.onnx", load_external_data=False).graph.node
        return [node.op_type for node in nodes if "LayerNormalization" in node.op_type]

    assert kernels(source) == []
    assert kernels(tmp_path / "out.onnx") == ["SimplifiedLayerNormalization"] * 5


def test_a_change_of_one_per_cent_is_caught_in_a_trained_model(
    export: Export, tmp_path: Path
) -> None:
    source = export("smollm2-2", "dynamo23") / "model.onnx"
    proto = onnx.load(source)
    weight = next(one for one in proto.graph.initializer if "post_attention_layernorm" in one.name)
    array = onnx.numpy_helper.to_array(weight) * np.float32(1.01)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(proto, tmp_path / "wrong.onnx")
    assert onnx_tricks.verify(source, tmp_path / "wrong.onnx").status == "failed"


@pytest.mark.parametrize("exporter", tokens.EXPORTERS)
def test_a_transformer_with_tanh_in_place_of_norms_folds_their_gains(
    tmp_path: Path, exporter: str
) -> None:
    path = tmp_path / "model.onnx"
    tokens.write(normalised.Normalised(tanh=True), path, exporter)
    report = onnx_tricks.optimize(path).report
    # Those in front of blocks and of the head, and of values.
    assert report.passes[0].applied == 2 * 2 + 1 + 2
    residual = [one for one in report.passes[0].skipped if "residual" in one.reason]
    assert len(residual) == 2 * 2
    assert report.verification.status == "passed", report.verification.message
    assert report.verification.error_after <= 2 * report.verification.error_before


def test_where_the_proof_fails_half_precision_is_left_alone(export: Export, tmp_path: Path) -> None:
    source = export("cohere_normed", "optimum", "fp16")
    done = onnx_tricks.optimize(source, tmp_path / "out", passes=["fold-norm", "slim-attention"])
    fold, slim = done.report.passes
    assert done.report.verification.status == "passed"
    assert slim.applied == 2
    left = sum("failed the proof" in skip.reason for skip in fold.skipped)
    assert (fold.applied, left) in ((3, 0), (0, 3))
