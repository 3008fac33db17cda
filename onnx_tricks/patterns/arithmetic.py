"""What operators do, in NumPy: enough to follow shapes, layouts and rotations through a graph.

Every floating-point value is float64 here, and casts between floating types do nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["OPERATORS", "Array", "as_known", "flat_heads"]

Array = np.ndarray[Any, np.dtype[Any]]
_MICROSOFT = "com.microsoft"


def as_known(array: Array) -> Array:
    """An array as these operators take it: float64, int64 or bool."""
    if array.dtype.kind in "iu":
        return array.astype(np.int64, copy=False)
    return array if array.dtype.kind == "b" else array.astype(np.float64, copy=False)


def _axes(node: ir.Node, given: Array | None) -> list[int] | None:
    if given is not None:
        return [int(axis) for axis in given.reshape(-1)]
    attribute = node.attributes.get("axes")
    return list(attribute.as_ints()) if attribute is not None else None


def _cast(node: ir.Node, array: Array) -> Array:
    return as_known(array.astype(ir.DataType(node.attributes["to"].as_int()).numpy(), copy=False))


def _float_cast(node: ir.Node, array: Array) -> Array:
    kind = ir.DataType(node.attributes["to"].as_int())
    return array.astype(np.float64) if kind.is_floating_point() else _cast(node, array)


def _transpose(node: ir.Node, array: Array) -> Array:
    return np.transpose(array, node.attributes.get_ints("perm"))


def _reshape(node: ir.Node, array: Array, shape: Array) -> Array:
    keep = not node.attributes.get_int("allowzero", 0)
    return array.reshape(
        [array.shape[i] if keep and length == 0 else int(length) for i, length in enumerate(shape)]
    )


def _flatten(node: ir.Node, array: Array) -> Array:
    axis = node.attributes.get_int("axis", 1) or 0
    lead = array.shape[: axis if axis >= 0 else array.ndim + axis]
    return array.reshape(int(np.prod(lead, dtype=np.int64)), -1)


def _squeeze(node: ir.Node, array: Array, axes: Array | None = None) -> Array:
    chosen = _axes(node, axes)
    return np.squeeze(array, None if chosen is None else tuple(chosen))


def _unsqueeze(node: ir.Node, array: Array, axes: Array | None = None) -> Array:
    return np.expand_dims(array, tuple(_axes(node, axes) or ()))


def _slice(
    node: ir.Node,
    array: Array,
    starts: Array | None = None,
    ends: Array | None = None,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    if starts is None or ends is None:
        first, last = (list(node.attributes[name].as_ints()) for name in ("starts", "ends"))
    else:
        first, last = [int(one) for one in starts], [int(one) for one in ends]
    along = _axes(node, axes) or list(range(len(first)))
    strides = [1] * len(first) if steps is None else [int(step) for step in steps]
    index = [slice(None)] * array.ndim
    for start, stop, axis, stride in zip(first, last, along, strides, strict=True):
        # A stop before the first entry means: down to it, inclusive.
        beyond = stride < 0 and stop < -array.shape[axis]
        index[axis] = slice(start, None if beyond else stop, stride)
    return array[tuple(index)]


def _split(node: ir.Node, array: Array, sizes: Array | None = None) -> tuple[Array, ...]:
    axis = node.attributes.get_int("axis", 0) or 0
    parts: list[int]
    if sizes is not None:
        parts = [int(size) for size in sizes]
    elif "split" in node.attributes:
        parts = list(node.attributes["split"].as_ints())
    else:
        part = -(-array.shape[axis] // len(node.outputs))
        parts = [part] * (len(node.outputs) - 1)
    return tuple(np.split(array, np.cumsum(parts)[: len(node.outputs) - 1], axis=axis))


def _gather(node: ir.Node, array: Array, index: Array) -> Array:
    return np.take(array, index, axis=node.attributes.get_int("axis", 0))


def _gather_elements(node: ir.Node, array: Array, index: Array) -> Array:
    return np.take_along_axis(array, index, axis=node.attributes.get_int("axis", 0) or 0)


def _concat(node: ir.Node, *arrays: Array) -> Array:
    return np.concatenate(arrays, axis=node.attributes["axis"].as_int())


def _expand(_: ir.Node, array: Array, shape: Array) -> Array:
    return np.broadcast_to(array, np.broadcast_shapes(array.shape, tuple(int(n) for n in shape)))


def _constant_of_shape(node: ir.Node, shape: Array) -> Array:
    attribute = node.attributes.get("value")
    fill = 0.0 if attribute is None else as_known(attribute.as_tensor().numpy()).reshape(-1)[0]
    return np.full([int(length) for length in shape], fill)


def _divide(_: ir.Node, left: Array, right: Array) -> Array:
    if left.dtype.kind == "i":
        return np.asarray(np.trunc(left / right)).astype(np.int64)
    return np.asarray(left / right)


def _reduce_product(node: ir.Node, array: Array, axes: Array | None = None) -> Array:
    chosen = _axes(node, axes)
    keep = bool(node.attributes.get_int("keepdims", 1))
    return np.asarray(np.prod(array, None if chosen is None else tuple(chosen), keepdims=keep))


def _reduce_maximum(node: ir.Node, array: Array, axes: Array | None = None) -> Array:
    chosen = _axes(node, axes)
    keep = bool(node.attributes.get_int("keepdims", 1))
    return np.asarray(np.max(array, None if chosen is None else tuple(chosen), keepdims=keep))


def _gather_nd(node: ir.Node, array: Array, index: Array) -> Array:
    if node.attributes.get_int("batch_dims", 0):
        raise ValueError("batch axes")
    return np.asarray(array[tuple(np.moveaxis(index, -1, 0))])


def _pad(_: ir.Node, array: Array, pads: Array, fill: Array | None = None, *__: Array) -> Array:
    ends = np.asarray(pads).reshape(2, -1).T
    return np.pad(array, ends.tolist(), constant_values=0 if fill is None else fill.reshape(()))


def _top(node: ir.Node, array: Array, count: Array) -> tuple[Array, Array]:
    axis = node.attributes.get_int("axis", -1) or 0
    order = np.argsort(-array, axis=axis, kind="stable")
    index = np.take(order, np.arange(int(count.reshape(()))), axis=axis)
    return np.take_along_axis(array, index, axis=axis), index


def _einsum(node: ir.Node, *arrays: Array) -> Array:
    return np.asarray(np.einsum(node.attributes["equation"].as_string(), *arrays))


def flat_heads(node: ir.Node, channels: int, pairs: int) -> int:
    """The number of heads that lie side by side in what a RotaryEmbedding turns, [B, S, H K].

    Without `num_heads`, ONNX Runtime's operator takes heads to be turned whole.
    """
    return node.attributes.get_int("num_heads", 0) or channels // (2 * pairs)


def _rotate(
    node: ir.Node, heads: Array, cos: Array, sin: Array, positions: Array | None = None
) -> Array:
    if positions is not None and positions.ndim:
        cos, sin = cos[positions], sin[positions]
    joined = heads.ndim == 3
    if joined:
        count = flat_heads(node, heads.shape[-1], cos.shape[-1])
        heads = heads.reshape(*heads.shape[:2], count, -1)
        cos, sin = cos[..., None, :], sin[..., None, :]
    else:
        cos, sin = cos[..., None, :, :], sin[..., None, :, :]
    width = 2 * cos.shape[-1]
    turned, rest = heads[..., :width], heads[..., width:]
    if node.attributes.get_int("interleaved", 0):
        first, second = turned[..., ::2], turned[..., 1::2]
        pair = np.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
        turned = pair.reshape(turned.shape)
    else:
        first, second = np.split(turned, 2, axis=-1)
        turned = np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
    result = np.concatenate([turned, rest], axis=-1)
    return result.reshape(*result.shape[:2], -1) if joined else result


def _microsoft_rotate(
    node: ir.Node, heads: Array, positions: Array, cos: Array, sin: Array
) -> Array:
    if positions.size == 1:  # the position of the first token
        positions = positions.reshape(1, 1) + np.arange(heads.shape[-2 if heads.ndim == 4 else 1])
    return _rotate(node, heads, cos, sin, positions)


def _relative_bias(_: ir.Node, table: Array, queries: Array, keys: Array) -> Array:
    """The shape alone is needed of it."""
    return np.zeros((1, table.shape[1], int(queries.reshape(())), int(keys.reshape(()))))


def _of(function: Callable[..., Any]) -> Callable[..., Array]:
    def apply(_: ir.Node, *arrays: Array) -> Array:
        with np.errstate(all="ignore"):
            return np.asarray(function(*arrays))

    return apply


def _first(_: ir.Node, array: Array, *__: Array) -> Array:
    return array


_STANDARD: dict[str, Callable[..., Array | tuple[Array, ...]]] = {
    "Abs": _of(np.abs),
    "Add": _of(np.add),
    "And": _of(np.logical_and),
    "Cast": _float_cast,
    "Ceil": _of(np.ceil),
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Cos": _of(np.cos),
    "Div": _divide,
    "Dropout": _first,
    "Einsum": _einsum,
    "Equal": _of(np.equal),
    "Exp": _of(np.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _of(np.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Greater": _of(np.greater),
    "GreaterOrEqual": _of(np.greater_equal),
    "Identity": _first,
    "Less": _of(np.less),
    "LessOrEqual": _of(np.less_equal),
    "MatMul": _of(np.matmul),
    "Max": _of(lambda *arrays: np.maximum.reduce(np.broadcast_arrays(*arrays))),
    "Min": _of(lambda *arrays: np.minimum.reduce(np.broadcast_arrays(*arrays))),
    "Mod": _of(np.mod),
    "Mul": _of(np.multiply),
    "Neg": _of(np.negative),
    "NonZero": _of(lambda array: np.stack(np.nonzero(array))),
    "Not": _of(np.logical_not),
    "Or": _of(np.logical_or),
    "Pad": _pad,
    "Pow": _of(np.power),
    "Range": _of(lambda start, stop, step: np.arange(start, stop, step)),
    "Reciprocal": _of(np.reciprocal),
    "ReduceMax": _reduce_maximum,
    "ReduceProd": _reduce_product,
    "Reshape": _reshape,
    "RotaryEmbedding": _rotate,
    "Sin": _of(np.sin),
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _of(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _of(np.subtract),
    "Tile": _of(lambda array, counts: np.tile(array, [int(n) for n in counts])),
    "TopK": _top,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _of(np.where),
}

OPERATORS = {
    **{("", name): function for name, function in _STANDARD.items()},
    (_MICROSOFT, "RelativePositionBias"): _relative_bias,
    (_MICROSOFT, "RotaryEmbedding"): _microsoft_rotate,
}
"""By domain and operator: from the node and its inputs (None where absent) to its outputs."""
