"""The run as a whole, on the embedded demo model and on toys."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_tricks
from onnx_tricks import FoldNorm, ParityError, UsageError
from onnx_tricks.models import demo_path
from onnx_tricks.rewrite import Pass, Site
from tests import toys

LN = "z = LayerNormalization(x, g, beta) y = MatMul(z, w)"


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, onnx_tricks.Report]:
    output = tmp_path_factory.mktemp("demo") / "out"
    return output, onnx_tricks.optimize("demo", output).report


def test_the_demo_model_folds_all_its_norms_and_is_proven_equal(demo) -> None:
    output, report = demo
    (fold,) = report.passes
    assert (fold.applied, fold.skipped) == (2 * 4 + 1, [])
    assert report.verification.status == "passed"
    assert report.verification.reference == "float64"
    assert report.verification.error_after <= 2 * report.verification.error_before
    assert report.after.parameters < report.before.parameters
    assert report.after.bytes < report.before.bytes
    assert report.before.cache_values_per_token == 2 * 4 * 192
    for name in ("config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (demo_path() / name).read_bytes()


def test_inputs_outputs_opsets_and_metadata_stay(demo) -> None:
    before = onnx.load(demo_path() / "model.onnx")
    after = onnx.load(demo[0] / "model.onnx")
    for field in ("metadata_props", "ir_version", "producer_name", "producer_version"):
        assert getattr(before, field) == getattr(after, field)
    opsets = [{one.domain: one.version for one in model.opset_import} for model in (before, after)]
    assert opsets[0] == opsets[1]
    assert before.graph.input == after.graph.input
    assert before.graph.output == after.graph.output
    onnx.checker.check_model(after)


def test_a_second_run_changes_nothing(demo, tmp_path: Path) -> None:
    report = onnx_tricks.optimize(demo[0], tmp_path / "again", verify=False).report
    assert report.passes[0].applied == 0
    assert report.before == report.after
    assert digest(tmp_path / "again") == digest(demo[0])


def test_two_runs_give_identical_bytes(demo, tmp_path: Path) -> None:
    onnx_tricks.optimize("demo", tmp_path / "out", verify=False)
    assert digest(tmp_path / "out") == digest(demo[0])


def test_the_input_may_be_the_output(demo, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes((demo_path() / "model.onnx").read_bytes())
    onnx_tricks.optimize(file, file)
    assert file.read_bytes() == (demo[0] / "model.onnx").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_a_dry_run_reports_and_writes_nothing(demo, tmp_path: Path) -> None:
    report = onnx_tricks.optimize("demo", tmp_path / "out", dry_run=True).report
    assert report.passes[0].applied == 9
    assert report.after == demo[1].after
    assert report.output is None
    assert report.verification.status == "skipped"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["proto", "ir"])
def test_a_model_in_memory_is_not_changed_and_comes_back_optimised(form: str) -> None:
    proto = toys.model(LN)
    given = proto if form == "proto" else ir.from_proto(proto)
    before = (given if form == "proto" else ir.to_proto(given)).SerializeToString()
    model, report = onnx_tricks.optimize(given)
    assert isinstance(model, type(given))
    assert (given if form == "proto" else ir.to_proto(given)).SerializeToString() == before
    assert report.passes[0].applied == 1
    assert report.verification.status == "passed"
    after = model if form == "proto" else ir.to_proto(model)
    inputs = toys.feeds(proto)
    assert toys.error(toys.run(after, inputs)[0], toys.run(proto, inputs)[0]) < 1e-6


def test_a_model_in_memory_can_be_written(tmp_path: Path) -> None:
    model, report = onnx_tricks.optimize(toys.model(LN), tmp_path / "out.onnx")
    assert report.output == str(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx").graph.node == model.graph.node


class Spoil(Pass):
    """A pass with a defect: one weight comes out one per cent too large."""

    name = "spoil"
    summary = "Spoils."

    def sites(self, model: ir.Model):
        if not model.meta.get("spoilt"):
            yield Site("w", inputs=("x",), outputs=("y",))

    def apply(self, model: ir.Model, site: Site) -> None:
        model.meta["spoilt"] = True
        value = model.graph.initializers["w"]
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name="w")


def test_a_wrong_result_is_not_written(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    output.write_bytes(b"old")
    onnx.save(toys.model(LN), tmp_path / "in.onnx")
    with pytest.raises(ParityError) as caught:
        onnx_tricks.optimize(tmp_path / "in.onnx", output, passes=[Spoil()])
    assert caught.value.report.verification.status == "failed"
    assert caught.value.report.output is None
    assert output.read_bytes() == b"old"


def test_passes_are_chosen_by_name_or_as_objects() -> None:
    choose = onnx_tricks.optimizer.select_passes
    assert choose(None) == (FoldNorm(),)
    assert choose(["fold-norm"], skip=["fold-norm"]) == ()
    assert choose([], enable=[FoldNorm(shared_weights="copy")])[0].shared_weights == "copy"
    with pytest.raises(UsageError, match=r"no pass 'fold'.*there are: .*fold-norm"):
        choose(["fold"])


def test_functions_are_opened_only_where_a_pass_applies_inside() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 17, "local" : 1]>\n'
        "g (float[B, S, 2] x, float[2, 2] w) => (float[B, S, 2] y)\n"
        "<float[2] gain = {2, 0.5}, float[2, 2] v = {1, 2, 3, 4}>\n"
        "{ z = local.norm (x, gain) y = MatMul (z, v) }\n"
        '<domain: "local", opset_import: ["" : 17]> norm (a, b) => (c)\n'
        "{ c = LayerNormalization (a, b) }"
    )
    opened = onnx_tricks.optimize(proto)
    assert opened.report.passes[0].applied == 1
    assert len(opened.model.functions) == 0
    kept = onnx_tricks.optimize(proto, passes=[])
    assert len(kept.model.functions) == 1


def test_external_data_keeps_its_naming(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    model = ir.load(demo_path() / "model.onnx")
    ir.save(model, source / "model.onnx", external_data="model.onnx_data")
    onnx_tricks.optimize(source, target, verify=False)
    assert {path.name for path in target.iterdir()} == {"model.onnx", "model.onnx_data"}
    written = onnx.load(target / "model.onnx", load_external_data=False)
    lengths = {
        entry.value: int(lookup["length"])
        for one in written.graph.initializer
        if (lookup := {entry.key: entry.value for entry in one.external_data})
        for entry in one.external_data
        if entry.key == "offset"
    }
    assert (target / "model.onnx_data").stat().st_size == sum(lengths.values())


def test_the_report_has_the_promised_keys(demo) -> None:
    data = json.loads(json.dumps(demo[1].to_dict()))
    assert set(data) == {
        "input", "output", "seconds", "peak_rss_bytes", "passes", "parameters", "bytes", "nodes",
        "cache_values_per_token", "verification",
    }  # fmt: skip
    assert set(data["passes"][0]) == {"name", "applied", "skipped", "details", "seconds"}
    for pair in ("parameters", "bytes", "nodes", "cache_values_per_token"):
        assert set(data[pair]) == {"before", "after"}
    promised = {"status", "reference", "error_before", "error_after", "cases"}
    assert promised <= set(data["verification"])


def test_a_model_without_cache_reports_none() -> None:
    report = onnx_tricks.optimize(toys.model(LN), verify=False).report
    assert report.to_dict()["cache_values_per_token"] is None
