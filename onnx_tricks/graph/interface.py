"""What a model's inputs and outputs mean: token ids, masks, positions, caches, pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_tricks.graph.caches import find_caches
from onnx_tricks.graph.constants import scalar
from onnx_tricks.graph.open_sizes import Image, find_image, lengths
from onnx_tricks.graph.places import INTEGERS, places_tokens

__all__ = ["Input", "Interface", "read_interface"]

# Ops through which ids pass on their way to the table that they index; those of boxes are parts
# and differences of them.
_CARRIERS = frozenset(
    {"Cast", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Sub"}
    | {"Unsqueeze"}
)
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
        image: What images it may take; None where it takes none, or says itself.
        markers: Numbers that it is compared with: ids that stand for an image, or end a text.
        grows: The axis along which the graph appends to a cache; None where it does not show it.
        buffer: Whether a cache is a buffer of fixed length that the graph writes into.
    """

    name: str
    dtype: ir.DataType
    dims: tuple[int | str | None, ...]
    role: str
    limit: int
    image: Image | None
    markers: tuple[int, ...]
    grows: int | None = None
    buffer: bool = False

    @property
    def growing(self) -> int:
        """The axis of a cache along which it grows, or would: that of tokens."""
        if self.grows is not None:
            return self.grows
        usual = min(self.rows + 2, len(self.dims) - 1)
        return next((axis for axis in self._open() if axis != self.rows), usual)

    @property
    def rows(self) -> int:
        """The axis of a cache along which its sequences lie; 0 where it has none.

        Keys and values may be stacked in front of it, and tokens may come first.
        """
        named = [axis for axis, dim in enumerate(self.dims) if "batch" in str(dim)]
        others = [axis for axis in range(len(self.dims)) if axis != self.grows]
        if self.grows is not None:
            ahead = [axis for axis in self._open() if axis in others and axis < max(self.grows, 2)]
            named = [axis for axis in named if axis in others] or ahead
        stacked = max(len(self.dims) - 4, 0)
        return next(iter((*named, *others[stacked:])), 0)

    @property
    def fixed(self) -> bool:
        """Whether a cache is of a declared length."""
        return all(axis == self.rows for axis in self._open())

    def places(self, valid: npt.NDArray[Any], new: int) -> npt.NDArray[Any]:
        """The positions of new tokens, as an input of positions takes them.

        Args:
            valid: Which tokens of the context are none of padding, [B, P + T].
            new: T, the number of new ones.

        Returns:
            [B, T]; [T] or that of the first one, for inputs without a batch.
        """
        if len(self.dims) == 2:
            counted: npt.NDArray[Any] = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
            return counted[:, valid.shape[1] - new :]
        row: npt.NDArray[Any] = np.arange(valid.shape[1] - new, valid.shape[1])
        return row[:1].reshape(self.dims) if self.dims in ((), (1,)) else row

    def _open(self) -> list[int]:
        return [axis for axis, dim in enumerate(self.dims) if not isinstance(dim, int)]

    def sized(self, batch: int, tokens: int = 0) -> list[int]:
        """The shape of a cache that holds so many tokens for so many rows."""
        sizes = [dim if isinstance(dim, int) else tokens for dim in self.dims]
        if self.rows in self._open() and self.rows != self.growing:
            sizes[self.rows] = batch
        return sizes


@dataclasses.dataclass(frozen=True)
class Interface:
    """The inputs of a model and how its outputs feed them.

    Attributes:
        inputs: All inputs that are not initializers.
        presents: For each cache input, the output that continues it (absent where none does).
        left_padding: Whether padding may stand left of a prompt.
        lengths: What to try for the length of a series where the model leaves it open.
    """

    inputs: tuple[Input, ...]
    presents: dict[str, str]
    left_padding: bool
    lengths: tuple[int, ...]

    def role(self, role: str) -> tuple[Input, ...]:
        """Return the inputs that have a role."""
        return tuple(i for i in self.inputs if i.role == role)

    def empty_caches(self, batch: int) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """The caches before the first token, by input name."""
        return {value.name: np.zeros(value.sized(batch)) for value in self.role("cache")}


def read_interface(model: ir.Model) -> Interface:
    """Read the interface of a model off its graph."""
    graph, caches = model.graph, find_caches(model)
    inputs = []
    presents = {}
    for value in graph.inputs:
        if value.is_initializer() or value.dtype is None or value.name is None:
            continue
        cache = caches.get(value)
        name, role = value.name, _role(value) if cache is None else "cache"
        if role == "other" and caches and places_tokens(value, graph.inputs):
            role = "positions"
        limit = _limit(value)
        if role == "ids" and not limit:
            limit = _logits_width(graph)
        dims = () if value.shape is None else tuple(_dim(d) for d in value.shape)
        if role == "cache" and len(dims) == 4 and not isinstance(dims[3], int):
            dims = (*dims[:3], _head_width(value))
        if role == "other" and dims and not isinstance(dims[-1], int):
            dims = (*dims[:-1], _width(value) or dims[-1])
        image = find_image(value) if role == "other" else None
        markers = tuple(dict.fromkeys(_markers(value))) if role == "ids" else ()
        grows = () if cache is None else (cache.axis, cache.buffer)
        inputs.append(Input(name, value.dtype, dims, role, limit, image, markers, *grows))
        if cache is not None and cache.output is not None:
            presents[name] = cache.output.name or ""
    ops = {node.op_type for node in graph.all_nodes()}
    return Interface(tuple(inputs), presents, not ops & _NO_LEFT_PADDING, lengths(graph))


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _role(value: ir.Value) -> str:
    name = (value.name or "").lower()
    integer = value.dtype in INTEGERS
    if name == "use_cache_branch":
        return "branch"
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


def _width(value: ir.Value) -> int | None:
    """Work out the width of features that a linear layer reads."""
    for node, index in value.uses():
        if node.op_type == "Cast":
            return _width(node.outputs[0])
        weight = node.inputs[1] if node.op_type == "MatMul" and index == 0 else None
        if weight is not None and weight.shape is not None and len(weight.shape) == 2:
            rows = weight.shape[0]
            return rows if isinstance(rows, int) else None
    return None


def _limit(value: ir.Value) -> int:
    """Find the smallest table that a value indexes: the bound of its numbers."""
    rows = []
    for node, index in value.uses():
        if node.op_type in _CARRIERS and index == 0:
            rows += [_limit(output) for output in node.outputs]
        elif node.op_type == "Gather" and index == 1:
            table = node.inputs[0]
            axis = node.attributes.get("axis")
            if table is not None and table.shape is not None and len(table.shape) == 2:
                size = table.shape[0 if axis is None else axis.as_int()]
                rows.append(size if isinstance(size, int) else 0)
    return min((n for n in rows if n > 0), default=0)


def _markers(value: ir.Value) -> Iterator[int]:
    for node, index in value.uses():
        if node.op_type in _CARRIERS and index == 0:
            yield from _markers(node.outputs[0])
        elif node.op_type == "Equal":
            number = scalar(node.inputs[1 - index])
            if number is not None and number >= 0:
                yield int(number)


def _logits_width(graph: ir.Graph) -> int:
    shape = graph.outputs[0].shape if graph.outputs else None
    last = shape[-1] if shape is not None and len(shape) > 1 else None
    return last if isinstance(last, int) else 0
