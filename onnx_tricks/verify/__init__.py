"""The proof that an optimised model computes what the original computes."""

from __future__ import annotations

from onnx_tricks.verify.parity import Verification, verify

__all__ = ["Verification", "verify"]
