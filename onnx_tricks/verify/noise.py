"""How much rounding a model's weights once changes what it computes."""

from __future__ import annotations

import functools
import zlib

import numpy as np
import onnx_ir as ir

__all__ = ["nudge_weights"]

_FLOATING = frozenset(
    {ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
)


def nudge_weights(model: ir.Model, candidate: ir.Model | None = None) -> None:
    """Move the weights of a model as far as rounding them once would, in place and lazily.

    Where a rewrite computes a weight anew it has to round it, even if it is exact otherwise: the
    distance of a model from its nudged copy is what that amounts to. Vectors and larger floating
    initializers move; scalars, which are constants of the function, stay.

    Args:
        model: The model.
        candidate: A rewritten form of the model. Only the weights that it does not hold as they
            are then move; they become float64, and each moves by what was rounded off, a uniform
            half unit in the last place. Without it all weights keep their type, and one value in
            twelve moves by a whole unit, which is as much in the mean square.
    """
    others = {} if candidate is None else candidate.graph.initializers
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.dtype not in _FLOATING or tensor.size < 2:
            continue
        if name in others and _equal(tensor, others[name].const_value):
            continue
        widen = candidate is not None
        dtype = ir.DataType.DOUBLE if widen else tensor.dtype
        nudged = functools.partial(_nudged, tensor, widen)
        value.const_value = ir.LazyTensor(nudged, dtype, ir.Shape(tensor.shape.numpy()), name=name)
        value.dtype = dtype


def _equal(tensor: ir.TensorProtocol, other: ir.TensorProtocol | None) -> bool:
    if other is None or (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    return np.array_equal(tensor.numpy(), other.numpy())


def _nudged(tensor: ir.TensorProtocol, widen: bool) -> ir.TensorProtocol:
    array = tensor.numpy()
    random = np.random.default_rng(zlib.crc32((tensor.name or "").encode()))
    draw = random.random(array.shape, dtype=np.float32)
    # Zeros and masks are no rounded numbers.
    rounded = (array != 0) & np.isfinite(array)
    above = np.nextafter(array, np.asarray(np.inf, array.dtype))
    if widen:
        wide = array.astype(np.float64)
        unit = np.subtract(above.astype(np.float64), wide, where=rounded, out=np.zeros_like(wide))
        return ir.tensor(wide + unit * (draw - 0.5))
    below = np.nextafter(array, np.asarray(-np.inf, array.dtype))
    moved = np.where(rounded & (draw < 1 / 24), above, array)
    moved = np.where(rounded & (draw > 23 / 24), below, moved)
    return ir.tensor(moved, dtype=tensor.dtype)
