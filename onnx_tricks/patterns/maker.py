"""What makes a value, seen from its channels: the weights that write them, or the value before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_constant
from onnx_tricks.graph.shapes import rank_of
from onnx_tricks.patterns.channels import Channels
from onnx_tricks.patterns.channelwise import pooled
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.moves import follow
from onnx_tricks.patterns.weight import Weight, trace_weight

__all__ = ["Made", "came_from", "made_of"]

_MICROSOFT = "com.microsoft"
_HIGHEST_RANK = 5
_Found = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Made:
    """A constant operand that writes channels.

    Attributes:
        node: What reads the constant.
        index: Which of the node's inputs it is.
        weight: The constant; `weight.axis` is the axis that becomes the channels.
        scale: A constant of one number per channel that what it writes is multiplied with before
            anything else reads it (LayerScale), or None.
    """

    node: ir.Node
    index: int
    weight: Weight
    scale: ir.Value | None = None


def came_from(value: ir.Value, axis: int, width: int, extents: Extents) -> tuple[int, int] | None:
    """The operand that a node moves about to make a value.

    Args:
        value: The value.
        axis: Its channel axis, counted from the end.
        width: D, the number of channels.
        extents: The lengths of axes.

    Returns:
        Which input of the producer it is, and its channel axis; None where channels do not come
        from one operand whole.
    """
    node = value.producer()
    if node is None:
        return None
    for index, operand in enumerate(node.inputs):
        rank = None if operand is None else rank_of(operand)
        for place in sorted(range(-(rank or _HIGHEST_RANK), 0), key=lambda one: one != axis):
            channels = Channels.all(place, width)
            moved = pooled(node, index, channels) or follow(node, index, channels, extents)
            if isinstance(moved, list) and any(
                output is value and behind.axis == axis and behind.is_row(width)
                for output, behind in moved
            ):
                return index, place
    return None


def made_of(value: ir.Value, axis: int, width: int, extents: Extents) -> tuple[Made, ...]:
    """The constants in which a value is linear, all together, by their output channels.

    What is done alike to the channels of all of them is done to the value.

    Args:
        value: The output of a linear layer, or of a lookup in a table.
        axis: Its channel axis, counted from the end.
        width: D, the number of channels.
        extents: The lengths of axes.

    Returns:
        Weight and bias, or the table; empty where the value is made otherwise.
    """
    node = value.producer()
    if node is None:
        return ()
    if (scaled := _scaled(node, axis, width, extents)) is not None:
        return scaled
    finder = _MAKERS.get((node.domain, node.op_type))
    found = finder(node, axis) if finder is not None else []
    if not found:
        source = came_from(value, axis, width, extents)
        found = [source] if source is not None and is_constant(node.inputs[source[0]]) else []
    made = []
    for index, place in found:
        weight = trace_weight(node.inputs[index], place)
        if weight is None or weight.tensor.shape.numpy()[weight.axis] != width:
            return ()
        made.append(Made(node, index, weight))
    return tuple(made)


def _scaled(node: ir.Node, axis: int, width: int, extents: Extents) -> tuple[Made, ...] | None:
    """The constants behind a product with a constant vector, if only the product reads them."""
    if node.op_type != "Mul" or node.domain != "":
        return None
    for operand, scale in (node.inputs, node.inputs[::-1]):
        if scale is None or operand is None or not _is_vector(scale, axis, width):
            continue
        made: tuple[Made, ...] = ()
        add = operand.producer()
        if add is not None and add.op_type == "Add" and _private(operand):
            for product, bias in (add.inputs, add.inputs[::-1]):
                weight = trace_weight(bias, axis) if is_constant(bias) else None
                if product is not None and weight is not None and _private(product):
                    made = made_of(product, axis, width, extents)
                    made += (Made(add, list(add.inputs).index(bias), weight),) if made else ()
        elif _private(operand):
            made = made_of(operand, axis, width, extents)
        if made and all(one.scale is None for one in made):
            return tuple(dataclasses.replace(one, scale=scale) for one in made)
    return None


def _is_vector(value: ir.Value, axis: int, width: int) -> bool:
    array = evaluate(value)
    return array is not None and array.ndim >= -axis and array.shape[axis] == array.size == width


def _private(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _matmul(node: ir.Node, axis: int) -> _Found:
    flags = ("transA", "transB") if node.op_type == "FusedMatMul" else ()
    if any(node.attributes.get_int(f"transBatch{side}", 0) for side in "AB"):
        return []
    transposed = [bool(node.attributes.get_int(flag, 0)) for flag in flags] or [False, False]
    if axis == -1:
        return [(1, -2 if transposed[1] else -1)]
    return [(0, -1 if transposed[0] else -2)] if axis == -2 else []


def _gemm(node: ir.Node, axis: int) -> _Found:
    found = _matmul_of_gemm(node, axis)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        found.append((2, axis))
    return found


def _matmul_of_gemm(node: ir.Node, axis: int) -> _Found:
    transposed = [bool(node.attributes.get_int(flag, 0)) for flag in ("transA", "transB")]
    if axis == -1:
        return [(1, -2 if transposed[1] else -1)]
    return [(0, -1 if transposed[0] else -2)]


def _conv(node: ir.Node, axis: int) -> _Found:
    kernel = node.inputs[1]
    rank = rank_of(kernel) if kernel is not None else None
    if rank is None or axis != 1 - rank or node.attributes.get_int("group", 1) != 1:
        return []  # the channels of two groups are made from different inputs: no common mean
    biased = len(node.inputs) > 2 and node.inputs[2] is not None
    return [(1, 0), (2, 0)] if biased else [(1, 0)]


def _einsum(node: ir.Node, axis: int) -> _Found:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    if not right or "." in equation or len(right) < -axis:
        return []
    label = right[axis]
    holders = [index for index, term in enumerate(terms) if label in term]
    if len(holders) != 1 or terms[holders[0]].count(label) != 1:
        return []
    return [(holders[0], terms[holders[0]].index(label))]


_MAKERS: dict[tuple[str, str], Callable[[ir.Node, int], _Found]] = {
    ("", "MatMul"): _matmul,
    (_MICROSOFT, "FusedMatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Conv"): _conv,
    ("", "Einsum"): _einsum,
}
