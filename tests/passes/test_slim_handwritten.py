"""slim-attention on decoders that people write by hand, whatever they call things."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.optimizer import optimize
from onnx_tricks.passes import SlimAttention
from onnx_tricks.runtime.sessions import Session
from tests.native.conftest import use
from tests.slim.handwritten import LAYERS, Style, write

STYLES = {
    "heads side by side": Style(layout="bs(hk)"),
    "tokens before heads": Style(layout="bshk", positions="first"),
    "tokens first": Style(layout="sbhk"),
    "tokens last": Style(layout="bhks"),
    "positions of each": Style(positions="each"),
    "slices of tables": Style(positions="slice"),
    "stacked neighbours": Style(positions="first", interleaved=True),
    "a bias of the caller": Style(mask="bias"),
    "a mask of the caller": Style(mask="allowed"),
}


def _slim(source: Path, out: Path) -> None:
    done = optimize(source, out, passes=[SlimAttention()])
    assert not done.report.passes[0].skipped
    assert done.report.passes[0].applied == LAYERS
    assert done.report.verification.status == "passed"
    assert done.report.verification.reference == "float64"


@pytest.mark.parametrize("name", STYLES)
def test_a_decoder_of_any_style_is_slimmed(name: str, tmp_path: Path) -> None:
    _slim(write(STYLES[name], tmp_path / "model.onnx"), tmp_path / "slim.onnx")


@pytest.mark.parametrize(
    "style", [Style(layout="bshk", mask="bias"), Style(positions="each")], ids=["cache", "each"]
)
def test_a_decoder_by_dynamo_is_slimmed(style: Style, tmp_path: Path) -> None:
    _slim(write(style, tmp_path / "model.onnx", dynamo=True), tmp_path / "slim.onnx")


@pytest.mark.parametrize("positions", ["first", "slice", "each"])
def test_positions_of_the_caller_may_begin_anywhere(positions: str, tmp_path: Path) -> None:
    source = write(Style(positions=positions), tmp_path / "model.onnx")
    done = optimize(source, tmp_path / "slim.onnx", passes=[SlimAttention()])
    assert (done.report.passes[0].applied, done.report.verification.status) == (LAYERS, "passed")
    logits = [_written_from(10, path) for path in (source, tmp_path / "slim.onnx")]
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=2e-5)


def _written_from(first: int, path: Path) -> np.ndarray:
    """The logits of two steps whose positions begin at some number."""
    interface, session, found = read_interface(load_model(path).model), Session(path), []
    caches = interface.empty_caches(1)
    for step in range(2):
        valid = np.ones((1, first + 3 * (step + 1)))
        feeds = {v.name: v.places(valid, 3) for v in interface.role("positions")}
        outputs = session.run({**caches, **feeds, "tokens": np.array([[5, 7, 11]])})
        caches = {past: outputs[present] for past, present in interface.presents.items()}
        found.append(outputs["logits"])
    return np.concatenate(found)


def test_plain_onnx_computes_what_the_operators_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("body", monkeypatch)
    _slim(write(STYLES["stacked neighbours"], tmp_path / "model.onnx"), tmp_path / "slim.onnx")


@pytest.mark.parametrize(
    ("keeps", "reason"),
    [
        ("buffer", "writes into a cache of fixed length: export one that grows"),
        ("new", "return earlier and new keys together, and the values likewise"),
    ],
)
def test_a_cache_that_the_caller_keeps_is_left_with_advice(
    keeps: str, reason: str, tmp_path: Path
) -> None:
    positions = "each" if keeps == "buffer" else "cache"
    source = write(Style(positions=positions, keeps=keeps), tmp_path / "model.onnx")
    report = optimize(source, tmp_path / "same.onnx", passes=[SlimAttention()]).report
    assert [reason in skip.reason for skip in report.passes[0].skipped] == [True] * LAYERS


@pytest.mark.parametrize("keeps", ["all", "new", "buffer"])
def test_inputs_are_made_for_what_the_caller_keeps(keeps: str, tmp_path: Path) -> None:
    positions = "each" if keeps == "buffer" else "cache"
    source = write(Style(positions=positions, keeps=keeps), tmp_path / "model.onnx")
    verification = optimize(source, tmp_path / "folded.onnx").report.verification
    assert (verification.status, verification.reference) == ("passed", "float64")
    assert verification.cases > 1
