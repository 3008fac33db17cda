"""Models to try the tricks on: the embedded demo model and recipes for reference models.

Only the demo model is free of dependencies. The recipes (`trained`, `families`, `export`,
`recipes`) need PyTorch, Transformers and the exporters: ``pip install --group exporters``.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

__all__ = ["demo_path"]


def demo_path() -> Path:
    """Returns the directory of the embedded demo model.

    It is a byte-level Llama (4 layers, width 192, 6 heads, 256 tokens, fp32) trained on Python
    sources and exported by Optimum with a key/value cache: ``model.onnx`` with its configs.
    """
    # By way of a file: where links show an editable install twice, a folder is ambiguous.
    return Path(str(importlib.resources.files(__name__) / "demo" / "model.onnx")).parent
