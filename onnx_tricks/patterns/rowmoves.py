"""Operators that arrange the numbers of tokens, pick some, or repeat them; and how nodes are read.

Each rule maps the layouts of a node's inputs to those of its outputs, or to None where tokens may
mix or the rule cannot tell. A constant has a layout without symbols. Whether the symbols of the
result are each there exactly once is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.patterns.layout import (
    Axis,
    Layout,
    Length,
    axis_of,
    inner_size,
    length_of,
    regroup,
    replaced,
    symbols,
)
from onnx_tricks.patterns.lengths import Sizes

__all__ = ["MOVES", "MOVE_RULES", "Result", "Rule", "View"]


class View:
    """A node with what is known of its inputs.

    Attributes:
        node: The node.
        layouts: Layouts of its inputs; None for an absent one.
        sizes: Inputs that are lengths, where they are.
        fixed: Lengths of symbols, where the model fixes them.
        opset: Version of the default domain.
    """

    def __init__(
        self,
        node: ir.Node,
        layouts: Sequence[Layout | None],
        sizes: Sequence[Sizes | None],
        fixed: Mapping[str, int],
        opset: int,
    ) -> None:
        self.node, self.layouts, self.sizes = node, layouts, sizes
        self.fixed, self.opset = fixed, opset

    def given(self, index: int) -> bool:
        """Whether an input is present."""
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def axis(self, default: int | None, rank: int) -> int:
        """The attribute `axis`, counted from the front."""
        axis = self.node.attributes.get_int("axis", default)
        assert axis is not None
        return axis % rank if rank else 0

    def axes(self, index: int) -> tuple[int, ...] | None:
        """Axes given as attribute or as an input; None where they are not known."""
        given = self.node.attributes.get_ints("axes")
        if given is not None:
            return tuple(given)
        return self.integers(index)

    def integers(self, index: int) -> tuple[int, ...] | None:
        """An input of known integers."""
        sizes = self.sizes[index] if self.given(index) else None
        if sizes is not None and sizes.numbers is not None:
            return tuple(int(one) for one in sizes.numbers.reshape(-1))
        array = evaluate(self.node.inputs[index]) if self.given(index) else None
        return None if array is None else tuple(int(one) for one in array.reshape(-1))


Result = Sequence[Layout | None] | None
Rule = Callable[[View, Layout], Result]


def _reshape(view: View, first: Layout) -> Result:
    wanted = view.sizes[1] if view.given(1) else None
    if wanted is None:
        return None
    zero = not view.node.attributes.get_int("allowzero", 0)
    lengths = [
        length_of(first[place]) if zero and one == Length(0) and place < len(first) else one
        for place, one in enumerate(wanted.entries)
    ]
    return [regroup(first, [None if one == Length(-1) else one for one in lengths], view.fixed)]


def _flatten(view: View, first: Layout) -> Result:
    place = view.node.attributes.get_int("axis", 1)
    parts = (first[:place], first[place:])
    return [tuple(tuple(factor for axis in part for factor in axis) for part in parts)]


def _transpose(view: View, first: Layout) -> Result:
    perm = view.node.attributes.get_ints("perm") or range(len(first))[::-1]
    return [tuple(first[place] for place in perm)]


def _squeeze(view: View, first: Layout) -> Result:
    axes = view.axes(1)
    gone = {axis % len(first) for axis in axes or ()}
    if axes is None or any(first[place] for place in gone):
        return None
    return [tuple(axis for place, axis in enumerate(first) if place not in gone)]


def _unsqueeze(view: View, first: Layout) -> Result:
    axes = view.axes(1)
    if axes is None:
        return None
    rank = len(first) + len(axes)
    added, old = {axis % rank for axis in axes}, iter(first)
    return [tuple(() if place in added else next(old) for place in range(rank))]


def _expand(view: View, first: Layout) -> Result:
    wanted = view.sizes[1] if view.given(1) else None
    if wanted is None:
        return None
    entries = wanted.entries
    longer = max(len(entries), len(first))
    padded = ((),) * (longer - len(first)) + tuple(first)
    result: list[Axis] = []
    for place, axis in enumerate(padded):
        index = place - (longer - len(entries))
        length = entries[index] if index >= 0 else Length()
        if length in (Length(), length_of(axis)):
            result.append(axis)
        elif not axis and length is not None and length.factor > 0:
            result.append(axis_of(length))
        else:
            return None
    return [tuple(result)]


def _fill(view: View, _: Layout) -> Result:
    """ConstantOfShape: the same number for all tokens."""
    wanted = view.sizes[0]
    lengths = [one for one in wanted.entries if one is not None] if wanted is not None else []
    if wanted is None or len(lengths) < len(wanted.entries):
        return None
    return [tuple(axis_of(length) for length in lengths)]


def _split(view: View, first: Layout) -> Result:
    node, place = view.node, view.axis(0, len(first))
    width, count = inner_size(first[place]), len(node.outputs)
    if width is None:
        return None
    parts = node.attributes.get_ints("split") or (view.integers(1) if view.given(1) else None)
    if parts is None:
        if view.given(1):
            return None
        part = -(-width // count)
        parts = [part] * (count - 1) + [width - part * (count - 1)]
    return [replaced(first, place, axis_of(part)) for part in parts]


def _slice(view: View, first: Layout) -> Result:
    node = view.node
    if len(node.inputs) > 1:
        bounds = [view.integers(index) if view.given(index) else () for index in range(1, 5)]
    else:
        bounds = [tuple(node.attributes.get_ints(one) or ()) for one in ("starts", "ends", "axes")]
        bounds.append(())
    starts, ends, axes, steps = bounds
    if starts is None or ends is None or axes is None or steps is None:
        return None
    for number, place in enumerate(axes or range(len(starts))):
        width = inner_size(first[place])
        if width is None:
            return None
        step = steps[number] if steps else 1
        kept = len(range(width)[starts[number] : ends[number] : step])
        if step < 0:
            return None
        first = replaced(first, place % len(first), axis_of(kept))
    return [first]


def _concat(view: View, first: Layout) -> Result:
    place, total = view.axis(0, len(first)), 0
    for layout in view.layouts:
        width = inner_size(layout[place]) if layout and len(layout) == len(first) else None
        if (
            layout is None
            or width is None
            or replaced(layout, place, ()) != replaced(first, place, ())
        ):
            return None
        total += width
    return [replaced(first, place, axis_of(total))]


def _gather(view: View, first: Layout) -> Result:
    """Along an axis of a token's numbers by constants, or from a constant by a token's numbers."""
    index, place = view.layouts[1], view.axis(0, len(first))
    if index is None or inner_size(first[place]) is None:
        return None
    return [(*first[:place], *index, *first[place + 1 :])]


def _gather_elements(view: View, first: Layout) -> Result:
    return _elements(view, first, view.layouts[1])


def _scatter_elements(view: View, first: Layout) -> Result:
    index, updates = view.layouts[1], view.layouts[2]
    if index is None or updates != index or _elements(view, first, index) is None:
        return None
    return [first]


def _elements(view: View, first: Layout, index: Layout | None) -> Result:
    place = view.axis(0, len(first))
    if index is None or len(index) != len(first) or inner_size(first[place]) is None:
        return None
    alike = replaced(first, place, ()) == replaced(index, place, ())
    return [index] if alike and inner_size(index[place]) is not None else None


def _one_hot(view: View, first: Layout) -> Result:
    depth = view.integers(1)
    if depth is None or view.layouts[2] is None or symbols(view.layouts[2]):
        return None
    place = view.axis(-1, len(first) + 1)
    return [(*first[:place], axis_of(depth[0]), *first[place:])]


MOVES = frozenset("Flatten Identity Reshape Split Squeeze Transpose Unsqueeze".split())
"""Operators that cost nothing beside what they move."""

MOVE_RULES: dict[tuple[str, str], Rule] = {
    ("", "Concat"): _concat,
    ("", "ConstantOfShape"): _fill,
    ("", "Expand"): _expand,
    ("", "Flatten"): _flatten,
    ("", "Gather"): _gather,
    ("", "GatherElements"): _gather_elements,
    ("", "OneHot"): _one_hot,
    ("", "Reshape"): _reshape,
    ("", "ScatterElements"): _scatter_elements,
    ("", "Slice"): _slice,
    ("", "Split"): _split,
    ("", "Squeeze"): _squeeze,
    ("", "Transpose"): _transpose,
    ("", "Unsqueeze"): _unsqueeze,
}
