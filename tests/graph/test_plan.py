from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnx_tricks.errors import ModelError, UsageError
from onnx_tricks.graph.plan import Output, Plan, find_models, make_plan


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_folder_holds_its_models_at_the_top_and_in_onnx(tmp_path: Path) -> None:
    _touch(*(tmp_path / name for name in ("b.onnx", "a.onnx", "onnx/model.onnx", "deep/c.onnx")))
    _touch(tmp_path / "config.json")
    names = [str(path.relative_to(tmp_path)) for path in find_models(tmp_path)]
    assert names == ["a.onnx", "b.onnx", "onnx/model.onnx"]


def test_an_input_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no \.onnx file"):
        find_models(tmp_path)
    with pytest.raises(ModelError, match="no such file or folder"):
        find_models(tmp_path / "missing")


def test_a_file_goes_to_a_file_or_into_a_folder(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    _touch(source)
    (tmp_path / "folder").mkdir()
    into = (Output(source, Path("m.onnx")),)
    assert make_plan(source, tmp_path / "o.onnx") == Plan(
        tmp_path, (Output(source, Path("o.onnx")),)
    )
    assert make_plan(source, tmp_path / "folder") == Plan(tmp_path / "folder", into)
    assert make_plan(source, f"{tmp_path}/new/") == Plan(tmp_path / "new", into)
    assert make_plan(None, tmp_path / "folder").outputs == (Output(None, Path("model.onnx")),)


def test_a_folder_goes_to_a_folder_and_carries_its_other_files(tmp_path: Path) -> None:
    _touch(tmp_path / "in" / "m.onnx", tmp_path / "in" / "onnx" / "q.onnx", tmp_path / "file")
    source = tmp_path / "in"
    plan = make_plan(source, tmp_path / "out")
    assert [output.target for output in plan.outputs] == [Path("m.onnx"), Path("onnx/q.onnx")]
    assert plan.carried == source
    assert make_plan(source, source).carried is None
    for wrong in (tmp_path / "file", tmp_path / "out.onnx"):
        with pytest.raises(UsageError, match="so the output must be one too"):
            make_plan(source, wrong)


def test_folders_within_each_other_are_refused(tmp_path: Path) -> None:
    _touch(tmp_path / "in" / "m.onnx")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for other in (tmp_path, tmp_path / "in" / "out", tmp_path / "link" / "out"):
        with pytest.raises(UsageError, match="lie within each other"):
            make_plan(tmp_path / "in", other)
    assert make_plan(tmp_path / "in", tmp_path / "link").carried is None


def test_an_output_that_is_no_file_is_refused(tmp_path: Path) -> None:
    _touch(tmp_path / "m.onnx")
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(UsageError, match="neither a file nor a folder"):
            make_plan(tmp_path / "m.onnx", wrong)
