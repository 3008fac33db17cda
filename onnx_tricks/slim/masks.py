"""What fused operators mask by themselves, written out: later tokens, padding, a window."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.attention import Attention
from onnx_tricks.slim.dependence import is_computed_from
from onnx_tricks.slim.positions import find_mask

__all__ = ["Masks", "masks_inside", "unclear_mask"]


def masks_inside(view: Attention) -> bool:
    """Whether a fused operator masks anything by itself."""
    scores = view.scores
    inputs = scores.lengths is not None or scores.padding is not None
    return inputs or scores.causal or scores.window is not None


def unclear_mask(view: Attention, mask: ir.Value | None) -> str:
    """Why what an operator masks cannot be written out; empty when it can.

    Args:
        view: The layer.
        mask: The model's attention mask.
    """
    scores = view.scores
    if scores.floor is not None:
        return "clips scores from below"
    if view.node.domain == "" and (scores.causal or scores.window is not None):
        return (
            "masks later tokens by itself, which versions of ONNX Runtime place differently behind "
            "a past: export it with the mask as an input"
        )
    if scores.lengths is not None and not (mask and is_computed_from(scores.lengths, mask)):
        return "masks by lengths that are not counted along an attention mask"
    if scores.padding is not None and rank_of(scores.padding) != 2:
        return "masks by lengths"
    return ""


class Masks:
    """Makes masks, once for the layers of a graph that share them.

    Args:
        model: The model.
    """

    def __init__(self, model: ir.Model) -> None:
        self._mask = find_mask(model)
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def of(
        self, build: Builder, view: Attention, query: ir.Value, states: Mapping[str, ir.Value]
    ) -> ir.Value | None:
        """What a token may see, bool, broadcasting to [B, H, T, S]; None for everything.

        Args:
            build: Makes the nodes, in front of the first layer that needs them.
            view: The layer.
            query: [B, H, T, K].
            states: The inputs that carry states, by the operator's names.
        """
        if not masks_inside(view):
            return None
        scores = view.scores
        key = (view.node.graph, scores.causal, scores.window, scores.lengths, scores.padding)
        if key not in self._made:
            self._made[key] = self._visible(build, view, query, states)
        return self._made[key]

    def _visible(
        self, build: Builder, view: Attention, query: ir.Value, states: Mapping[str, ir.Value]
    ) -> ir.Value:
        scores, parts = view.scores, []
        if scores.causal or scores.window is not None:
            new = build.Slice(build.Shape(query), [2], [3])
            past = _past_length(build, states)
            parts += _order(build, past, new, scores.window)
        padding = self._mask if scores.lengths is not None else scores.padding
        if padding is not None:
            real = build.Cast(padding, to=ir.DataType.BOOL)
            parts.append(build.Unsqueeze(real, [1, 2]))
        visible = parts[0]
        for part in parts[1:]:
            visible = build.And(visible, part)
        return visible


def _past_length(build: Builder, states: Mapping[str, ir.Value]) -> ir.Value | list[int]:
    """P as a tensor [1]."""
    for name, axis in (("past_key", 2), ("past_hidden", 1)):
        if name in states:
            return build.Slice(build.Shape(states[name]), [axis], [axis + 1])
    return [0]


def _order(
    build: Builder, past: ir.Value | list[int], new: ir.Value, window: int | None
) -> list[ir.Value]:
    """Which keys come before each query, and which are not too far back, [T, S] each."""
    zero, one = np.asarray(0, dtype=np.int64), np.asarray(1, dtype=np.int64)
    whole = build.Add(past, new)
    keys = build.Range(zero, build.Squeeze(whole, [0]), one)
    queries = build.Range(build.Squeeze(past, [0]), build.Squeeze(whole, [0]), one)
    rows = build.Unsqueeze(queries, [1])
    parts = [build.LessOrEqual(keys, rows)]
    if window is not None:
        # As ONNX Runtime 1.31 counts: the token itself is one of them. 1.22 showed one more.
        parts.append(build.Greater(keys, build.Sub(rows, [window])))
    return parts
