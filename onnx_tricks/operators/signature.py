"""What the operators take and return: the contract between models, bodies and native kernels.

Dimensions: B batch, T new tokens, P cached tokens, S = P + T, H heads in G groups that share keys,
K width of a key head, E = G K, V width of a value head, D width of what is cached whole,
r width of the residual, R number of rotated channels of a key head.

SlimAttention          caches keys before norm and rotation, and r values of a residual beside them:
                       V = [keys | residual] @ value_weight. What queries meet is
                       rotate(norm(keys + key_bias) * key_gain + key_shift)
SlimHiddenAttention    caches the layer's input x: K = x @ key_weight^T, V = x @ value_weight
SlimCrossAttention     reads the states of an encoder, which nothing is appended to

Native kernels (`onnx_tricks.runtime.op_library_path`) take past states also as buffers of some
capacity C >= S, bound as past and present alike: the first P rows count, and only the new ones are
written. S is then the length of cos or, without rotation, of the bias; P = S - T, and the present
has the shape of the past. The bodies know no such buffers: to them P is the length of the past.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import onnx_ir as ir

__all__ = [
    "DOMAIN",
    "INPUTS",
    "KEY_NORMS",
    "OUTPUTS",
    "STATE_KEY",
    "VERSION",
    "Form",
    "KeyNorm",
]

DOMAIN = "onnx_tricks"
VERSION = 1
STATE_KEY = "onnx_tricks.state"
"""Metadata of a model whose caches differ from those it was exported with: their layout."""

INPUTS = {
    "SlimAttention": (
        "query",  # [B, H, T, K], rotated
        "key",  # [B, G, T, K], before norm and rotation and without bias
        "past_key",  # [B, G, P, K]
        "value_weight",  # [G, E + r, V]
        "cos",  # [B or 1, S, R / 2]
        "sin",  # [B or 1, S, R / 2]
        "bias",  # broadcasts to [B, H, T, S]; added to the scores
        "residual",  # [B, T, r]
        "past_residual",  # [B, P, r]
        "key_bias",  # [G, 1, K]; added before norm and rotation
        "value_bias",  # [H, 1, V]
        "key_gain",  # [G, 1, K]; multiplied after the norm; only where there is one
        "key_shift",  # [G, 1, K]; added after the gain; likewise
    ),
    "SlimHiddenAttention": (
        "query",  # [B, H, T, K]
        "hidden",  # [B, T, D]
        "past_hidden",  # [B, P, D]
        "key_weight",  # [G, K, D]
        "value_weight",  # [G, D, V]
        "bias",
        "value_bias",
    ),
    "SlimCrossAttention": (
        "query",
        "hidden",  # [B, S, D]
        "key_weight",
        "value_weight",
        "bias",
        "value_bias",
    ),
}
"""Inputs in order. Those that the nodes of a model do not have are left empty."""

OUTPUTS = {
    "SlimAttention": (
        "output",  # [B, T, H V]
        "present_key",  # [B, G, S, K]
        "present_residual",  # [B, S, r]
    ),
    "SlimHiddenAttention": ("output", "present_hidden"),  # [B, S, D]
    "SlimCrossAttention": ("output",),
}
"""Outputs in order. Attributes are `scale`, `softcap` where scores are capped, `key_epsilon` where
keys are normalised, and what a native kernel cannot see in a body: `interleaved` and `safe`, as
`Form` has them; and for keys that are normalised `key_norm`, 1 for those of each head and 2 for
those of all heads together, and `key_centered`, whether their mean is taken off."""

KeyNorm = Literal["", "head", "heads"]
KEY_NORMS: dict[KeyNorm, int] = {"": 0, "head": 1, "heads": 2}
"""The numbers that the attribute `key_norm` has for them."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What all nodes of one operator in a model have in common, since they share a body.

    Attributes:
        opset: Version of the default domain, at least 13.
        dtype: Type of queries, weights, bias and output.
        cache: Type of the cached states.
        inputs: Which of the inputs the nodes have.
        softcap: Whether scores are capped, `softcap * tanh(scores / softcap)`.
        interleaved: Whether neighbouring channels are rotated together, not those of two halves.
        safe: Whether a row in which everything is masked (minus infinity) gives zeros.
        norm: What keys are normalised over, if at all: each head, or all heads of a token.
        centered: Whether that norm takes off the mean.
    """

    opset: int
    dtype: ir.DataType
    cache: ir.DataType
    inputs: frozenset[str]
    softcap: bool = False
    interleaved: bool = False
    safe: bool = False
    norm: KeyNorm = ""
    centered: bool = False
