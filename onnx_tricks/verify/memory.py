"""How much memory verification needs, and how much there is."""

from __future__ import annotations

import os
from pathlib import Path

from onnx_tricks.graph.load import load_model
from onnx_tricks.graph.traverse import initializers

__all__ = ["memory_shortage"]

# One model at a time is open. The float64 reference is the largest: the weights as they are in the
# file, and their doubles. Beside it are activations and outputs.
_DOUBLE = 8
_COPIES = 2
_BESIDE = 512 << 20


def memory_shortage(reference: Path, candidate: Path, limit: int | None) -> str:
    """Say why two models cannot be run whole, or "" where they can.

    Args:
        reference: One .onnx file.
        candidate: The other.
        limit: Bytes that may be used; None for what the machine has free.
    """
    needed = max(_session_bytes(path) for path in (reference, candidate)) + _BESIDE
    available = _free_bytes() if limit is None else limit
    if available is None or needed <= available:
        return ""
    return (
        f"running the models whole takes about {needed / 1e9:.1f} GB, "
        f"{available / 1e9:.1f} GB are free"
    )


def _session_bytes(path: Path) -> int:
    tensors = [value.const_value for value in initializers(load_model(path).model)]
    return sum(_DOUBLE * t.size + _COPIES * t.nbytes for t in tensors if t is not None)


def _free_bytes() -> int | None:
    """Free memory of the machine or, where that is less, of the container."""
    found = [_meminfo(), _container(), _physical()]
    known = [size for size in found if size is not None]
    return min(known, default=None)


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def _container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text("ascii"))
        # Pages of files count as used, but give way.
        statistics = dict(line.split() for line in (folder / "memory.stat").open("ascii"))
        return limit - int(statistics["anon"])
    except (KeyError, OSError, ValueError):
        return None


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
