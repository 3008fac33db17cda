"""Shapes and types of values, inferred once where the exporter left them out.

What is inferred stays beside the model (`Value.meta`) and is never written to the file.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

__all__ = ["annotate", "dim", "dtype_of", "rank_of", "shape_of"]

_SHAPE = "onnx_tricks.shape"
_DTYPE = "onnx_tricks.dtype"
_SHAPE_INPUT = {"ConstantOfShape": 0, "Reshape": 1}  # which input holds the shape of the output
# Operators of ONNX Runtime whose results, the first and the sum of a skip, are of the first shape.
_ALIKE = frozenset(
    "BiasGelu FastGelu Gelu QuickGelu SimplifiedLayerNormalization SkipLayerNormalization "
    "SkipSimplifiedLayerNormalization".split()
)
_OF_RUNTIME = ("", "com.microsoft")  # where they live
_RESULTS = (0, 3)
_ROUNDS = 3  # a shape may be computed from the rank of what a shape was computed for
_LARGE = 1024  # bytes; larger constants go to shape inference without their data


def shape_of(value: ir.Value) -> ir.Shape | None:
    """The shape that the file states or that `annotate` inferred."""
    if value.shape is not None:
        return value.shape
    if value.const_value is not None:
        return ir.Shape(value.const_value.shape.numpy())
    shape = value.meta.get(_SHAPE)
    return shape if isinstance(shape, ir.Shape) else None


def rank_of(value: ir.Value) -> int | None:
    """Number of axes, or None when unknown."""
    shape = shape_of(value)
    return None if shape is None else len(shape)


def dim(value: ir.Value, axis: int) -> int | None:
    """Length of one axis (counted from the end when negative), or None when it is not static."""
    shape = shape_of(value)
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    length = shape[axis]
    return length if isinstance(length, int) else None


def dtype_of(value: ir.Value) -> ir.DataType | None:
    """Element type that the file states or that `annotate` inferred."""
    if value.dtype is not None:
        return value.dtype
    if value.const_value is not None:
        return value.const_value.dtype
    dtype = value.meta.get(_DTYPE)
    return dtype if isinstance(dtype, ir.DataType) else None


def annotate(model: ir.Model) -> None:
    """Infer the shapes and types that the file leaves out, for `shape_of` and `dtype_of`.

    ONNX's own inference runs on a copy of the graph without weights. What it cannot tell stays
    unknown; a graph that it rejects stays as the file states it.
    """
    if all(_known(value) for value in _values(model)):
        return
    skeleton = model.clone()
    ours = _name_apart(model, skeleton)
    _drop_weights(skeleton)
    _stand_in(skeleton)
    inferred = _inferred(skeleton)
    # Below opset 14 inference knows nothing of what lies behind a computed Reshape.
    for _ in range(_ROUNDS):
        if inferred is None or not _state_ranks(inferred):
            break
        skeleton, inferred = inferred, _inferred(inferred)
    done = inferred or skeleton
    for other in (*done.graph.inputs, *_values(done)):
        value = ours.get(other.name or "")
        if value is None:
            continue
        if other.shape is not None:
            value.meta[_SHAPE] = other.shape
        if other.dtype is not None:
            value.meta[_DTYPE] = other.dtype


def _inferred(model: ir.Model) -> ir.Model | None:
    """A copy with shapes and types; None where ONNX rejects the model."""
    try:
        proto = onnx.shape_inference.infer_shapes(
            ir.to_proto(model), check_type=False, strict_mode=False, data_prop=True
        )
        return ir.from_proto(proto)
    except Exception:  # noqa: BLE001 - inference is a help; a pass asks for what it needs
        return None


def _name_apart(model: ir.Model, copy: ir.Model) -> dict[str, ir.Value]:
    """Name all values of a copy apart: which value of the model each name is.

    Branches may use the same names for their own values, and inference then takes the shapes that
    one branch computes for those of another.
    """
    named: dict[str, ir.Value] = {}
    for value, twin in zip(_values(model), _values(copy), strict=True):
        if twin.name:
            twin.name = f"onnx_tricks.value.{len(named)}"
            named[twin.name] = value
    return named


def _stand_in(model: ir.Model) -> None:
    """Put what ONNX knows in the place of operators that it does not, as far as shapes go."""
    for node in list(model.graph.all_nodes()):
        if node.op_type not in _ALIKE or node.domain not in _OF_RUNTIME:
            continue
        results = [value for value in node.outputs if value.name]
        if node.graph is None or any(value.index() not in _RESULTS for value in results):
            continue
        for value in results:
            alike = ir.Node("", "Identity", node.inputs[:1], num_outputs=1)
            alike.outputs[0].name = value.name
            node.graph.insert_before(node, alike)
            value.replace_all_uses_with(alike.outputs[0], replace_graph_outputs=True)
        node.graph.remove(node)


def _state_ranks(model: ir.Model) -> bool:
    """State the ranks that follow from the lengths of shapes; whether there were any."""
    found = False
    for value in _values(model):
        node = value.producer()
        assert node is not None
        place = _SHAPE_INPUT.get(node.op_type) if node.domain == "" else None
        known = value.shape is not None or value.dtype is None  # no shape is written without a type
        if place is None or known or len(node.inputs) <= place:
            continue
        wanted = node.inputs[place]
        length = dim(wanted, 0) if wanted is not None and rank_of(wanted) == 1 else None
        if length is not None:
            value.shape = ir.Shape([None] * length)
            found = True
    return found


def _values(model: ir.Model) -> list[ir.Value]:
    return [value for graph in model.graphs() for node in graph for value in node.outputs]


def _known(value: ir.Value) -> bool:
    return shape_of(value) is not None and dtype_of(value) is not None


def _drop_weights(model: ir.Model) -> None:
    """Turn every large constant into an input of the main graph, which needs no data.

    What stands in for a node has its name.
    """
    count = 0

    def as_input(value: ir.Value, tensor: ir.TensorProtocol) -> None:
        nonlocal count
        count += 1
        stand_in = ir.Value(
            name=value.name if value.producer() else f"onnx_tricks.weight.{count}",
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
        )
        model.graph.inputs.append(stand_in)
        value.replace_all_uses_with(stand_in)

    for graph in list(model.graphs()):
        for name, value in list(graph.initializers.items()):
            if value.const_value is None or value.const_value.nbytes <= _LARGE:
                continue
            if not value.is_graph_input() and not value.is_graph_output():
                as_input(value, value.const_value)
                del graph.initializers[name]
        for node in list(graph):
            attribute = node.attributes.get("value") if node.op_type == "Constant" else None
            if attribute is None or attribute.is_ref() or node.outputs[0].is_graph_output():
                continue
            tensor = attribute.as_tensor()
            if tensor.nbytes > _LARGE:
                as_input(node.outputs[0], tensor)
                graph.remove(node)
