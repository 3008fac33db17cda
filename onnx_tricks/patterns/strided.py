"""Rows picked out of all numbers of a value by places worked out from strides (as_strided)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.patterns.channels import Channels, Moved
from onnx_tricks.patterns.layout import Length

__all__ = ["picked_whole"]

_Numbers = np.ndarray[Any, np.dtype[Any]]
_FORMS = frozenset("Cast Expand Identity Reshape Squeeze Unsqueeze".split())
_MAX_DEPTH = 16


def picked_whole(node: ir.Node, channels: Channels) -> Moved | None:
    """Follow channels that lie side by side, row after row, on one axis that is picked from.

    Args:
        node: The reader.
        channels: Where they lie in its first input.

    Returns:
        Where they lie now, if the index picks all channels of a row in their order; else None.
    """
    width = channels.width
    if node.op_type != "Gather" or channels.inner != Length() or channels.axis != -1:
        return None
    if node.attributes.get_int("axis", 0) not in (0, -1) or node.inputs[1] is None:
        return None
    # Of a number's place only what is left after whole rows tells its channel.
    places = _remainders(node.inputs[1], width, 0)
    wide = [] if places is None else [i for i, n in enumerate(places.shape) if n != 1]
    if places is None or len(wide) != 1 or not np.array_equal(places.ravel(), np.arange(width)):
        return None
    axis = wide[0] - places.ndim
    return [(node.outputs[0], dataclasses.replace(channels, axis=axis, inner=None))]


def _remainders(index: ir.Value, width: int, depth: int) -> _Numbers | None:
    """What is left of whole numbers after division by a width, in a shape that broadcasts."""
    array = evaluate(index)
    node = index.producer()
    if array is not None:
        return array % width if array.dtype.kind == "i" else None
    if node is None or node.domain != "" or depth > _MAX_DEPTH:
        return None
    operands = [one for one in node.inputs if one is not None]
    if node.op_type in _FORMS:
        inner = _remainders(operands[0], width, depth + 1)
        return inner if inner is not None and inner.ndim == 0 else None
    if node.op_type not in ("Add", "Mul"):
        return None
    found = [_remainders(one, width, depth + 1) for one in operands]
    if node.op_type == "Mul":
        rows = any(one is not None and not np.any(one) for one in found)
        return np.zeros((), dtype=np.int64) if rows else None
    left, right = found
    return None if left is None or right is None else (left + right) % width
