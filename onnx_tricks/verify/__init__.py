"""The proof that an optimised model computes what the original computes."""

from __future__ import annotations

from onnx_tricks.verify.given import Inputs, Sample, read_samples, share_out
from onnx_tricks.verify.parity import Verification, verify

__all__ = ["Inputs", "Sample", "Verification", "read_samples", "share_out", "verify"]
