"""Whether a ModelProto is one that can be optimised: names, types and sizes agree.

The checker of onnx knows every operator's schema and refuses models with others. What is needed
here is that nothing in a graph is ambiguous, that every weight has the bytes its shape asks for,
and that reading the model into onnx_ir and writing it back loses nothing.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import onnx
import onnx_ir as ir

from onnx_tricks.errors import ModelError
from onnx_tricks.graph.check_node import check_node
from onnx_tricks.graph.check_tensor import check_tensor
from onnx_tricks.graph.external import DataFiles

__all__ = ["check_model"]

_ATTRIBUTE_FIELDS = {
    onnx.AttributeProto.FLOAT: "f",
    onnx.AttributeProto.INT: "i",
    onnx.AttributeProto.STRING: "s",
    onnx.AttributeProto.TENSOR: "t",
    onnx.AttributeProto.GRAPH: "g",
    onnx.AttributeProto.TYPE_PROTO: "tp",
    onnx.AttributeProto.FLOATS: "floats",
    onnx.AttributeProto.INTS: "ints",
    onnx.AttributeProto.STRINGS: "strings",
    onnx.AttributeProto.TENSORS: "tensors",
    onnx.AttributeProto.GRAPHS: "graphs",
    onnx.AttributeProto.TYPE_PROTOS: "type_protos",
}
_VALUE_FIELDS = {*_ATTRIBUTE_FIELDS.values(), "sparse_tensor", "sparse_tensors"}
_DTYPES = frozenset(ir.DataType)
# Absent numbers mean zero in protobuf; an absent tensor or graph means nothing at all.
_REQUIRED_FIELDS = ("t", "g", "tp")


class _Scope(NamedTuple):
    """The names of one graph: all that it defines, and those defined so far."""

    declared: frozenset[str]
    defined: set[str]


def check_model(model: onnx.ModelProto, data: DataFiles) -> bool:
    """Check that a model is unambiguous and whole.

    Args:
        model: The model; its entries of external data are reduced to location, offset and length.
        data: Where external data is looked up.

    Returns:
        Whether all graphs list their nodes in topological order.

    Raises:
        ModelError: Something is broken, ambiguous or not supported; the message says where.
    """
    if not model.HasField("graph"):
        raise ModelError("the file holds no graph: it is not an ONNX model")
    if model.ir_version < 1:
        raise ModelError("the file states no IR version: it is not an ONNX model")
    if not model.opset_import:
        raise ModelError("the model imports no operator set")
    _require_unique((entry.domain for entry in model.opset_import), "operator set", "the model")
    for entry in model.opset_import:
        if not 1 <= entry.version < 2**31:
            raise ModelError(f"operator set {entry.domain!r} has the version {entry.version}")
    if model.training_info:
        raise ModelError("the model holds training information, which is not supported")
    functions = [
        (function.domain, function.name, function.overload) for function in model.functions
    ]
    _require_unique(map("::".join, functions), "function", "the model")
    check = _Check(data, _opsets(model.opset_import))
    check.graph(model.graph, "the graph", ())
    for function in model.functions:
        check.function(function)
    return check.in_order


class _Check:
    """The walk over all graphs of one model."""

    def __init__(self, data: DataFiles, opsets: Mapping[str, int]) -> None:
        self.data = data
        self.opsets = opsets
        self.in_order = True

    def graph(self, graph: onnx.GraphProto, where: str, outer: Sequence[_Scope]) -> None:
        if graph.sparse_initializer:
            raise ModelError(f"{where} has sparse initializers, which are not supported")
        for tensor in graph.initializer:
            check_tensor(tensor, f"initializer {tensor.name!r}", self.data)
        for value in (*graph.input, *graph.value_info, *graph.output):
            _check_type(value.type, f"value {value.name!r}")
        inputs = [value.name for value in graph.input]
        weights = [tensor.name for tensor in graph.initializer]
        for names, what in ((inputs, "input"), (weights, "initializer")):
            _require_named(names, what, where)
            _require_unique(names, what, where)
        _require_agreement(graph)
        given = {*inputs, *weights}
        self.nodes(graph.node, given, [value.name for value in graph.output], where, outer)

    def function(self, function: onnx.FunctionProto) -> None:
        where = f"function {function.name!r}"
        _require_unique(function.input, "input", where)
        _require_unique(function.attribute, "attribute", where)
        for value in function.value_info:
            _check_type(value.type, f"value {value.name!r}")
        self.attributes(function.attribute_proto, where, ())
        self.opsets = _opsets(function.opset_import)
        self.nodes(function.node, set(function.input), function.output, where, ())

    def nodes(
        self,
        nodes: Sequence[onnx.NodeProto],
        given: set[str],
        outputs: Iterable[str],
        where: str,
        outer: Sequence[_Scope],
    ) -> None:
        """Check the nodes of a graph or function in which the names `given` are defined."""
        produced = [name for node in nodes for name in node.output if name]
        _require_unique((*given, *produced), "value", where)
        scopes = (*outer, _Scope(frozenset((*given, *produced)), given))
        for node in nodes:
            label = f"node {node.name!r} ({node.op_type})"
            if not node.op_type:
                raise ModelError(f"node {node.name!r} in {where} has no operator")
            for name in node.input:
                self.read(name, label, scopes)
            self.attributes(node.attribute, label, scopes)
            check_node(node, self.opsets, label)
            given.update(node.output)
        for name in outputs:
            if name not in scopes[-1].declared:
                raise ModelError(f"output {name!r} of {where} is defined by nothing in it")

    def read(self, name: str, where: str, scopes: Sequence[_Scope]) -> None:
        if not name:  # an optional input that is left out
            return
        scope = next((scope for scope in reversed(scopes) if name in scope.declared), None)
        if scope is None:
            raise ModelError(f"{where} reads {name!r}, which nothing defines")
        self.in_order &= name in scope.defined

    def attributes(
        self, attributes: Sequence[onnx.AttributeProto], where: str, scopes: Sequence[_Scope]
    ) -> None:
        names = [attribute.name for attribute in attributes]
        _require_named(names, "attribute", where)
        _require_unique(names, "attribute", where)
        for attribute in attributes:
            label = f"attribute {attribute.name!r} of {where}"
            if attribute.ref_attr_name:
                continue
            field = _ATTRIBUTE_FIELDS.get(attribute.type)
            if field is None:
                kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
                raise ModelError(f"{label} has the type {kind}, which is not supported")
            values = {entry.name for entry, _ in attribute.ListFields()} & _VALUE_FIELDS
            if values - {field} or (field in _REQUIRED_FIELDS and not values):
                raise ModelError(f"{label} has no value of its type")
            for tensor in [attribute.t] if field == "t" else attribute.tensors:
                check_tensor(tensor, label, self.data)
            for graph in [attribute.g] if field == "g" else attribute.graphs:
                self.graph(graph, f"the graph in {label}", scopes)
            for kind in [attribute.tp] if field == "tp" else attribute.type_protos:
                _check_type(kind, label)


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in imports}


def _check_type(kind: onnx.TypeProto, where: str) -> None:
    which = kind.WhichOneof("value")
    if which in ("sequence_type", "optional_type"):
        element = getattr(kind, which).elem_type
        if element.WhichOneof("value") is None:
            raise ModelError(f"{where} is a {which} of no element type")
        _check_type(element, where)
    elif which in ("tensor_type", "sparse_tensor_type"):
        number = getattr(kind, which).elem_type
        if number not in _DTYPES:
            raise ModelError(f"{where} has the unknown dtype {number}")
    elif which is not None:
        raise ModelError(f"{where} has the type {which}, which is not supported")


def _require_agreement(graph: onnx.GraphProto) -> None:
    """Initializers have the dtype and shape that inputs and value_info state for their names."""
    stated = {value.name: value.type for value in (*graph.value_info, *graph.input)}
    for tensor in graph.initializer:
        kind = stated.get(tensor.name)
        if kind is None or kind.WhichOneof("value") is None:
            continue
        dims = [
            d.dim_value if d.HasField("dim_value") else None for d in kind.tensor_type.shape.dim
        ]
        fits = len(dims) == len(tensor.dims) and all(
            dim in (None, actual) for dim, actual in zip(dims, tensor.dims, strict=True)
        )
        shaped = kind.tensor_type.HasField("shape")
        if kind.tensor_type.elem_type != tensor.data_type or (shaped and not fits):
            raise ModelError(
                f"initializer {tensor.name!r} of shape {list(tensor.dims)} and dtype "
                f"{ir.DataType(tensor.data_type).name} is declared with another"
            )


def _require_unique(names: Iterable[str], what: str, where: str) -> None:
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise ModelError(f"{where} defines the {what} {repeated[0]!r} twice")


def _require_named(names: Iterable[str], what: str, where: str) -> None:
    if not all(names):
        raise ModelError(f"{where} has an {what} without a name")
