"""The native code by itself: its declarations, and under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_SOURCE = _ROOT / "onnx_tricks" / "csrc"

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++")), reason="needs CMake and a C++ compiler"
)


def _compile(code: str) -> subprocess.CompletedProcess[str]:
    # CPLUS_INCLUDE_PATH may name a folder with the headers.
    command = ["c++", "-std=c++17", "-fsyntax-only", "-I", str(_SOURCE), "-x", "c++", "-"]
    return subprocess.run(command, input=code, capture_output=True, text=True, env=os.environ)


def test_our_declarations_are_those_of_the_official_headers() -> None:
    names = ("onnxruntime/onnxruntime_c_api.h", "onnxruntime_c_api.h")
    if not any(_compile(f"#include <{name}>").returncode == 0 for name in names):
        pytest.skip("needs the headers of ONNX Runtime, as in Debian's libonnxruntime-dev")
    done = _compile((_SOURCE / "check_offsets.cc").read_text())
    assert done.returncode == 0, done.stderr


def test_random_inputs_are_computed_or_refused_and_never_overrun() -> None:
    # Built where the next run finds it.
    build = _ROOT / ".cache" / "native-fuzz"
    configure = ["cmake", "-S", _SOURCE, "-B", build, "-DONNX_TRICKS_FUZZ=ON"]
    configure.append("-DONNX_TRICKS_CUDA=OFF")
    for command in (configure, ["cmake", "--build", build, "--target", "fuzz", "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([build / "fuzz", "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run, refused = (int(part.split()[0]) for part in done.stdout.split(","))
    assert run > 100
    assert refused > 50
