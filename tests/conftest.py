"""What all tests share: reference models, exported once and cached."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

Export = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that rewrites golden files."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden")


@pytest.fixture
def update_golden(pytestconfig: pytest.Config) -> bool:
    """Whether golden files are to be rewritten with what is found."""
    return bool(pytestconfig.getoption("--update-golden"))


def import_recipes() -> ModuleType:
    """`onnx_tricks.models.recipes`, or a skip where the exporters are not installed.

    ``make test`` installs them and asks for them, so there nothing is skipped.
    """
    # torch traces every step of an export to this logger; pytest would format each record.
    logging.getLogger("torch.__trace").propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other libraries, while they are imported
            return importlib.import_module("onnx_tricks.models.recipes")
    except ImportError as error:
        if "ONNX_TRICKS_REQUIRE_EXPORTERS" in os.environ:
            raise
        reason = f"needs the dependency group 'exporters' ({error}); `make test` installs it"
        pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="session")
def export(pytestconfig: pytest.Config) -> Export:
    """The function `exported`: ``export("smollm2-2", "optimum", "fp16")`` is a folder."""
    os.environ.setdefault("ONNX_TRICKS_CACHE", str(pytestconfig.rootpath / ".cache"))
    exported: Export = import_recipes().exported
    return exported
