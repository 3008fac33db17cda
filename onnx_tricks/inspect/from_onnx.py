"""What a decode step reads, and the dimensions of a model, told from its graph alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from onnx_tricks.graph.caches import find_caches
from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.inspect.dimensions import Attention, Dimensions
from onnx_tricks.inspect.traffic import Amount, Cache, Traffic

__all__ = [
    "find_decode_step",
    "graph_dimensions",
    "graph_traffic",
    "has_tied_head",
    "item_bytes",
    "keeps_cache",
]

_MICROSOFT = "com.microsoft"
_CROSS = re.compile(r"encoder|cross", re.IGNORECASE)
_KEY = re.compile(r"key(?!_values)", re.IGNORECASE)
# Operators that read rows of a table, and the inputs that are tables.
_TABLES: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "Gather"): (0,),
    ("", "RotaryEmbedding"): (1, 2),
    (_MICROSOFT, "RotaryEmbedding"): (2, 3),
    (_MICROSOFT, "GroupQueryAttention"): (7, 8),
    (_MICROSOFT, "EmbedLayerNormalization"): (2, 3, 4),
    (_MICROSOFT, "GatherBlockQuantized"): (0, 2, 3),
}


def find_decode_step(models: dict[Path, ir.Model]) -> Path:
    """The file that generates one token after another.

    Of the files that Optimum writes for one decoder this is the one for a step with caches; a model
    without any cache is taken as it is.
    """

    def rank(path: Path) -> tuple[bool, bool, bool, str]:
        cached = keeps_cache(models[path])
        return (not cached, "with_past" not in path.name, "encoder" in path.name, path.name)

    return min(models, key=rank)


def keeps_cache(model: ir.Model) -> bool:
    """Whether a model has a key/value cache among its inputs."""
    return bool(find_caches(model))


def graph_traffic(model: ir.Model, encoder_tokens: int | None = None) -> Traffic:
    """What a step of the graph reads.

    Every stored number that an operator reads counts once, a table of which rows are looked up with
    one row for each token. Of a decoder that chooses between a prompt and a step at run time
    (``decoder_model_merged``) the step counts. Experts count in full: which are chosen only data
    can tell.

    Args:
        model: The model; its functions are inlined.
        encoder_tokens: Length of the encoder output where it is fixed.
    """
    weights = rows = Amount()
    graphs = {id(graph) for graph in _running(model.graph)}
    for graph in _running(model.graph):
        for value in _stored(graph):
            tensor = stored_tensor(value)
            if tensor is None or not _is_weight(value, tensor):
                continue
            amount = Amount(tensor.size * tensor.dtype.is_floating_point(), tensor.nbytes)
            axes = {_row_axis(*use) for use in _uses(value, graphs)}
            for axis in axes:
                if axis is None:
                    weights += amount
                else:
                    rows += amount * (1 / int(tensor.shape.numpy()[axis]))
    return Traffic(weights=weights, rows=rows, caches=tuple(_caches(model, encoder_tokens)))


def graph_dimensions(model: ir.Model) -> Dimensions | None:
    """The dimensions that the graph of a decoder shows; None where they are not all to be seen.

    Nothing tells the number of query heads, the feed-forward blocks or the positions.
    """
    keys = [
        value
        for value in find_caches(model)
        if _KEY.search(value.name or "") and _kind(value) == "self"
    ]
    tables = [
        (tensor, axis)
        for value in _stored(model.graph)
        if (tensor := stored_tensor(value)) is not None and len(tensor.shape) == 2
        for use in _uses(value, None)
        if (axis := _row_axis(*use)) is not None
    ]
    shape = keys[0].shape if keys else None
    if not tables or shape is None or len(shape) != 4:
        return None
    kv_heads, head_width = shape[1], shape[3]
    if not isinstance(kv_heads, int) or not isinstance(head_width, int):
        return None
    table, axis = max(tables, key=lambda found: found[0].size)
    lengths = [int(length) for length in table.shape.numpy()]
    vocabulary = lengths.pop(axis)
    width = lengths.pop()
    return Dimensions(
        model_type="",
        width=width,
        layers=len(keys),
        vocabulary=vocabulary,
        attention=Attention(0, kv_heads, head_width, "unknown"),
        ffn=None,
    )


def has_tied_head(model: ir.Model) -> bool:
    """Whether an output projection reads the table in which tokens are looked up."""
    for graph in model.graphs():
        for value in _stored(graph):
            tensor = stored_tensor(value)
            if tensor is not None and len(tensor.shape) == 2:
                axes = {_row_axis(*use) for use in _uses(value, None)}
                if None in axes and len(axes) > 1:
                    return True
    return False


def item_bytes(model: ir.Model) -> tuple[int, int]:
    """Bytes of one weight (of the type that most bytes are stored in) and of one cached number."""
    stored: dict[ir.DataType, int] = {}
    for graph in model.graphs():
        for value in _stored(graph):
            tensor = stored_tensor(value)
            if tensor is not None and tensor.dtype.is_floating_point():
                stored[tensor.dtype] = stored.get(tensor.dtype, 0) + tensor.nbytes
    weight = max(stored, key=lambda dtype: stored[dtype], default=ir.DataType.FLOAT)
    caches = [value.dtype for value in find_caches(model) if value.dtype]
    return int(weight.itemsize), int(caches[0].itemsize if caches else weight.itemsize)


def _running(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graph and those subgraphs that run in a step with caches."""
    yield graph
    for node in graph:
        chosen = node.op_type == "If" and node.inputs[0] in graph.inputs
        for name, attribute in node.attributes.items():
            if attribute.is_ref() or (chosen and name != "then_branch"):
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _running(attribute.as_graph())


def _stored(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()
    yield from (node.outputs[0] for node in graph if node.op_type == "Constant")


def _uses(value: ir.Value, graphs: set[int] | None) -> Iterator[tuple[ir.Node, int, bool]]:
    """The operators that read a stored value, which input it is, and whether it is transposed."""
    for node, index in value.uses():
        if graphs is not None and id(node.graph) not in graphs:
            continue
        if node.domain != "" or node.op_type not in ("Identity", "Cast", "Transpose"):
            yield node, index, False
            continue
        for reader, position, transposed in _uses(node.outputs[0], graphs):
            yield reader, position, transposed != (node.op_type == "Transpose")


def _row_axis(node: ir.Node, index: int, transposed: bool) -> int | None:
    """The axis along which rows of a table are looked up; None where an operator reads it whole."""
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) != 0:
        return None
    if index not in _TABLES.get((node.domain, node.op_type), ()):
        return None
    return -1 if transposed else 0


def _is_weight(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    """Floating-point numbers, and integers that stand for them in a quantised operator."""
    if tensor.dtype.is_floating_point():
        return len(tensor.shape) > 0
    if tensor.dtype.bitwidth > 8 or len(tensor.shape) < 2:
        return False
    readers = (node.op_type for node, _ in value.uses())
    return any("MatMul" in name or "Quant" in name or "Linear" in name for name in readers)


def _kind(value: ir.Value) -> Literal["self", "cross"]:
    return "cross" if _CROSS.search(value.name or "") else "self"


def _caches(model: ir.Model, encoder_tokens: int | None) -> Iterator[Cache]:
    kept = {"self": Amount(), "cross": Amount()}
    for value in find_caches(model):
        if value.dtype is None or value.shape is None:
            continue
        # [batch, heads, tokens, width]: two axes grow, the others say what a token takes.
        fixed = [length for length in value.shape[1:] if isinstance(length, int)]
        if len(fixed) != len(value.shape) - 2:
            return
        values = math.prod(fixed)
        kept[_kind(value)] += Amount(values, int(values * value.dtype.itemsize))
    if kept["self"].values:
        yield Cache("self", kept["self"])
    if kept["cross"].values:
        yield Cache("cross", kept["cross"], tokens=encoder_tokens)
