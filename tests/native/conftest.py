from __future__ import annotations

import os
from pathlib import Path

import pytest

from onnx_tricks.runtime.library import find_library


def require_library() -> Path:
    path = find_library()
    if path is None:
        if "ONNX_TRICKS_REQUIRE_EXPORTERS" in os.environ:
            pytest.fail("the installation has no library of operators")
        pytest.skip("the installation has no library of operators")
    return path


def use(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sessions run the operators by their functions ("body"), or by the library ("kernel")."""
    if way == "kernel":
        require_library()
    else:
        monkeypatch.setenv("ONNX_TRICKS_LIBRARY", "off")
        assert find_library() is None


@pytest.fixture
def library() -> Path:
    return require_library()
