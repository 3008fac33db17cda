"""What a model's inputs and outputs mean: token ids, masks, positions, caches, pixels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["Input", "Interface", "read_interface"]

# Ops through which ids pass on their way to the table that they index.
_CARRIERS = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
# These count valid tokens from the left: they know padding on the right only.
_NO_LEFT_PADDING = frozenset({"GroupQueryAttention", "SparseAttention"})


@dataclasses.dataclass(frozen=True)
class Input:
    """One graph input.

    Attributes:
        name: Its name.
        dtype: Its element type.
        dims: Sizes; a symbol is its name, an unknown size is None.
        role: "ids", "mask", "positions", "cache", "branch" or "other".
        limit: Number of rows of the table that it indexes; 0 where it indexes none.
    """

    name: str
    dtype: ir.DataType
    dims: tuple[int | str | None, ...]
    role: str
    limit: int

    @property
    def growing(self) -> int:
        """The axis of a cache along which it grows."""
        open_axes = [axis for axis, dim in enumerate(self.dims) if not isinstance(dim, int)]
        return next(axis for axis in open_axes if axis)


@dataclasses.dataclass(frozen=True)
class Interface:
    """The inputs of a model and how its outputs feed them.

    Attributes:
        inputs: All inputs that are not initializers.
        presents: For each cache input, the output that continues it (absent where none does).
        left_padding: Whether padding may stand left of a prompt.
        image_sizes: Sizes (height = width, pixels) to try where the model leaves them open.
    """

    inputs: tuple[Input, ...]
    presents: dict[str, str]
    left_padding: bool
    image_sizes: tuple[int, ...]

    def role(self, role: str) -> tuple[Input, ...]:
        """Return the inputs that have a role."""
        return tuple(i for i in self.inputs if i.role == role)

    def empty_caches(self, batch: int) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """The caches before the first token, by input name."""
        return {
            value.name: np.zeros([batch, *(d if isinstance(d, int) else 0 for d in value.dims[1:])])
            for value in self.role("cache")
        }


def read_interface(model: ir.Model) -> Interface:
    """Read the interface of a model off its graph."""
    graph = model.graph
    outputs = {value.name for value in graph.outputs}
    inputs = []
    presents = {}
    for value in graph.inputs:
        if value.is_initializer() or value.dtype is None or value.name is None:
            continue
        name, role = value.name, _role(value)
        limit = _limit(value)
        if role == "ids" and not limit:
            limit = _logits_width(graph)
        dims = () if value.shape is None else tuple(_dim(d) for d in value.shape)
        if role == "cache" and len(dims) == 4 and not isinstance(dims[3], int):
            dims = (*dims[:3], _head_width(value))
        inputs.append(Input(name, value.dtype, dims, role, limit))
        if role == "cache":
            spelled = [name.replace(past, "present") for past in ("past_key_values", "past")]
            found = [present for present in spelled if present in outputs]
            if found:
                presents[name] = found[0]
    ops = {node.op_type for node in graph.all_nodes()}
    return Interface(
        tuple(inputs), presents, not ops & _NO_LEFT_PADDING, tuple(_image_sizes(graph))
    )


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _role(value: ir.Value) -> str:
    name = (value.name or "").lower()
    integer = value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
    if name == "use_cache_branch":
        return "branch"
    if "past" in name and (not integer or name.startswith("past_key_values.")):
        return "cache"
    if integer and "position" in name:
        return "positions"
    if "mask" in name and len(value.shape or ()) == 2:
        return "mask"
    if integer and len(value.shape or ()) == 2 and (name.endswith("input_ids") or _limit(value)):
        return "ids"
    return "other"


def _head_width(value: ir.Value) -> int | None:
    """Work out the width of a head where a cache leaves it open, as GroupQueryAttention may."""
    for node, _ in value.uses():
        if node.op_type == "Cast":
            return _head_width(node.outputs[0])
        query, key = (*node.inputs, None, None)[:2]
        heads, groups = (node.attributes.get(n) for n in ("num_heads", "kv_num_heads"))
        if query is not None and query.shape is not None and heads is not None:
            width = query.shape[-1]
            packed = 2 * groups.as_int() if key is None and groups is not None else 0
            return width // (heads.as_int() + packed) if isinstance(width, int) else None
    return None


def _limit(value: ir.Value) -> int:
    """Find the smallest table that a value indexes: the bound of its numbers."""
    rows = []
    for node, index in value.uses():
        if node.op_type in _CARRIERS and index == 0:
            rows.append(_limit(node.outputs[0]))
        elif node.op_type == "Gather" and index == 1:
            table = node.inputs[0]
            axis = node.attributes.get("axis")
            if table is not None and table.shape is not None and len(table.shape) == 2:
                size = table.shape[0 if axis is None else axis.as_int()]
                rows.append(size if isinstance(size, int) else 0)
    return min((n for n in rows if n > 0), default=0)


def _logits_width(graph: ir.Graph) -> int:
    shape = graph.outputs[0].shape if graph.outputs else None
    last = shape[-1] if shape is not None and len(shape) > 1 else None
    return last if isinstance(last, int) else 0


def _image_sizes(graph: ir.Graph) -> Iterator[int]:
    """Yield image sizes that fit the position table of a vision transformer, then usual ones."""
    for value in graph.inputs:
        for node, index in value.uses():
            w = node.inputs[1] if node.op_type == "Conv" and index == 0 else None
            patch = None if w is None or w.shape is None or len(w.shape) != 4 else w.shape[2]
            if not isinstance(patch, int):
                continue
            for table in graph.initializers.values():
                shape = () if table.shape is None else table.shape.numpy()
                if len(shape) != 3 or shape[0] != 1:
                    continue
                for extra in (0, 1, 2):  # class and distillation tokens
                    side = math.isqrt(max(shape[1] - extra, 0))
                    if side > 1 and side * side + extra == shape[1]:
                        yield side * patch
    yield from (224, 32)
