"""Graph inputs that hold keys or values of earlier steps: what is appended to, and where.

Nothing here asks for names or sizes of axes. What tells a past is that new keys or values are
appended to it, perhaps behind views of it: a Cast, where a model computes in another type than it
is fed in, or a transposition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.graph.traverse import inner_graphs

__all__ = [
    "VIEWS",
    "Growth",
    "Past",
    "appended",
    "find_buffers",
    "find_pasts",
    "input_behind",
    "is_lone",
    "leaving",
    "past_behind",
    "writes_buffer",
]

VIEWS = frozenset("Cast Identity Reshape Squeeze Transpose Unsqueeze".split())
"""Operators that show the numbers of a cache in another way."""

_MAX_NODES = 30
_FUSED = {
    ("", "Attention"): ((4, 1), (5, 2)),
    ("com.microsoft", "Attention"): ((4, 1),),
    ("com.microsoft", "DecoderMaskedMultiHeadAttention"): ((5, 1), (6, 2)),
    ("com.microsoft", "GroupQueryAttention"): ((3, 1), (4, 2)),
    ("com.microsoft", "MultiHeadAttention"): ((6, 1), (7, 2)),
}
"""Operators that append by themselves: which inputs are pasts, and the outputs they become."""


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
        given = node.attributes.get_ints("axes")  # as it was before opset 13
        chosen = evaluate(node.inputs[1]) if len(node.inputs) > 1 else given
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


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a graph input grows.

    Attributes:
        axis: Of the input, along which something is appended.
        output: The graph output by which both together leave; None where none is theirs alone.
        read: Whether anything is computed of both together.
    """

    axis: int
    output: ir.Value | None
    read: bool


def find_pasts(model: ir.Model) -> dict[ir.Value, Growth]:
    """The inputs that new keys or values are appended to."""
    found: dict[ir.Value, Growth] = {}
    holders = _holders(model)
    for view, axis, whole in _appending(model):
        past = past_behind(view)
        if past is None or len(past.axes) < 3:
            continue
        grown, before = past.axes[axis], found.get(past.source)
        left = None if whole is None else leaving(whole, holders)
        if grown is not None:
            # The same may be appended twice, to be read and to leave.
            output = left[1] if left is not None else before.output if before else None
            read = whole is None or _is_read(whole) or (before is not None and before.read)
            found[past.source] = Growth(grown, output, read)
    return found


def find_buffers(model: ir.Model) -> dict[ir.Value, ir.Value]:
    """The inputs of a fixed length that keys or values are written into, and how they leave."""
    found: dict[ir.Value, ir.Value] = {}
    holders = _holders(model)
    for node in model.graph.all_nodes():
        past = past_behind(node.inputs[0]) if writes_buffer(node) else None
        left = None if past is None else leaving(node.outputs[0], holders)
        if past is None or left is None or past.rank < 3:
            continue
        shape = past.source.shape
        open_axes = 0 if shape is None else sum(not isinstance(dim, int) for dim in shape)
        if open_axes < 2 and _is_read(node.outputs[0]):  # the batch may be open, but no length
            found[past.source] = left[1]
    return found


def _is_read(value: ir.Value) -> bool:
    """Whether anything is computed of a value, apart from views of it and its shape."""
    pending = [value]
    while pending:
        one = pending.pop()
        node = one.producer()
        if node is not None and (node.domain, node.op_type) in _FUSED:
            return True
        for reader in one.consumers():
            if reader.domain != "" or not (reader.op_type in VIEWS or is_lone(reader)):
                if reader.op_type != "Shape":
                    return True
            else:
                pending += reader.outputs
    return False


def writes_buffer(node: ir.Node) -> bool:
    """Whether a node puts something in the place of parts of a graph input."""
    return (
        node.domain == ""
        and node.op_type in ("ScatterElements", "ScatterND", "TensorScatter")
        and input_behind(node.inputs[0]) is not None
    )


def leaving(
    value: ir.Value, holders: Mapping[ir.Graph, ir.Node]
) -> tuple[ir.Value, ir.Value] | None:
    """A view of a value by which it leaves its graph, and the output of the main graph it is.

    Args:
        value: The value.
        holders: By inner graph, the node that holds it.
    """
    pending = [value]
    for _ in range(_MAX_NODES):
        if not pending:
            return None
        value = pending.pop(0)
        if value.is_graph_output():
            outer = _outer(value, holders)
            if outer is not None:
                return value, outer
        pending += [
            reader.outputs[0]
            for reader in value.consumers()
            if reader.domain == ""
            and (reader.op_type in VIEWS or is_lone(reader))
            and reader.inputs[0] is value
        ]
    return None


def _outer(value: ir.Value, holders: Mapping[ir.Graph, ir.Node]) -> ir.Value | None:
    """The output of the main graph that an output of any graph becomes, or is a view of."""
    graph = value.graph
    if graph not in holders:
        return value
    assert isinstance(graph, ir.Graph)
    if holders[graph].op_type != "If":
        return None  # what a loop returns is not what its body does
    place = next(i for i, output in enumerate(graph.outputs) if output is value)
    found = leaving(holders[graph].outputs[place], holders)
    return None if found is None else found[1]


def _holders(model: ir.Model) -> dict[ir.Graph, ir.Node]:
    return {inner: node for node in model.graph.all_nodes() for inner in inner_graphs(node)}


def _appending(model: ir.Model) -> Iterator[tuple[ir.Value, int, ir.Value | None]]:
    """Values that something is appended to, the axis, and both together."""
    for node in model.graph.all_nodes():
        if appended(node) is not None and node.inputs[0] is not None:
            yield node.inputs[0], node.attributes["axis"].as_int(), node.outputs[0]
        for index, place in _FUSED.get((node.domain, node.op_type), ()):
            past = node.inputs[index] if index < len(node.inputs) else None
            whole = node.outputs[place] if place < len(node.outputs) else None
            if past is not None:
                yield from ((one, -2, whole) for one in _parts(past))


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
