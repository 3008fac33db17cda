"""Heads of queries, keys or values: what an attention multiplies, and what it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.axes import Axes
from onnx_tricks.patterns.cache import Cache
from onnx_tricks.patterns.head_norm import HeadNorm
from onnx_tricks.patterns.projection import Projection
from onnx_tricks.patterns.rotary import Rotary

__all__ = ["Heads", "Operand"]

_Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclasses.dataclass(frozen=True)
class Operand:
    """What a product, or a fused operator, reads as heads.

    Attributes:
        value: The value.
        unpack: From an array of the value's shape to [..., S, K]: batch and heads in front.
    """

    value: ir.Value
    unpack: Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Heads:
    """Queries, keys or values of an attention.

    Attributes:
        operand: What the attention multiplies.
        axes: What its axes run over; "" for an axis of length one that stands for nothing.
        lead: What the axes in front of [S, K] run over, once unpacked.
        order: [N], which head each of the operand's is, for one row of the batch, in the order in
            which they lie in the operand: repeated heads have equal numbers.
        state: The heads before the last views and scaling: what a cache keeps, if there is one.
        state_axes: What the axes of `state` run over.
        state_order: Which head each of those in `state` is, as `order`.
        scale: `operand` is `scale` times `state`, apart from views, and from the rotation where
            that comes last.
        head_width: K.
        cache: The cache that they are read from, if any.
        rotary: The rotation they went through, if any.
        rotated_last: Whether a cache keeps them as they were before the rotation.
        norm: The norm they went through, if any; a text where that is more than an RMSNorm or a
            LayerNorm of each head or of all, or does not commute with the rotation before it.
        projection: The linear layer they come from; None where they are an input of the graph.
        input: The input of the graph that they are, where nothing computes them.
        inside: Whether a fused operator projects, rotates or appends them by itself, so that
            `operand` is what it reads.
    """

    operand: ir.Value
    axes: Axes
    lead: Axes
    order: _Indices
    state: ir.Value
    state_axes: Axes
    state_order: _Indices
    scale: float
    head_width: int
    cache: Cache | None = None
    rotary: Rotary | None = None
    rotated_last: bool = False
    norm: HeadNorm | str | None = None
    projection: Projection | None = None
    input: ir.Value | None = None
    inside: bool = False

    @property
    def heads(self) -> int:
        """G, the number of different heads."""
        return int(self.order.max()) + 1
