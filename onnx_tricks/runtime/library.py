"""The library of native kernels for the operators, which ONNX Runtime loads.

Models carry the same operators in plain ONNX as well, and run without it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnx_tricks.errors import UsageError

__all__ = ["find_library", "op_library_path", "register"]

_NAME = "libonnx_tricks.so"
_VARIABLE = "ONNX_TRICKS_LIBRARY"


def find_library() -> Path | None:
    """The library that sessions are to load, or None.

    The environment variable `ONNX_TRICKS_LIBRARY` names another file than that of the installation,
    or is "off" to run models without.
    """
    wanted = os.environ.get(_VARIABLE)
    if wanted:
        return None if wanted.lower() in ("0", "off") else Path(wanted)
    spec = find_spec("onnx_tricks")
    assert spec is not None
    # An editable installation has the library in another folder than the sources.
    files = (Path(folder, _NAME) for folder in spec.submodule_search_locations or ())
    return next((file for file in files if file.is_file()), None)


def op_library_path() -> Path:
    """The library, for `SessionOptions.register_custom_ops_library` or its like in C and C++.

    Raises:
        UsageError: This installation has no library.
    """
    path = find_library()
    if path is None:
        raise UsageError(
            f"The library of native operators is off: {_VARIABLE}={os.environ[_VARIABLE]}."
            if os.environ.get(_VARIABLE)
            else "This installation of onnx-tricks has no library of native operators: it was "
            "built without a C++ compiler or CMake, or with ONNX_TRICKS_PURE=1. Models run "
            "without it, more slowly. To have it, install a C++ compiler and run: "
            "pip install --force-reinstall --no-deps --no-binary onnx-tricks onnx-tricks"
        )
    return path


def register(options: Any) -> None:
    """Let the sessions of these options run the operators by native kernels.

    Args:
        options: An `onnxruntime.SessionOptions`.

    Raises:
        UsageError: This installation has no library, or it cannot be loaded.
    """
    path = op_library_path()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"ONNX Runtime cannot load the library of native operators, {path}: {reason} "
            f"To run without it: {_VARIABLE}=off"
        ) from error
