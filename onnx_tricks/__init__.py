"""onnx-tricks: rewrites the weights of transformer ONNX models, exactly.

The same function from fewer numbers and fewer reads. `optimize` does it all; `verify` proves that
two models compute the same.
"""

from __future__ import annotations

from onnx_tricks.errors import ModelError, ParityError, PassError, TricksError, UsageError
from onnx_tricks.optimizer import Optimized, optimize
from onnx_tricks.passes import PASSES, FoldNorm
from onnx_tricks.report import PassReport, Report
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.verify import Verification, verify

__all__ = [
    "PASSES",
    "FoldNorm",
    "ModelError",
    "Optimized",
    "ParityError",
    "Pass",
    "PassError",
    "PassReport",
    "Report",
    "Site",
    "Skip",
    "TricksError",
    "UsageError",
    "Verification",
    "optimize",
    "verify",
]
