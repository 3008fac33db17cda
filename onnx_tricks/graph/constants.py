"""Constants of a graph: what a value is known to be before the model runs.

Exporters write a constant as an initializer, a Constant node, or a small expression of them
(`Transpose`, `Split`, `1 + w`). All three are read alike here, and evaluated only when asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.errors import ModelError
from onnx_tricks.graph.array_ops import ARRAY_OPS
from onnx_tricks.graph.shapes import shape_of

__all__ = [
    "deferred",
    "evaluate",
    "is_constant",
    "is_default",
    "is_whole_shape",
    "scalar",
    "step",
    "stored_tensor",
]

_Array = np.ndarray[Any, np.dtype[Any]]
_Recipe = Callable[[dict[ir.Value, _Array]], _Array]


def stored_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor behind an initializer or a Constant node; None for anything else.

    An initializer that is also a graph input is only a default, which a caller may override: it
    is not a constant.
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    attribute = node.attributes.get("value")
    if attribute is not None and attribute.type == ir.AttributeType.TENSOR:
        # get_const_tensor would name the tensor after the value, and so change the model.
        tensor: ir.TensorProtocol | None = attribute.value
        return tensor
    return ir.convenience.get_const_tensor(value)


def is_default(value: ir.Value | None) -> bool:
    """Whether a value is stored, but an input of the graph as well, which callers may override."""
    return value is not None and value.is_initializer() and value.is_graph_input()


def is_constant(value: ir.Value | None) -> bool:
    """Whether `evaluate` can give the value."""
    return _constant(value, 0, {})


def evaluate(value: ir.Value | None) -> _Array | None:
    """The value as an array, or None when it is not constant.

    Stored tensors are returned without a copy (memory-mapped where they are external).
    """
    compute = deferred(value)
    return None if compute is None else compute()


def deferred(value: ir.Value | None) -> Callable[[], _Array] | None:
    """What `evaluate` does, for later, when the nodes may be gone; None when it is not constant."""
    if value is None or not is_constant(value):
        return None
    recipe = _recipe(value, {})
    return lambda: recipe({})


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, or None."""
    tensor = stored_tensor(value)
    shape = shape_of(value) if tensor is None and value is not None else None
    if tensor is not None and tensor.size != 1:
        return None
    if shape is not None and any(isinstance(one, int) and one != 1 for one in shape):
        return None  # whatever it is, computing it would not make it a number
    array = evaluate(value)
    return (
        float(array.reshape(()).astype(np.float64))
        if array is not None and array.size == 1
        else None
    )


def step(node: ir.Node) -> Callable[[_Array], _Array] | None:
    """What a node does to its first input when all others are constant, as a function of arrays.

    The function stays valid when the node is removed from its graph.
    """
    rest = [evaluate(operand) for operand in node.inputs[1:] if operand is not None]
    known = node.domain == "" and node.op_type in ARRAY_OPS and len(node.outputs) == 1
    if not known or any(array is None for array in rest):
        return None
    return lambda array: ARRAY_OPS[node.op_type](node, array, *rest)


def _constant(value: ir.Value | None, depth: int, found: dict[ir.Value, bool]) -> bool:
    """Whether a value is constant; what has been found of others is kept."""
    if value is None or depth > _MAX_DEPTH:
        return False
    if value not in found:
        found[value] = stored_tensor(value) is not None or _made_of_constants(value, depth, found)
    return found[value]


def _made_of_constants(value: ir.Value, depth: int, found: dict[ir.Value, bool]) -> bool:
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if _of_shape(node) is not None:
        return True
    if node.op_type not in ARRAY_OPS or (len(node.outputs) > 1 and node.op_type != "Split"):
        return False
    inputs = [operand for operand in node.inputs if operand is not None]
    # What bounds are may be told by attributes, or by which of the inputs are left out.
    if len(inputs) < _BOUNDED.get(node.op_type, 0) or None in node.inputs[: len(inputs)]:
        return False
    return bool(inputs) and all(_constant(operand, depth + 1, found) for operand in inputs)


def _recipe(value: ir.Value, known: dict[ir.Value, _Recipe]) -> _Recipe:
    """How to compute a value, once for each dictionary of what has been computed."""
    if value in known:
        return known[value]
    tensor, node = stored_tensor(value), value.producer()
    if tensor is not None:
        compute: _Recipe = lambda _: tensor.numpy()  # noqa: E731
    else:
        assert node is not None
        compute = _operation(value, node, known)

    def once(found: dict[ir.Value, _Array]) -> _Array:
        if value not in found:
            found[value] = compute(found)
        return found[value]

    return known.setdefault(value, once)


def _operation(value: ir.Value, node: ir.Node, known: dict[ir.Value, _Recipe]) -> _Recipe:
    lengths = _of_shape(node)
    if lengths is not None:
        return lambda _: lengths
    operands = [_recipe(operand, known) for operand in node.inputs if operand is not None]
    place = list(node.outputs).index(value)

    def compute(found: dict[ir.Value, _Array]) -> _Array:
        arrays = [operand(found) for operand in operands]
        try:
            made = ARRAY_OPS[node.op_type](node, *arrays)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            shapes = ", ".join(str(list(array.shape)) for array in arrays)
            raise ModelError(
                f"{node.op_type} node {node.name or value.name!r} cannot be computed from its "
                f"constants of shapes {shapes}: {error}. If ONNX Runtime cannot either, export the "
                "model again."
            ) from None
        array: _Array = made[place] if isinstance(made, list) else made
        return array

    return compute


def is_whole_shape(node: ir.Node) -> bool:
    """Whether a Shape node gives all axes (ONNX Runtime writes its defaults out)."""
    return node.attributes.get_int("start", 0) == 0 and "end" not in node.attributes


def _of_shape(node: ir.Node) -> _Array | None:
    """Static dimensions out of a Shape, or their number (a rank): data cannot change them."""
    source = node.inputs[0] if node.inputs else None
    if source is None or node.domain != "" or node.op_type not in _OF_SHAPES:
        return None
    if node.op_type == "Shape":
        return _static(_lengths(node))
    shaped = source.producer()
    if shaped is None or shaped.op_type != "Shape" or shaped.domain != "":
        return None
    lengths = _lengths(shaped)
    if lengths is None:
        return None
    if node.op_type == "Size":
        return np.asarray(lengths.size, dtype=np.int64)
    rest = [tensor.numpy() for one in node.inputs[1:] if (tensor := stored_tensor(one)) is not None]
    if len(rest) < len(node.inputs) - 1 or len(rest) < _SHAPE_PICKS[node.op_type]:
        return None
    return _static(ARRAY_OPS[node.op_type](node, lengths, *rest))


def _lengths(node: ir.Node) -> _Array | None:
    """What a Shape gives, as far as it is known: numbers, and symbols."""
    shape = shape_of(node.inputs[0]) if node.inputs[0] is not None else None
    if shape is None:
        return None
    lengths = np.empty(len(shape), dtype=object)
    lengths[:] = list(shape)
    picked: _Array = lengths[node.attributes.get_int("start", 0) : node.attributes.get_int("end")]
    # Where axes are asked for that are not there, what the file says of the shape is wrong.
    return picked if picked.size or not node.attributes else None


def _static(lengths: _Array | None) -> _Array | None:
    if lengths is None or not all(isinstance(one, int) for one in np.ravel(lengths)):
        return None
    return np.asarray(lengths, dtype=np.int64)


_MAX_DEPTH = 16
_BOUNDED = {"Clip": 2, "Slice": 3}  # how many inputs their forms of today have at least
_SHAPE_PICKS = {"Gather": 1, "Slice": 2}  # how many inputs they need at least
_OF_SHAPES = frozenset(("Shape", "Size", *_SHAPE_PICKS))
