"""Slim models to run: made once for all tests, without the proof, which has its own tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from onnx_tricks.models import demo_path
from onnx_tricks.optimizer import optimize
from onnx_tricks.passes.fold_norm import FoldNorm
from onnx_tricks.passes.slim_attention import SlimAttention
from tests.conftest import Export

Slim = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def slim(export: Export, tmp_path_factory: pytest.TempPathFactory) -> Slim:
    """The function `slim("mgm")`: the folder as Optimum exported it, and its slim counterpart."""
    made: dict[tuple[str, str, str], tuple[Path, Path]] = {}

    def make(name: str, cache_dtype: str = "auto", dtype: str = "fp32") -> tuple[Path, Path]:
        key = name, cache_dtype, dtype
        if key not in made:
            source = demo_path() if name == "demo" else export(name, "optimum", dtype)
            passes = [FoldNorm(), SlimAttention(rank=32, cache_dtype=cache_dtype)]
            target = tmp_path_factory.mktemp("slim") / name
            optimize(source, target, passes=passes, verify=False)
            made[key] = source, target
        return made[key]

    return make
