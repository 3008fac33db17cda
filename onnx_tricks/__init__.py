"""onnx-tricks: rewrites the weights of transformer ONNX models, exactly.

The same function from fewer numbers and fewer reads. `optimize` does it all; `verify` proves that
two models compute the same.
"""

from __future__ import annotations

from onnx_tricks.errors import ModelError, ParityError, PassError, TricksError, UsageError
from onnx_tricks.export import export
from onnx_tricks.inspect import Inspection, inspect
from onnx_tricks.optimizer import Optimized, optimize
from onnx_tricks.passes import (
    PASSES,
    CancelNorm,
    CenterNorm,
    DeferNorm,
    FoldNorm,
    MergeSkipless,
    PrecomputeFirstLayer,
)
from onnx_tricks.report import PassReport, Report
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.verify import Verification, verify

__all__ = [
    "PASSES",
    "CancelNorm",
    "CenterNorm",
    "DeferNorm",
    "FoldNorm",
    "Inspection",
    "MergeSkipless",
    "ModelError",
    "Optimized",
    "ParityError",
    "Pass",
    "PassError",
    "PassReport",
    "PrecomputeFirstLayer",
    "Report",
    "Site",
    "Skip",
    "TricksError",
    "UsageError",
    "Verification",
    "export",
    "inspect",
    "optimize",
    "verify",
]
