"""What operators do to arrays: those that exporters work weights and other constants out with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["ARRAY_OPS"]

_Array = np.ndarray[Any, np.dtype[Any]]


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


def _slice(_: ir.Node, array: _Array, starts: _Array, ends: _Array, *rest: _Array) -> _Array:
    axes = rest[0].reshape(-1) if rest else np.arange(starts.size)
    steps = rest[1].reshape(-1) if len(rest) > 1 else np.ones(starts.size, dtype=np.int64)
    chosen = [slice(None)] * array.ndim
    for start, end, axis, step in zip(
        starts.reshape(-1), ends.reshape(-1), axes, steps, strict=True
    ):
        # Backwards, an end before the first place is none that a slice could name.
        last = None if step < 0 and end < -array.shape[axis] else int(end)
        chosen[axis] = slice(int(start), last, int(step))
    return array[tuple(chosen)]


def _filled(node: ir.Node, shape: _Array) -> _Array:
    fill = node.attributes.get("value")
    value = np.zeros(1, np.float32) if fill is None else fill.as_tensor().numpy()
    return np.full(tuple(int(one) for one in shape), value.reshape(()), dtype=value.dtype)


def _gather(node: ir.Node, array: _Array, index: _Array) -> _Array:
    return np.take(array, index, node.attributes.get_int("axis", 0))


def _split(node: ir.Node, array: _Array, *sizes: _Array) -> list[_Array]:
    axis = node.attributes.get_int("axis", 0)
    given = node.attributes.get_ints("split")
    if sizes:
        given = [int(one) for one in sizes[0]]
    if given is None:
        part = -(-array.shape[axis] // len(node.outputs))
        given = [part] * len(node.outputs)  # the last takes what is left
    return np.split(array, np.cumsum(given)[:-1], axis)


def _reduced(function: Callable[..., _Array]) -> Callable[..., _Array]:
    def apply(node: ir.Node, array: _Array, *axes: _Array) -> _Array:
        over = _axes(node, axes)
        if not over and node.attributes.get_int("noop_with_empty_axes", 0) != 0:
            return array
        keep = bool(node.attributes.get_int("keepdims", 1))
        total: _Array = function(array.astype(np.float64), axis=over or None, keepdims=keep)
        return total.astype(array.dtype)

    return apply


def _norm(array: _Array, axis: tuple[int, ...] | None, keepdims: bool) -> _Array:
    root: _Array = np.sqrt(np.sum(array * array, axis=axis, keepdims=keepdims))
    return root


def _clip(_: ir.Node, array: _Array, *bounds: _Array) -> _Array:
    return np.clip(array, bounds[0], bounds[1] if len(bounds) > 1 else None)


def _expand(_: ir.Node, array: _Array, shape: _Array) -> _Array:
    return array * np.ones(tuple(int(one) for one in shape), dtype=array.dtype)


def _concat(node: ir.Node, *arrays: _Array) -> _Array:
    return np.concatenate(arrays, axis=node.attributes["axis"].as_int())


def _binary(function: Callable[[_Array, _Array], _Array]) -> Callable[..., _Array]:
    def apply(_: ir.Node, left: _Array, right: _Array) -> _Array:
        with np.errstate(all="ignore"):
            return function(left, right)

    return apply


def _divide(_: ir.Node, left: _Array, right: _Array) -> _Array:
    if left.dtype.kind in "iu":  # towards zero, as in C
        sign = np.sign(left) * np.sign(right)
        whole: _Array = (sign * (abs(left) // np.maximum(abs(right), 1))).astype(left.dtype)
        return whole
    with np.errstate(all="ignore"):
        quotient: _Array = np.divide(left, right)
    return quotient


def _power(_: ir.Node, base: _Array, exponent: _Array) -> _Array:
    with np.errstate(all="ignore"):
        raised: _Array = np.power(base, exponent).astype(base.dtype)
    return raised


ARRAY_OPS: dict[str, Callable[..., Any]] = {
    "Identity": lambda _, array: array,
    "Cast": _cast,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": lambda node, array, *rest: np.squeeze(array, _axes(node, rest)),
    "Unsqueeze": _unsqueeze,
    "Clip": _clip,
    "Concat": _concat,
    "Expand": _expand,
    "Gather": _gather,
    "ConstantOfShape": _filled,
    "Equal": _binary(np.equal),
    "Where": lambda _, condition, left, right: np.where(condition, left, right),
    "Slice": _slice,
    "Split": _split,
    "Add": _binary(np.add),
    "Sub": _binary(np.subtract),
    "Mul": _binary(np.multiply),
    "Div": _divide,
    "Pow": _power,
    "MatMul": _binary(np.matmul),
    "ReduceL2": _reduced(_norm),
    "ReduceSum": _reduced(np.sum),
    "Neg": lambda _, array: np.negative(array),
    "Sqrt": lambda _, array: np.sqrt(array),
    "Range": lambda _, start, limit, step: np.arange(start, limit, step, dtype=start.dtype),
}
"""By name: from a node and the arrays it reads to the array it makes; for a Split, a list."""
