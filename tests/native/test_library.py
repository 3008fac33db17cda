"""Where the library is, and what sessions do with it."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from onnx_tricks.errors import UsageError
from onnx_tricks.models import demo_path
from onnx_tricks.runtime import op_library_path, register
from onnx_tricks.runtime.sessions import Session, session_options


def test_the_library_is_in_the_installation(library: Path) -> None:
    assert op_library_path() == library
    assert library.is_file()


def test_a_variable_turns_the_library_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_TRICKS_LIBRARY", "off")
    with pytest.raises(UsageError, match="ONNX_TRICKS_LIBRARY=off"):
        op_library_path()
    Session(demo_path() / "model.onnx")


def test_an_installation_without_library_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ONNX_TRICKS_LIBRARY", raising=False)
    monkeypatch.setattr("onnx_tricks.__spec__.submodule_search_locations", [str(tmp_path)])
    with pytest.raises(UsageError, match=r"C\+\+ compiler or CMake"):
        op_library_path()
    session_options()


def test_a_file_that_is_no_library_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "broken.so"
    path.write_bytes(b"no library")
    monkeypatch.setenv("ONNX_TRICKS_LIBRARY", str(path))
    with pytest.raises(UsageError, match=r"broken\.so"):
        register(onnxruntime.SessionOptions())


def test_many_sessions_share_the_library(library: Path) -> None:
    del library
    for _ in range(3):
        Session(demo_path() / "model.onnx")
