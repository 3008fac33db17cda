"""The emulator tells what a GPU would do wrong, or not at all."""

from __future__ import annotations

import ctypes

import pytest

from tests.native.cuda.conftest import HERE, compile_library


def test_the_emulator_notices_faults(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("faults") / "libfaults.so"
    library = ctypes.CDLL(str(compile_library(path, HERE / "faults.cc", HERE / "emulator.cc")))
    library.run_fault.restype = ctypes.c_char_p
    told = {
        "nothing": "",
        "copy": "",
        "barrier": "wrong numbers",
        "wait": "wrong numbers",
        "alignment": "an address is not aligned",
        "bounds": "memory was read or written where there is none",
        "alone": "threads wait for each other, or for some that have ended",
        "block": "no such block in the cluster",
    }
    assert {name: library.run_fault(name.encode()).decode() for name in told} == told
