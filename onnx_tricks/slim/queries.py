"""Queries of a layer as its operator reads them: [B, H, T, K], rotated.

Mostly they are there. Where a fused operator made them inside, they are written out; where they lie
in one product with keys and values that nothing needs any more, they get a product of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.shapes import dtype_of
from onnx_tricks.operators.body import rotate
from onnx_tricks.patterns.attention import Attention
from onnx_tricks.patterns.axes import Axes
from onnx_tricks.slim.repeat import repeat_on

__all__ = [
    "can_be_written",
    "has_own_product",
    "heads_first",
    "needs_angles",
    "query_weights",
    "write_query",
]

_Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
_END = 2**62


def has_own_product(view: Attention) -> bool:
    """Whether queries are to be projected anew.

    Keys lie in the same product, or a fused operator does more to what it reads than to split it.
    """
    query, keys = view.query.projection, view.keys.projection
    if query is None or query.linear is None:
        return False
    packed = keys is not None and keys.linear is not None and query.linear.node is keys.linear.node
    if not packed and (not view.query.inside or view.query.norm is not None):
        return False
    orders = (view.query.order, view.query.state_order)
    in_order = all(np.array_equal(one, np.arange(one.size)) for one in orders)
    arranged = all(_can_come_first(axes) for axes in _arrangements(view))
    straight = view.query.inside and view.query.norm is None
    return in_order and (straight or arranged)


def _arrangements(view: Attention) -> list[Axes]:
    query = view.query
    assert query.projection is not None
    return [query.projection.axes, query.axes if query.inside else query.state_axes]


def can_be_written(view: Attention) -> bool:
    """Whether `write_query` can write the queries of a view."""
    query = view.query
    return has_own_product(view) or _can_come_first(
        query.axes if query.inside else query.state_axes
    )


def needs_angles(view: Attention) -> bool:
    """Whether queries are still to be rotated."""
    rotary = view.query.rotary
    return rotary is not None and rotary.inside is not None


def query_weights(view: Attention) -> dict[str, _Array]:
    """The weights of the product that queries get: `query` [D, H K] and perhaps its bias."""
    projection = view.query.projection
    assert projection is not None
    found = {"query": projection.matrix()}
    bias = projection.bias()
    return found if bias is None else {**found, "query_bias": bias}


def write_query(
    build: Builder,
    view: Attention,
    weights: Mapping[str, ir.Value],
    angles: Mapping[str, ir.Value],
) -> ir.Value:
    """Write the queries of a view.

    Args:
        build: Makes the nodes.
        view: The layer.
        weights: Those of `query_weights`, where queries get a product of their own.
        angles: `cos` and `sin` [B or 1, S, R / 2] of all keys, the new tokens last.

    Returns:
        [B, H, T, K].
    """
    query = view.query
    if has_own_product(view):
        made = _project(build, view, weights)
    elif query.inside:
        made = heads_first(build, query.operand, query.axes, view.heads)
    else:
        return heads_first(build, query.state, query.state_axes, view.heads)
    if not needs_angles(view):
        return made
    assert query.rotary is not None
    tokens = build.Neg(build.Slice(build.Shape(made), [2], [3]))
    cos, sin = (build.Slice(angles[one], tokens, [_END], [1]) for one in ("cos", "sin"))
    return rotate(build, made, cos, sin, interleaved=query.rotary.interleaved)


def _project(build: Builder, view: Attention, weights: Mapping[str, ir.Value]) -> ir.Value:
    """Queries from their own product, and through all that happens to them."""
    query = view.query
    projection = query.projection
    assert projection is not None
    made = build.MatMul(projection.source, weights["query"])
    if "query_bias" in weights:
        made = build.Add(made, weights["query_bias"])
    shape = build.Shape(projection.source)
    sizes: dict[str, ir.Value | list[int]] = {
        "b": build.Slice(shape, [0], [1]),
        "s": build.Slice(shape, [1], [2]),
        "h": [view.heads],
        "k": [query.head_width],
    }
    made = build.Reshape(made, build.Concat(*sizes.values(), axis=0))
    if query.inside and query.norm is None:
        return build.Transpose(made, perm=[0, 2, 1, 3])
    letters = "".join(projection.axes)
    if letters != "bshk":
        made = build.Transpose(made, perm=["bshk".index(one) for one in letters])
    if len(projection.axes) < 4:
        lengths = [sizes.get(one, [-1]) for one in projection.axes]
        made = build.Reshape(made, build.Concat(*lengths, axis=0))
    given, before = (dtype_of(one) for one in (projection.output, projection.source))
    if None not in (given, before) and given != before:
        made = build.Cast(made, to=given)
    last, axes = query.state, query.state_axes
    if query.inside:
        last, axes = query.operand, query.axes
    (last,) = repeat_on(build, [last], projection.output, made)
    return heads_first(build, last, axes, view.heads)


def _can_come_first(axes: Axes) -> bool:
    """Whether heads arranged so can be told apart: an axis runs over h and one more, or one."""
    shared = [one for one in axes if len(one) > 1]
    return sorted("".join(axes)) == sorted("bhsk") and all(
        len(one) == 2 and "h" in one for one in shared
    )


def heads_first(build: Builder, value: ir.Value, axes: Axes, heads: int) -> ir.Value:
    """Heads in whatever arrangement as [B, H, T, K]."""
    letters = "".join(axes)
    assert _can_come_first(axes)
    if any(len(one) != 1 for one in axes):
        # An axis that runs over several things is split where its inner length is known.
        lengths: list[ir.Value] = []
        shape = build.Shape(value)
        for place, one in enumerate(axes):
            length = build.Slice(shape, [place], [place + 1])
            rest = length if len(one) < 2 else build.Div(length, [heads])
            lengths += [
                build.Identity(_vector(build, heads)) if letter == "h" and len(one) > 1 else rest
                for letter in one
            ]
        value = build.Reshape(value, build.Concat(*lengths, axis=0))
    perm = [letters.index(letter) for letter in "bhsk"]
    return value if perm == [0, 1, 2, 3] else build.Transpose(value, perm=perm)


def _vector(build: Builder, number: int) -> ir.Value:
    return build.Constant(value_ints=[number])
