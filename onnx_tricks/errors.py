"""The exceptions of onnx-tricks. Every message says what happened, where, and what to do."""

from __future__ import annotations

from typing import Any

__all__ = ["ModelError", "ParityError", "PassError", "TricksError", "UsageError"]


class TricksError(Exception):
    """Base class of all errors that onnx-tricks raises on purpose."""


class UsageError(TricksError):
    """The call itself is wrong: an unknown pass, an output that cannot be written."""


class ModelError(TricksError):
    """The input is not a model that can be optimised: not ONNX, truncated, missing data."""


class PassError(TricksError):
    """A pass broke an invariant; this is a defect of onnx-tricks, not of the model."""


class ParityError(TricksError):
    """The optimised model does not compute what the original computes.

    Attributes:
        report: The `onnx_tricks.Report` of the run.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report
