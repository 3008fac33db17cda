"""The passes of onnx-tricks, one module each, in the order in which they run."""

from __future__ import annotations

from onnx_tricks.passes.fold_norm import FoldNorm
from onnx_tricks.rewrite import Pass

__all__ = ["PASSES", "FoldNorm"]

PASSES: tuple[type[Pass], ...] = (FoldNorm,)
