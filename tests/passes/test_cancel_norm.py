"""cancel-norm: what undoes a norm and what feels it, on toys and on normalised models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_tricks
from onnx_tricks import CancelNorm, CenterNorm, FoldNorm
from onnx_tricks.rewrite import PassResult, run_passes
from tests import toys
from tests.conftest import import_recipes

import_recipes()

from onnx_tricks.models import normalised, tokens  # noqa: E402 - where the exporters are not there, skip

FIRST = "x = Gather(table, ids) z = SimplifiedLayerNormalization<epsilon=0.0000000001>(x, g) "
LAST = "y = SimplifiedLayerNormalization<epsilon=0.0000000001>(v, g_last)"
PATHS = {
    "MatMul": "v = MatMul(z, w_square)",
    "Gemm": "f = Reshape(z, flat) v = Gemm(f, w_square)",
    "two in a row": "h = MatMul(z, w_square) v = MatMul(h, w_other)",
    "ReLU": "h = MatMul(z, w_square) r = Relu(h) v = MatMul(r, w_other)",
    "product with a constant": "h = MatMul(z, w_square) v = Mul(h, g1)",
    "gated by a ReLU": "h = MatMul(z, w_square) r = Relu(h) u = MatMul(z, w_other) k = Mul(r, u) "
    "v = MatMul(k, w_last)",
    "sum of two": "h = MatMul(z, w_square) u = MatMul(z, w_other) v = Add(h, u)",
    "rows moved": "h = MatMul(z, w_square) v = Transpose<perm=[1,0,2]>(h)",
}
FELT = {
    "bias": ("h = MatMul(z, w_square) v = Add(h, c_square)", "has not the same factor"),
    "bias in Gemm": ("f = Reshape(z, flat) v = Gemm(f, w_square, c_square)", "adds a bias"),
    "residual": ("h = MatMul(z, w_square) v = Add(h, x)", "has not the same factor"),
    "other power": (
        "h = MatMul(z, w_square) k = Mul(h, h) v = Add(h, k)",
        "has not the same factor",
    ),
    "smooth activation": ("h = MatMul(z, w_square) v = Tanh(h)", "is not linear in it"),
    "convolution over rows": (
        "t = Transpose<perm=[0,2,1]>(z) v = Conv<pads=[1,1]>(t, w_conv_square)",
        "mixes rows",
    ),
    "moved apart": (
        "t = Transpose<perm=[1,0,2]>(z) u = Transpose<perm=[1,0,2]>(z) v = Mul(t, u)",
        "moved apart",
    ),
    "output": ("v = MatMul(z, w_square) k = Identity(z)", "is an output of the graph"),
}


def toy(path: str, outputs: str = "y", last: str = LAST, kind: str = "float") -> onnx.ModelProto:
    rng = np.random.default_rng(5)
    square = rng.standard_normal
    extra = {
        "w_other": square((toys.D, toys.D)) / 4,
        "w_last": square((toys.D, toys.D)) / 4,
        "w_conv_square": square((toys.D, toys.D, 3)) / 4,
        "c_square": square(toys.D),
        "g_last": 1 + square(toys.D) / 4,
    }
    extra = {name: array.astype(toys.TYPES[kind]) for name, array in extra.items()}
    return toys.model(
        f"{FIRST} {path} {last}", kind=kind, inputs="ids[b,s]", outputs=outputs, extra=extra
    )


def cancel(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
    model = ir.from_proto(proto)
    (result,) = run_passes(model, [CancelNorm()])
    return ir.to_proto(model), result


@pytest.mark.parametrize("path", PATHS)
def test_a_norm_that_the_next_one_undoes_is_dropped(path: str) -> None:
    before = toy(PATHS[path])
    after, result = cancel(before)
    assert result.count == 1
    assert sum("Normalization" in node.op_type for node in after.graph.node) == 1
    ((detail,),) = (site.details() for site in result.applied)
    assert 0 < detail["epsilon_error"] < 2.4e-7
    inputs = toys.feeds(before)
    assert toys.error(toys.run(after, inputs)[0], toys.run(before, inputs)[0]) < 1e-6
    again, second = cancel(after)
    assert second.count == 0
    assert again.SerializeToString() == after.SerializeToString()


def test_a_layer_norm_undoes_an_rms_norm_too() -> None:
    last = "y = LayerNormalization<epsilon=0.0000000001>(v, g_last)"
    _, result = cancel(toy(PATHS["MatMul"], last=last))
    assert result.count == 1


def test_the_bound_on_what_epsilon_changes_holds_and_is_not_far_off() -> None:
    for kind, epsilon in (("float16", "0.0001"), ("float", "0.0000001")):
        before = toy(PATHS["ReLU"], kind=kind)
        for node in before.graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = float(epsilon)
        _, result = cancel(before)
        bounds = [row["epsilon_error"] for site in result.applied for row in site.details()]
        assert len(bounds) == (kind == "float16"), [skip.reason for skip in result.skipped]


@pytest.mark.parametrize("case", FELT)
def test_what_feels_the_size_of_rows_keeps_the_norm(case: str) -> None:
    path, reason = FELT[case]
    before = toy(path, outputs="y, k" if "k = Identity" in path else "y")
    after, result = cancel(before)
    assert result.count == 0
    assert reason in " ".join(skip.reason for skip in result.skipped)
    assert after.SerializeToString() == ir.to_proto(ir.from_proto(before)).SerializeToString()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("normalised")

    def write(exporter: str, epsilon: float = 1e-9, **options: bool) -> Path:
        name = "-".join([exporter, f"{epsilon}", *options])
        path = folder / f"{name}.onnx"
        if not path.exists():
            sizes = normalised.Sizes(epsilon=epsilon)
            tokens.write(normalised.Normalised(sizes=sizes, **options), path, exporter)
        return path

    return write


@pytest.mark.parametrize("exporter", tokens.EXPORTERS)
def test_a_model_that_normalises_queries_keys_and_values_loses_its_first_norms(
    written, exporter: str
) -> None:
    report = onnx_tricks.optimize(written(exporter), passes=["cancel-norm"]).report
    assert report.passes[0].applied == 4  # two in each of two layers
    assert all(row["epsilon_error"] < 2.4e-7 for row in report.passes[0].details)
    assert report.verification.status == "passed", report.verification.message
    assert report.verification.error_after <= 2 * report.verification.error_before


def test_after_folding_nothing_of_a_norm_is_left(written) -> None:
    passes = [CenterNorm(), FoldNorm(), CancelNorm()]
    model, report = onnx_tricks.optimize(written("dynamo23"), passes=passes)
    assert [one.applied for one in report.passes] == [0, 7, 4]
    assert not [node for node in model.graph.all_nodes() if "cancelled" in (node.name or "")]
    assert report.verification.status == "passed"


@pytest.mark.parametrize("options", [{"values": False}, {"latent": True}, {"bias": True}])
def test_attention_that_is_not_normalised_throughout_keeps_its_norm(written, options) -> None:
    """Qwen 3 and Gemma 3 leave values as they are; multi-head latent attention a part of keys."""
    report = onnx_tricks.optimize(
        written("torchscript", **options), passes=["cancel-norm"], dry_run=True
    ).report
    assert report.passes[0].applied == 2  # those of the feed-forward blocks
    assert len(report.passes[0].skipped) >= 9


def test_an_epsilon_that_would_be_felt_is_refused_with_its_size(written) -> None:
    report = onnx_tricks.optimize(
        written("torchscript", 1e-6), passes=["cancel-norm"], dry_run=True
    ).report
    reasons = [one.reason for one in report.passes[0].skipped if "epsilon would" in one.reason]
    assert report.passes[0].applied == 0
    assert len(reasons) == 4
