"""Small integer tensors that graphs work shapes out with, as lengths of known symbols.

Exporters read `Shape(x)`, pick and join entries, and reshape to the result. What they do to it is
followed here; an entry that cannot be followed is None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_constant, stored_tensor
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.layout import Length

__all__ = ["Sizes", "follow_sizes", "sizes_of_constant"]

_LONGEST = 16  # entries; no shape has more
_INTEGERS = frozenset((ir.DataType.INT64, ir.DataType.INT32))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """An integer scalar or vector made of lengths.

    Attributes:
        entries: The lengths; None for those that are not known.
        scalar: Whether the tensor has no axis (and one entry).
    """

    entries: tuple[Length | None, ...]
    scalar: bool = False

    @property
    def numbers(self) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """The tensor, where no symbol is in it."""
        found = [one.factor for one in self.entries if one is not None and not one.symbols]
        if len(found) < len(self.entries):
            return None
        return np.asarray(found[0] if self.scalar else found, dtype=np.int64)


def sizes_of_constant(value: ir.Value) -> Sizes | None:
    """A constant read as lengths, where it can be."""
    tensor = stored_tensor(value)
    if tensor is not None and (tensor.dtype not in _INTEGERS or tensor.size > _LONGEST):
        return None
    rank = rank_of(value) if tensor is None else len(tensor.shape)
    if rank is None or rank > 1 or not is_constant(value):
        return None
    array = evaluate(value)
    if array is None or array.dtype.kind != "i" or array.size > _LONGEST:
        return None
    return Sizes(tuple(Length(int(one)) for one in array.reshape(-1)), scalar=array.ndim == 0)


def follow_sizes(node: ir.Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    """What a node makes of lengths; None where it is not followed.

    Args:
        node: A node, whose inputs may be constants.
        inputs: Its inputs as lengths (constants too), where they are.
    """
    rule = _RULES.get(node.op_type) if node.domain == "" else None
    if rule is None or not inputs or inputs[0] is None:
        return None
    return rule(node, [one for one in inputs if one is not None])


def _same(_: ir.Node, inputs: list[Sizes]) -> Sizes | None:
    return inputs[0]


def _cast(node: ir.Node, inputs: list[Sizes]) -> Sizes | None:
    return inputs[0] if ir.DataType(node.attributes["to"].as_int()) in _INTEGERS else None


def _gather(node: ir.Node, inputs: list[Sizes]) -> Sizes | None:
    data, index = inputs[0], inputs[1].numbers if len(inputs) > 1 else None
    if index is None or data.scalar or node.attributes.get_int("axis", 0) not in (0, -1):
        return None
    if any(not -len(data.entries) <= one < len(data.entries) for one in index.reshape(-1)):
        return None
    return Sizes(tuple(data.entries[one] for one in index.reshape(-1)), scalar=index.ndim == 0)


def _slice(node: ir.Node, inputs: list[Sizes]) -> Sizes | None:
    if len(node.inputs) == 1:
        bounds = [node.attributes.get_ints(name, ()) for name in ("starts", "ends")]
    else:
        arrays = [one.numbers for one in inputs[1:]]
        if len(arrays) != len(node.inputs) - 1 or any(one is None for one in arrays):
            return None
        bounds = [one.reshape(-1).tolist() for one in arrays if one is not None]
    if len(bounds) < 2 or any(len(one) != 1 for one in bounds):
        return None
    step = bounds[3][0] if len(bounds) > 3 else 1
    return Sizes(inputs[0].entries[slice(bounds[0][0], bounds[1][0], step)])


def _squeeze(_: ir.Node, inputs: list[Sizes]) -> Sizes | None:
    return Sizes(inputs[0].entries, scalar=True) if len(inputs[0].entries) == 1 else None


def _vector(_: ir.Node, inputs: list[Sizes]) -> Sizes | None:
    return Sizes(inputs[0].entries) if inputs[0].scalar else None


def _reshape(_: ir.Node, inputs: list[Sizes]) -> Sizes | None:
    wanted = inputs[1].entries if len(inputs) > 1 else None
    if wanted is None or len(wanted) > 1:
        return None
    return Sizes(inputs[0].entries, scalar=not wanted)


def _concat(node: ir.Node, inputs: list[Sizes]) -> Sizes | None:
    if len(inputs) < len(node.inputs):
        return None
    return Sizes(tuple(entry for one in inputs for entry in one.entries))


def _arithmetic(
    function: Callable[[Length, Length], Length | None],
) -> Callable[[ir.Node, list[Sizes]], Sizes | None]:
    def rule(_: ir.Node, inputs: list[Sizes]) -> Sizes | None:
        if len(inputs) != 2:
            return None
        left, right = (one.entries for one in inputs)
        if 1 not in (len(left), len(right)) and len(left) != len(right):
            return None
        longest = max(len(left), len(right))
        pairs = zip(left * (longest // len(left)), right * (longest // len(right)), strict=True)
        entries = [None if a is None or b is None else function(a, b) for a, b in pairs]
        return Sizes(tuple(entries), scalar=all(one.scalar for one in inputs))

    return rule


def _plus(left: Length, right: Length) -> Length | None:
    if left.symbols != right.symbols:
        return left if right.factor == 0 else right if left.factor == 0 else None
    return Length(left.factor + right.factor, left.symbols)


def _minus(left: Length, right: Length) -> Length | None:
    return _plus(left, Length(-right.factor, right.symbols))


def _product(node: ir.Node, inputs: list[Sizes]) -> Sizes | None:
    total = Length()
    for entry in inputs[0].entries:
        if entry is None:
            return None
        total = total.times(entry)
    return Sizes((total,), scalar=node.attributes.get_int("keepdims", 1) == 0)


_RULES: dict[str, Callable[[ir.Node, list[Sizes]], Sizes | None]] = {
    "Add": _arithmetic(_plus),
    "Cast": _cast,
    "Concat": _concat,
    "Div": _arithmetic(Length.over),
    "Gather": _gather,
    "Identity": _same,
    "Mul": _arithmetic(Length.times),
    "ReduceProd": _product,
    "Reshape": _reshape,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Sub": _arithmetic(_minus),
    "Unsqueeze": _vector,
}
