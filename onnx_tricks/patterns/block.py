"""One attention block as recognisers see it, however it is spelled."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.patterns.axes import Axes
from onnx_tricks.patterns.heads import Heads
from onnx_tricks.patterns.linear import Linear
from onnx_tricks.patterns.scores import Scores

__all__ = ["Attention", "OpaqueAttention"]


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention block: `softmax(scores(q k^T)) v`, head by head.

    Attributes:
        node: The node to look for in a graph viewer: the softmax or the fused operator.
        heads: H, the number of query heads.
        groups: [H], which key head each query head reads.
        query: The queries; they need not come from a known projection.
        keys: The keys.
        values: The values.
        cross: Whether keys and values come from another sequence than the queries.
        scores: What is done to the product of queries and keys before the softmax.
        safe: Whether rows in which everything is masked give zeros.
        weights: The attention weights; None inside a fused operator.
        context: Their product with the values, head by head or already merged.
        context_axes: What its axes run over; s are the tokens of the queries.
        merged: The context as [B, T, H V], or [B T, H V]; None where it is not arranged so.
        projection: The linear layer that alone reads `merged`, if there is one.
    """

    node: ir.Node
    heads: int
    groups: tuple[int, ...]
    query: Heads
    keys: Heads
    values: Heads
    cross: bool
    scores: Scores
    safe: bool
    weights: ir.Value | None
    context: ir.Value
    context_axes: Axes
    merged: ir.Value | None
    projection: Linear | None

    @property
    def key_heads(self) -> int:
        """G, the number of different key heads."""
        return self.keys.heads

    @property
    def head_width(self) -> int:
        """K, the number of channels of a query and of a key."""
        return self.keys.head_width

    @property
    def value_width(self) -> int:
        """V, the number of channels of one head's values."""
        return self.values.head_width


@dataclasses.dataclass(frozen=True)
class OpaqueAttention:
    """An attention block that is not understood."""

    node: ir.Node
    reason: str
