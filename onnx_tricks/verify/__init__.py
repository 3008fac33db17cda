"""The proof that an optimised model computes what the original computes."""

from __future__ import annotations

from onnx_tricks.verify.parity import Verification, verify
from onnx_tricks.verify.sessions import load_runtime

__all__ = ["Verification", "load_runtime", "verify"]
