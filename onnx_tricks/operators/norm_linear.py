"""NormLinear: linear layers that take the statistic of an RMSNorm along while they multiply.

    y = (x W) * s + b      s = 1 / sqrt(mean(x^2) + epsilon)

It is what defer-norm prepares for: one reading of x serves the products and the sum of squares, and
neither waits for the other. So far it is a signature: no kernel computes it, and no pass writes it.

What a kernel has to reach, by `benchmarks/defer_norm.py` (results/2026-11-22-defer-norm.txt: ONNX
Runtime 1.31 on one core, D 576 to 2048, q, k, v and gate, up): a norm and its products take 0.98 to
1.02 times as long as the products alone for 512 tokens, and 0.98 to 1.14 times for one, the most at
D 576. A kernel that multiplies slower than the runtime's own by more than that loses, which leaves
nothing to gain on prompts and some per cent in decode steps of narrow models. In plain ONNX the
deferred norm takes 0.97 to 1.08 times as long as the fused one: no reason to write it by default.

On GPUs it saves a launch and a trip through memory. In arXiv:2407.09577 norm and projection take 33
to 35 % less time on a T4 (576 x 960, 4096 tokens and more), and 12 to 14 % at 4096 x 4096; a fused
decode kernel on an H100 takes 17 to 51 % less than FlashInfer and cuBLAS up to D 2048 and more than
them at 4096. Those are the figures to match.
"""

from __future__ import annotations

__all__ = ["ATTRIBUTES", "INPUTS", "NAME", "OUTPUTS"]

NAME = "NormLinear"

INPUTS = (
    "rows",  # x [..., D]
    "weight",  # W [D, F]; those of all layers that read the norm side by side
    "bias",  # b [F], or empty; added after the division
    "scale",  # s [..., 1] of an operator that reads the same rows, or empty to compute it
)
"""Inputs in order, all of one type. Half types are multiplied and summed up in float32: products
of rows that have not been divided leave the range of float16."""

OUTPUTS = (
    "output",  # y [..., F]
    "scale",  # s [..., 1] float32, for others; may be left out
)
"""Outputs in order."""

ATTRIBUTES = ("epsilon",)
"""The number added to the mean square, a float."""
