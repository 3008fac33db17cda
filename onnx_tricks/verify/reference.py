"""Raise a graph to float64: the same function of the same weights, without the rounding."""

from __future__ import annotations

import collections
import functools

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnx_tricks.errors import TricksError
from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.graph.shapes import annotate, dtype_of
from onnx_tricks.runtime.sessions import Session, SessionError
from onnx_tricks.verify.expand import expand

__all__ = ["CannotRaise", "raise_to_double"]

_NARROW = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# Ops that copy elements: on weights, they may as well do so before the cast.
_MOVING = frozenset(
    {"Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
_LONGEST_DECISION = 20
_LINEAR = frozenset({"Einsum", "Gemm", "MatMul"})
# The opset from which on the operators of an expansion take their sizes as inputs.
_EXPANDED = 11
# Attributes that name the type in which an op computes inside, whatever the type of its inputs.
_INNER_TYPES = ("stash_type", "softmax_precision")


class CannotRaise(TricksError):  # noqa: N818 - a refusal, not a failure
    """A graph has no float64 form that ONNX Runtime can run."""


def raise_to_double(model: ir.Model) -> collections.Counter[str]:
    """Raise a model to float64, in place.

    Every floating value that an op computes becomes a double. Weights and constants keep their
    type and are cast where they are read: what the file says is what is computed with. An op
    without a double kernel runs in float32 between casts; where the model itself is in half
    precision that is still far more exact.

    Args:
        model: The model to raise. Functions are inlined.

    Returns:
        How often an op had to stay in float32, by op type.

    Raises:
        CannotRaise: The runtime has neither a double nor a float32 kernel for an op, or the model
            consists mostly of ops that would stay in float32, or is in float64 already.
    """
    if model.functions:
        common_passes.InlinePass()(model)
    annotate(model)
    raiser = _Raiser(model.opset_imports)
    raiser.graph(model.graph)
    common_passes.NameFixPass()(model)  # what was put into a branch may be named as outside
    if not raiser.raised:
        raise CannotRaise("it holds nothing narrower than float64")
    linear = sum(node.op_type in _LINEAR for node in model.graph.all_nodes())
    if sum(raiser.narrow.values()) > linear:
        raise CannotRaise(f"too much of it has float32 kernels only ({', '.join(raiser.narrow)})")
    return raiser.narrow


class _Raiser:
    """Walks a graph in order, keeping the type that every value has after raising."""

    def __init__(self, opsets: dict[str, int]) -> None:
        self.opsets = opsets
        self.types: dict[ir.Value, ir.DataType | None] = {}
        self.narrow: collections.Counter[str] = collections.Counter()
        self.raised = False
        self.decisions: set[ir.Node] = set()

    def graph(self, graph: ir.Graph, *, inner: bool = False) -> None:
        for value in graph.initializers.values():
            self.types[value] = value.dtype
        for value in graph.inputs:
            if not value.is_initializer():
                self.raised |= value.dtype in _NARROW
                self._set(value, ir.DataType.DOUBLE if value.dtype in _NARROW else value.dtype)
        self.decisions |= _decisions(graph)
        for node in list(graph):
            self._node(node)
        for index, value in enumerate(graph.outputs):
            # Both branches of an If have to agree.
            if inner and self.types.get(value) in _NARROW:
                cast = _cast(value, ir.DataType.DOUBLE)
                graph.append(cast)
                graph.outputs[index] = cast.outputs[0]
                self._set(cast.outputs[0], ir.DataType.DOUBLE)

    def _set(self, value: ir.Value, dtype: ir.DataType | None) -> None:
        self.types[value] = dtype
        value.type = None if dtype is None else ir.TensorType(dtype)

    def _node(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and node.domain == "":
            self._set(node.outputs[0], _constant_type(node))
            return
        if node in self.decisions:
            for output in node.outputs:
                self._set(output, dtype_of(output))
            return
        if any(attr.type == ir.AttributeType.GRAPH for attr in node.attributes.values()):
            self._control_flow(node)
            return
        if node.op_type == "Cast" and _dtype(node, "to") in _NARROW:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.DOUBLE)
        for name in _INNER_TYPES:
            if name in node.attributes:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.DOUBLE)
        expansion = expand(node) if self.opsets.get("", _EXPANDED) >= _EXPANDED else []
        if expansion:
            graph = _graph_of(node)
            graph.insert_before(node, expansion)
            graph.remove(node)
            for part in expansion:
                self._node(part)
            return
        now = tuple(None if v is None else self.types.get(v) for v in node.inputs)
        self.raised |= not _NARROW.isdisjoint(now)
        for wide in (ir.DataType.DOUBLE, ir.DataType.FLOAT):
            wanted = tuple(wide if t in _FLOATING else t for t in now)
            if node.op_type in _MOVING and not set(now) & {ir.DataType.DOUBLE}:
                wanted = now
            outputs = _output_types(_alone(node, self.opsets, wanted))
            if outputs is not None:
                break
        else:
            raise CannotRaise(f"{node.op_type} has no float64 or float32 kernel")
        if wide is ir.DataType.FLOAT:
            self.narrow[node.op_type] += 1
        for index, (have, want) in enumerate(zip(now, wanted, strict=True)):
            value = node.inputs[index]
            if value is not None and have != want and want is not None:
                cast = _cast(value, want)
                _graph_of(node).insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
                self._set(cast.outputs[0], want)
        for value, dtype in zip(node.outputs, outputs, strict=True):
            self._set(value, dtype)

    def _control_flow(self, node: ir.Node) -> None:
        if node.op_type != "If":
            raise CannotRaise(f"{node.op_type} nodes are not raised")
        for attr in node.attributes.values():
            if attr.type == ir.AttributeType.GRAPH:
                self.graph(attr.as_graph(), inner=True)
                branch = attr.as_graph()
        for value, result in zip(node.outputs, branch.outputs, strict=True):
            self._set(value, self.types[result])


def _decisions(graph: ir.Graph) -> set[ir.Node]:
    """The float nodes by which integers become other integers, as positions become buckets.

    Such a step (`Log` between two casts in T5) is part of what the model says, down to its
    rounding: in float64 a position on the edge would fall into another bucket.
    """
    found: set[ir.Node] = set()
    for last in graph:
        if last.op_type != "Cast" or ir.DataType(last.attributes["to"].as_int()) in _FLOATING:
            continue
        chain: set[ir.Node] = set()
        pending = [last.inputs[0]]
        while pending:
            value = pending.pop()
            integer = value is not None and dtype_of(value) not in {*_FLOATING, None}
            if value is None or integer or stored_tensor(value) is not None:
                continue
            node = value.producer()
            if node is None or len(chain) > _LONGEST_DECISION:
                break  # weights or activations have a part in it
            if node not in chain:
                chain.add(node)
                pending += node.inputs
        else:
            found |= chain | ({last} if chain else set())
    return found


_FLOATING = _NARROW | {ir.DataType.DOUBLE}


def _graph_of(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    return ir.node("Cast", [value], {"to": dtype})


def _dtype(node: ir.Node, attribute: str) -> ir.DataType | None:
    attr = node.attributes.get(attribute)
    return None if attr is None else ir.DataType(attr.as_int())


def _constant_type(node: ir.Node) -> ir.DataType | None:
    if "value" in node.attributes:
        dtype: ir.DataType = node.attributes["value"].value.dtype
        return dtype
    kinds = {"value_float": ir.DataType.FLOAT, "value_floats": ir.DataType.FLOAT}
    kinds |= {"value_int": ir.DataType.INT64, "value_ints": ir.DataType.INT64}
    return next((dtype for name, dtype in kinds.items() if name in node.attributes), None)


def _alone(node: ir.Node, opsets: dict[str, int], inputs: tuple[ir.DataType | None, ...]) -> bytes:
    """Serialise a model of just this node, its inputs typed as given, its names neutral."""
    proto = ir.to_proto(node)
    assert isinstance(proto, onnx.NodeProto)
    kept = [f"x{i}" if name else "" for i, name in enumerate(proto.input)]
    made = [f"y{i}" if name else "" for i, name in enumerate(proto.output)]
    del proto.input[:], proto.output[:], proto.metadata_props[:]
    proto.input.extend(kept)
    proto.output.extend(made)
    proto.name = proto.doc_string = ""
    infos = [
        onnx.helper.make_tensor_value_info(name, int(dtype), None)
        for name, dtype in zip(kept, inputs, strict=True)
        if name and dtype is not None
    ]
    results = [onnx.helper.make_empty_tensor_value_info(name) for name in made if name]
    graph = onnx.helper.make_graph([proto], "probe", infos, results)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    serialised: bytes = model.SerializeToString(deterministic=True)
    return serialised


@functools.lru_cache(maxsize=4096)
def _output_types(probe: bytes) -> tuple[ir.DataType | None, ...] | None:
    """Ask ONNX Runtime itself whether it can run a node, and what types come out."""
    model = ir.from_proto(onnx.ModelProto.FromString(probe))
    try:
        session = Session(model, optimised=False, threads=1)
    except SessionError:
        return None
    node = next(iter(model.graph))
    return tuple(
        _ORT_TYPES.get(session.outputs[value.name]) if value.name else None
        for value in node.outputs
    )


_ORT_TYPES = {
    f"tensor({name})": dtype
    for name, dtype in {
        "bfloat16": ir.DataType.BFLOAT16,
        "bool": ir.DataType.BOOL,
        "double": ir.DataType.DOUBLE,
        "float": ir.DataType.FLOAT,
        "float16": ir.DataType.FLOAT16,
        **{f"int{n}": ir.DataType[f"INT{n}"] for n in (8, 16, 32, 64)},
        **{f"uint{n}": ir.DataType[f"UINT{n}"] for n in (8, 16, 32, 64)},
    }.items()
}
