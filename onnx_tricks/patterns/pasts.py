"""Graph inputs that hold keys or values of earlier steps: what is appended to, and where.

Nothing here asks for names or sizes of axes. What tells a past is that new keys or values are
appended to it, perhaps behind views of it: a Cast, where a model computes in another type than it
is fed in, or a transposition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.shapes import rank_of

__all__ = ["VIEWS", "Past", "appended", "find_pasts", "input_behind", "is_lone", "past_behind"]

VIEWS = frozenset("Cast Identity Reshape Squeeze Transpose Unsqueeze".split())
"""Operators that show the numbers of a cache in another way."""

_MAX_NODES = 30
_FUSED = {
    ("", "Attention"): (4, 5),
    ("com.microsoft", "Attention"): (4,),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): (5, 6),
    ("com.microsoft", "GroupQueryAttention"): (3, 4),
    ("com.microsoft", "MultiHeadAttention"): (6, 7),
}
"""Operators that append by themselves, and which of their inputs are pasts."""


@dataclasses.dataclass(frozen=True)
class Past:
    """A view of a graph input.

    Attributes:
        source: The input.
        rank: Its number of axes.
        axes: By axis of the view, which axis of the input it is; None where it is none of them.
    """

    source: ir.Value
    rank: int
    axes: tuple[int | None, ...]


def past_behind(view: ir.Value | None) -> Past | None:
    """The input that a value is a view of, axis by axis; None where that cannot be told."""
    nodes: list[ir.Node] = []
    source = input_behind(view, nodes)
    rank = None if source is None else rank_of(source)
    if source is None or rank is None:
        return None
    axes: list[int | None] = list(range(rank))
    for node in reversed(nodes):
        moved = _moved(node, axes)
        if moved is None:
            return None
        axes = moved
    return Past(source, rank, tuple(axes))


def _moved(node: ir.Node, axes: list[int | None]) -> list[int | None] | None:
    """The axes behind a view."""
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm") or range(len(axes))[::-1]
        return [axes[one] for one in perm]
    if node.op_type == "Gather":
        place, index = node.attributes.get_int("axis", 0) % len(axes), evaluate(node.inputs[1])
        return None if index is None else [*axes[:place], *[None] * index.ndim, *axes[place + 1 :]]
    if node.op_type in ("Squeeze", "Unsqueeze"):
        chosen = evaluate(node.inputs[1]) if len(node.inputs) > 1 else None
        if chosen is None:
            return None
        left = list(axes)
        if node.op_type == "Squeeze":
            gone = {int(one) % len(axes) for one in chosen}
            return [one for place, one in enumerate(axes) if place not in gone]
        for place in sorted(int(one) % (len(axes) + len(chosen)) for one in chosen):
            left.insert(place, None)
        return left
    return None if node.op_type == "Reshape" else axes


def find_pasts(model: ir.Model) -> dict[ir.Value, int]:
    """The inputs that new keys or values are appended to, each with the axis along which."""
    found: dict[ir.Value, int] = {}
    for view, axis in _appending(model):
        past = past_behind(view)
        if past is not None and len(past.axes) > 2:
            grown = past.axes[axis]
            if grown is not None:
                found[past.source] = grown
    return found


def _appending(model: ir.Model) -> Iterator[tuple[ir.Value, int]]:
    """Values that something is appended to, and the axis."""
    for node in model.graph.all_nodes():
        if appended(node) is not None and node.inputs[0] is not None:
            yield node.inputs[0], node.attributes["axis"].as_int()
        for index in _FUSED.get((node.domain, node.op_type), ()):
            past = node.inputs[index] if index < len(node.inputs) else None
            if past is not None:
                yield from ((one, -2) for one in _parts(past))


def _parts(past: ir.Value) -> list[ir.Value]:
    """A past, or the keys and the values that one is put together from."""
    node = past.producer()
    if node is None or node.op_type != "Concat" or node.domain != "":
        return [past]
    return [one for one in node.inputs if one is not None]


def appended(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The graph input and what a Concat appends to it; None for any other node."""
    if node.op_type != "Concat" or node.domain != "" or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    source = input_behind(past)
    if source is None or new is None or input_behind(new) is not None:
        return None
    return source, new


def is_lone(node: ir.Node) -> bool:
    """Whether a node joins one value with nothing, as tracers write a cache that is empty."""
    return node.op_type == "Concat" and node.domain == "" and len(node.inputs) == 1


def input_behind(value: ir.Value | None, nodes: list[ir.Node] | None = None) -> ir.Value | None:
    """The graph input that a value is a view of.

    Args:
        value: The value.
        nodes: Gets the nodes between, the last first.
    """
    for _ in range(_MAX_NODES):
        if value is None or value.is_graph_input():
            break
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type not in {*VIEWS, "Gather", "Split"} and not is_lone(node):
            return None
        if nodes is not None:
            nodes.append(node)
        value = node.inputs[0]
    return value
