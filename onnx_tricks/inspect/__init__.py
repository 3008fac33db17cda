"""Is it worth it for my model? What each trick removes, adds and saves, with nothing written."""

from __future__ import annotations

from onnx_tricks.inspect.inspection import Inspection, Trick
from onnx_tricks.inspect.inspector import inspect

__all__ = ["Inspection", "Trick", "inspect"]
