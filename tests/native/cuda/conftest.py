"""The CUDA kernels, compiled for a CPU and run by an emulator."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "onnx_tricks" / "csrc"


def compile_library(target: Path, *arguments: str | Path) -> Path:
    """A shared library from sources and flags, by whichever C++ compiler there is."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    flags = (
        "-std=c++17 -O1 -fPIC -shared -fvisibility=hidden -U_FORTIFY_SOURCE -Wall -Wextra -Werror"
    )
    flags += f" -Wno-unknown-pragmas -DONNX_TRICKS_EMULATED -I{HERE} -I{SOURCES}"
    subprocess.run([compiler, *flags.split(), "-o", target, *map(str, arguments)], check=True)
    return target


class Emulated:
    """A library whose operators are computed by the CUDA kernels, on no machine that exists."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.emulated_launches.restype = ctypes.c_char_p

    def cluster(self) -> int:
        """How many blocks the largest cluster had since this was last asked."""
        return int(self._library.emulated_blocks_in_cluster())

    def launches(self) -> str:
        """The types of all kernels launched since this was last asked."""
        return str(self._library.emulated_launches().decode())


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    sources = [SOURCES / "entry.cc", SOURCES / "arguments.cc", HERE / "attend.cc"]
    # Little scratch memory, so that small problems are computed in several chunks.
    return Emulated(
        compile_library(
            tmp_path_factory.mktemp("emulated") / "libemulated.so",
            "-DONNX_TRICKS_SCRATCH_FLOATS=20000",
            *sources,
            HERE / "emulator.cc",
            *("-x", "c++", SOURCES / "cuda" / "attend.cu"),
        )
    )
