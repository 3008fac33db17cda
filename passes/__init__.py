"""The passes of onnx-tricks, one module each, in the order in which they run."""

from __future__ import annotations

from onnx_tricks.passes.cancel_norm import CancelNorm
from onnx_tricks.passes.center_norm import CenterNorm
from onnx_tricks.passes.defer_norm import DeferNorm
from onnx_tricks.passes.fold_norm import FoldNorm
from onnx_tricks.passes.merge_skipless import MergeSkipless
from onnx_tricks.passes.precompute_first_layer import PrecomputeFirstLayer
from onnx_tricks.passes.slim_attention import SlimAttention
from onnx_tricks.rewrite import Pass

__all__ = [
    "PASSES",
    "CancelNorm",
    "CenterNorm",
    "DeferNorm",
    "FoldNorm",
    "MergeSkipless",
    "PrecomputeFirstLayer",
    "SlimAttention",
]

# Centring comes first: it leaves RMSNorms with gain and bias, which folding makes plain; and a
# table that folding has scaled for the sake of a tied head could no longer be centred. A norm is
# cancelled without a trace once its gain has been folded. Slim attention reads key weights with the
# gain folded in, and those of the first layer before a table takes their place. Layers merge before
# that: operators that read the rows between them would keep them apart. Last come divisions that
# move behind linear layers, where no other pass would know a norm by them.
PASSES: tuple[type[Pass], ...] = (
    CenterNorm,
    FoldNorm,
    CancelNorm,
    MergeSkipless,
    SlimAttention,
    PrecomputeFirstLayer,
    DeferNorm,
)
