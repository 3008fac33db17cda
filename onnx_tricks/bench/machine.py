"""What times are measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

from onnx_tricks.runtime.library import find_library
from onnx_tricks.runtime.sessions import load_runtime

__all__ = ["describe_machine"]

_PROCESSORS = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, str]:
    """Name processor, cores and versions, and what runs our operators: "library" or "functions"."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "onnxruntime": load_runtime().__version__,
        "operators": "functions" if find_library() is None else "library",
        "onnx-tricks": importlib.metadata.version("onnx-tricks"),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _processor() -> str:
    """The processor by its brand, where the system tells it."""
    text = _PROCESSORS.read_text(encoding="utf-8") if _PROCESSORS.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()
