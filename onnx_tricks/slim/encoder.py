"""The states of an encoder, and what a decoder does to them once before its layers read them.

Where widths differ, decoders project the states first, and some then zero the rows of padding. Both
go into the weights of the layers: keys and values are linear in the states themselves, with the
mask as one more channel where the projection has a bias.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.linear import Linear
from onnx_tricks.patterns.projection import bias_of, linear_behind, matrix_of

__all__ = ["Encoded", "find_encoded"]

_SAME = frozenset(("Cast", "Dropout", "Identity"))
_MAX_NODES = 8
_Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What the keys and values of cross-attention are made from.

    Attributes:
        states: The input that an encoder's states come in by, [B, S, E].
        linear: The layer that projects them, if one does.
        mask: The input [B, S] that rows are multiplied with after that, if they are.
    """

    states: ir.Value
    linear: Linear | None = None
    mask: ir.Value | None = None

    @property
    def direct(self) -> bool:
        """Whether the states are read as they come."""
        return self.linear is None and self.mask is None

    @property
    def _marked(self) -> bool:
        """Whether the mask is a channel of its own: what a bias gives is masked, too."""
        return (
            self.mask is not None and self.linear is not None and bias_of(self.linear) is not None
        )

    def behind(self, weight: _Array, bias: _Array) -> tuple[_Array, _Array]:
        """The weights [E or E + 1, N] and the bias [N] of a layer that reads what `write` writes.

        Args:
            weight: Those of the layer that reads the states as they are changed, [D, N].
            bias: Its bias, [N].
        """
        if self.linear is None:
            return weight, bias
        matrix, row = matrix_of(self.linear).astype(np.float64), bias_of(self.linear)
        if row is None:
            return matrix @ weight, bias
        if self._marked:
            return np.concatenate([matrix, row[None]]) @ weight, bias
        return matrix @ weight, row @ weight + bias

    def write(self, build: Builder, dtype: ir.DataType) -> ir.Value:
        """The states as layers are to read them, [B, S, E or E + 1].

        Args:
            build: Makes the nodes.
            dtype: Their type.
        """
        value = self.states
        if value.dtype != dtype:
            value = build.Cast(value, to=dtype)
        if self.mask is None:
            return value
        mask = build.Unsqueeze(build.Cast(self.mask, to=dtype), [2])
        value = build.Mul(value, mask)
        return build.Concat(value, mask, axis=-1) if self._marked else value


def find_encoded(source: ir.Value) -> Encoded | None:
    """Find the encoder's states behind the value that keys and values of a layer are made from.

    Args:
        source: The value, [B, S, D].

    Returns:
        What is done to the states on the way; None where it is more than `Encoded` tells.
    """
    value, linear, mask = source, None, None
    for _ in range(_MAX_NODES):
        if value.is_graph_input():
            return Encoded(value, linear, mask)
        node, layer = value.producer(), linear_behind(value)
        operand: ir.Value | None = None
        if layer is not None and linear is None:
            linear, operand = layer, layer.node.inputs[0]
        elif node is None or node.domain != "":
            return None
        elif node.op_type in _SAME:
            operand = node.inputs[0]
        elif node.op_type == "Mul" and mask is None and linear is None:
            masks = [_row_mask(one) for one in node.inputs]
            if masks.count(None) != 1:
                return None
            operand, mask = node.inputs[masks.index(None)], next(one for one in masks if one)
        if operand is None:
            return None
        value = operand
    return None


def _row_mask(value: ir.Value | None) -> ir.Value | None:
    """The input [B, S] of which a factor [B, S, 1] has one number for each row."""
    widened = False
    for _ in range(_MAX_NODES):
        node = None if value is None else value.producer()
        if value is None or node is None or node.domain != "":
            break
        if node.op_type == "Unsqueeze" and not widened:
            axes = evaluate(node.inputs[1])
            widened = axes is not None and axes.tolist() in ([-1], [2])
            if not widened:
                return None
        elif node.op_type not in _SAME:
            return None
        value = node.inputs[0]
    is_mask = value is not None and value.is_graph_input() and rank_of(value) == 2
    return value if is_mask and widened else None
