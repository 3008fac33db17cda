"""precompute-first-layer on models as exporters write them: what is stored, errors, bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_tricks
from onnx_tricks import PrecomputeFirstLayer
from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.shapes import annotate
from onnx_tricks.models import demo_path
from onnx_tricks.runtime.sessions import Session
from onnx_tricks.verify import verify
from onnx_tricks.verify.decoding import decode
from onnx_tricks.verify.plans import plans
from tests.conftest import Export

ANY_GROWTH = PrecomputeFirstLayer(max_growth=1000)
WIDE, NARROW, PLAIN = (48, 64, 32, 32), (48, 48, 24, 24), (48, 48, 48, 48)

# recipe, exporter, type, numbers stored for a token, whether all outputs stay the same in every
# bit. They do not where the sums of a parallel block change their order, nor where ONNX Runtime
# keeps float32 between operators that have no half kernels, which a table of half numbers ends.
MODELS = [
    ("smollm2-2", "optimum", "fp32", (576, 576, 192, 192), True),
    ("smollm2-2", "dynamo18", "fp32", (576, 576, 192, 192), True),
    ("smollm2-2", "dynamo23", "fp16", (576, 576, 192, 192), True),
    ("smollm2-2", "genai", "fp32", (576, 960), True),
    ("llama", "optimum", "fp32", WIDE, True),
    ("llama", "dynamo18-cache", "fp32", WIDE, True),
    ("mistral", "optimum", "fp32", WIDE, True),
    ("qwen2", "optimum", "fp32", (96, 96, 32, 32), True),
    ("qwen3", "optimum", "fp32", WIDE, True),
    ("gemma", "optimum", "fp32", WIDE, True),
    ("gemma2", "optimum", "fp32", WIDE, True),
    ("gemma3", "optimum", "fp32", (48, 32, 64, 32), True),
    ("phi3", "optimum", "fp32", (96, 160), True),
    ("olmo", "optimum", "fp32", (96, 96, 32, 32), True),
    ("olmo2", "optimum", "fp32", NARROW, True),
    ("bloom", "optimum", "fp32", (48, 144), True),
    ("mpt", "optimum", "fp32", (48, 144), True),
    ("phi", "optimum", "fp32", (96, 96, 96, 96), False),
    ("gpt_neox", "optimum", "fp32", (48, 144), False),
    ("gptj", "optimum", "fp32", PLAIN, False),
    ("falcon", "optimum", "fp32", (48, 72), False),
    ("deepseek_v3", "optimum", "fp32", (48, 64, 6, 96), True),
    ("falcon_alibi", "optimum", "fp32", PLAIN, True),
    ("cohere", "optimum", "fp32", (48, 24, 48, 24), False),
]


def bits(source: Path, target: Path) -> bool:
    """Whether prompts and steps have the same outputs in every bit."""
    interface = read_interface(load_model(source).model)
    sessions = [Session(path, threads=1) for path in (source, target)]
    for case in next(plans(interface, lambda _name, _batch: None)):
        runs = [decode(session, case, interface.presents) for session in sessions]
        for (_, before), (_, after) in zip(*runs, strict=True):
            if any(not np.array_equal(before[name], after[name]) for name in before):
                return False
    return True


@pytest.mark.parametrize(("recipe", "exporter", "dtype", "stored", "same"), MODELS)
def test_a_first_layer_is_stored(
    export: Export, tmp_path: Path, recipe: str, exporter: str, dtype: str, stored, same: bool
) -> None:
    source, target = export(recipe, exporter, dtype) / "model.onnx", tmp_path / "model.onnx"
    report = onnx_tricks.optimize(source, target, passes=[ANY_GROWTH], verify=not same).report
    assert (report.passes[0].applied, report.passes[0].skipped) == (1, [])
    graph = onnx.load(target, load_external_data=False).graph
    (widths,) = (one for one in graph.initializer if one.name.endswith(".first_layer.widths"))
    assert tuple(onnx.numpy_helper.to_array(widths)) == stored
    assert bits(source, target) == same
    if not same:
        assert report.verification.status == "passed", report.verification.message
        assert report.verification.error_after <= 2 * report.verification.error_before


@pytest.mark.parametrize(
    ("recipe", "exporter"),
    [("gemma3", "optimum"), ("gpt_neox", "optimum"), ("qwen2", "optimum")],
)
def test_half_precision_meets_the_error_rule(export: Export, recipe: str, exporter: str) -> None:
    source = export(recipe, exporter, "fp16")
    report = onnx_tricks.optimize(source, passes=[ANY_GROWTH]).report
    assert report.passes[0].applied == 1
    assert report.verification.status == "passed", report.verification.message
    assert report.verification.error_after <= 2 * report.verification.error_before


def test_both_sides_of_a_translator_are_stored_once_for_all_branches(
    export: Export, tmp_path: Path
) -> None:
    report = onnx_tricks.optimize(export("t5"), tmp_path, passes=[ANY_GROWTH]).report
    models = sorted(path.name for path in tmp_path.glob("*.onnx"))
    assert report.passes[0].applied == len(models) == 4
    assert report.verification.status == "passed", report.verification.message
    merged = onnx.load(tmp_path / "decoder_model_merged.onnx").graph
    tables = [one.name for one in merged.initializer if one.name.endswith("first_layer")]
    assert len(tables) == 1


@pytest.mark.parametrize(
    ("recipe", "exporter", "reason"),
    [
        ("gpt2", "optimum", "adds rows of 'transformer.wpe.weight'"),
        ("gpt2", "dynamo23", "adds rows of 'model.transformer.wpe.weight'"),
        ("bert", "optimum", "adds rows of 'bert.embeddings.token_type_embeddings.weight'"),
        ("vit", "dynamo23", "no Gather looks up token ids in a constant table"),
    ],
)
def test_learned_positions_token_types_and_images_are_refused(
    export: Export, recipe: str, exporter: str, reason: str
) -> None:
    source = export(recipe, exporter)
    report = onnx_tricks.optimize(source, passes=[ANY_GROWTH], dry_run=True).report
    assert report.passes[0].applied == 0
    (skip,) = report.passes[0].skipped
    assert reason in skip.reason


def test_the_demo_grows_little_and_loses_nothing_to_fold_norm() -> None:
    report = onnx_tricks.optimize("demo", enable=["precompute-first-layer"]).report
    assert {one.name: one.applied for one in report.passes}["precompute-first-layer"] == 1
    assert report.verification.status == "passed", report.verification.message
    assert report.after.bytes < 1.1 * report.before.bytes


def test_regions_are_verified_where_a_model_is_too_large_to_run_whole(tmp_path: Path) -> None:
    source, target = demo_path() / "model.onnx", tmp_path / "model.onnx"
    onnx_tricks.optimize(source, target, passes=[ANY_GROWTH], verify=False)
    model = load_model(source).model
    annotate(model)
    (site,) = ANY_GROWTH.sites(model)
    result = verify(source, target, sites=[site], memory_limit=0)
    assert (result.status, result.reference) == ("passed", "sites")
    assert {one.output for one in result.findings} == set(site.outputs)
