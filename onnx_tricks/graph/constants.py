"""Constants of a graph: what a value is known to be before the model runs.

Exporters write a constant as an initializer, a Constant node, or a small expression of them
(`Transpose`, `Cast`, `1 + w`). All three are read alike here, and evaluated only when asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.shapes import rank_of, shape_of

__all__ = ["evaluate", "is_constant", "is_whole_shape", "scalar", "step", "stored_tensor"]

_Array = np.ndarray[Any, np.dtype[Any]]


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


def is_constant(value: ir.Value | None) -> bool:
    """Whether `evaluate` can give the value."""
    return _constant(value, depth=0)


def evaluate(value: ir.Value | None) -> _Array | None:
    """The value as an array, or None when it is not constant.

    Stored tensors are returned without a copy (memory-mapped where they are external).
    """
    return _evaluate(value) if is_constant(value) else None


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element, or None."""
    tensor = stored_tensor(value)
    if tensor is not None and tensor.size != 1:
        return None
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
    if node.domain != "" or node.op_type not in _OPS or any(array is None for array in rest):
        return None
    return lambda array: _OPS[node.op_type](node, array, *rest)


def _constant(value: ir.Value | None, depth: int) -> bool:
    if value is None or depth > _MAX_DEPTH:
        return False
    if stored_tensor(value) is not None:
        return True
    node = value.producer()
    if node is None or node.domain != "" or len(node.outputs) != 1:
        return False
    if node.op_type in _OF_SHAPES:
        return _of_shape(node) is not None
    if node.op_type not in _OPS:
        return False
    inputs = [operand for operand in node.inputs if operand is not None]
    return bool(inputs) and all(_constant(operand, depth + 1) for operand in inputs)


def _evaluate(value: ir.Value | None) -> _Array:
    tensor = stored_tensor(value)
    if tensor is not None:
        return tensor.numpy()
    assert value is not None
    node = value.producer()
    assert node is not None
    if (known := _of_shape(node)) is not None:
        return known
    operands = [_evaluate(operand) for operand in node.inputs if operand is not None]
    return _OPS[node.op_type](node, *operands)


def is_whole_shape(node: ir.Node) -> bool:
    """Whether a Shape node gives all axes (ONNX Runtime writes its defaults out)."""
    return node.attributes.get_int("start", 0) == 0 and "end" not in node.attributes


def _of_shape(node: ir.Node) -> _Array | None:
    """A Shape of static dimensions, or a Size of a Shape (a rank): data cannot change them."""
    source = node.inputs[0] if node.inputs else None
    if source is None or node.op_type not in _OF_SHAPES:
        return None
    if node.op_type == "Size":
        producer = source.producer()
        if producer is None or producer.op_type != "Shape" or not is_whole_shape(producer):
            return None
        shaped = producer.inputs[0]
        rank = rank_of(shaped) if shaped is not None else None
        return None if rank is None else np.asarray(rank, dtype=np.int64)
    shape = shape_of(source)
    if shape is None or not all(isinstance(length, int) for length in shape):
        return None
    if not is_whole_shape(node):
        return None
    return np.asarray(shape.numpy(), dtype=np.int64)


def _axes(node: ir.Node, operands: tuple[_Array, ...]) -> tuple[int, ...] | None:
    if operands:
        return tuple(int(axis) for axis in operands[0].reshape(-1))
    attribute = node.attributes.get("axes")
    return tuple(attribute.as_ints()) if attribute is not None else None


def _cast(node: ir.Node, array: _Array) -> _Array:
    return array.astype(ir.DataType(node.attributes["to"].as_int()).numpy())


def _transpose(node: ir.Node, array: _Array) -> _Array:
    perm = node.attributes.get("perm")
    return np.transpose(array, perm.as_ints() if perm is not None else None)


def _reshape(node: ir.Node, array: _Array, shape: _Array) -> _Array:
    dims = [int(dim) for dim in shape]
    allowzero = node.attributes.get_int("allowzero", 0)
    if not allowzero:
        dims = [array.shape[i] if dim == 0 else dim for i, dim in enumerate(dims)]
    return array.reshape(dims)


def _flatten(node: ir.Node, array: _Array) -> _Array:
    axis = node.attributes.get_int("axis", 1)
    assert axis is not None
    axis += array.ndim if axis < 0 else 0
    return array.reshape(int(np.prod(array.shape[:axis], dtype=np.int64)), -1)


def _unsqueeze(node: ir.Node, array: _Array, *rest: _Array) -> _Array:
    axes = _axes(node, rest)
    return np.expand_dims(array, axes if axes is not None else ())


def _concat(node: ir.Node, *arrays: _Array) -> _Array:
    return np.concatenate(arrays, axis=node.attributes["axis"].as_int())


def _binary(function: Callable[[_Array, _Array], _Array]) -> Callable[..., _Array]:
    def apply(_: ir.Node, left: _Array, right: _Array) -> _Array:
        with np.errstate(all="ignore"):
            return function(left, right)

    return apply


_MAX_DEPTH = 16
_OF_SHAPES = frozenset(("Shape", "Size"))
_OPS: dict[str, Callable[..., _Array]] = {
    "Identity": lambda _, array: array,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": lambda node, array, *rest: np.squeeze(array, _axes(node, rest)),
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Neg": lambda _, array: np.negative(array),
    "Sqrt": lambda _, array: np.sqrt(array),
    "Range": lambda _, start, limit, step: np.arange(start, limit, step, dtype=start.dtype),
}
