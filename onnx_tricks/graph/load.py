"""Reading a model: checked, sorted, its weights left where they are until someone asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir

from onnx_tricks.errors import ModelError
from onnx_tricks.graph.check import check_model
from onnx_tricks.graph.external import DataFiles
from onnx_tricks.graph.file_tensor import FileTensor
from onnx_tricks.graph.layout import DataLayout
from onnx_tricks.graph.protobuf import EMBEDDED, read_proto
from onnx_tricks.graph.traverse import bodies, initializers

__all__ = ["LoadedModel", "load_model"]

_DEFAULTS_SINCE = 4  # the IR version since which initializers need not be inputs
_TENSOR_ATTRIBUTES = (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model and how its file stores the weights.

    Attributes:
        model: The model. Weights are `FileTensor`s; they are valid while their files are there.
        layout: How the weights are stored, for writing the result likewise.
    """

    model: ir.Model
    layout: DataLayout


def load_model(path: Path) -> LoadedModel:
    """Read and check an ONNX model; weights stay in their files.

    Time and memory follow the size of the graph, not that of the weights. Links to the model and
    to its data files are followed.

    Args:
        path: The .onnx file; external data lies beside it.

    Returns:
        The model, its nodes in topological order, and the layout of its weights.

    Raises:
        ModelError: The file is missing, is not ONNX, is truncated or broken, or its external data
            is missing, too short or outside the model's folder.
    """
    data = DataFiles(path)
    try:
        proto = read_proto(path)
        _normalize(proto)
        in_order = check_model(proto, data)
        model = ir.serde.deserialize_model(proto)
        if not in_order:
            _sort(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ModelError(f"{path}: subgraphs are nested too deeply") from error
    except ir.serde.SerdeError as error:
        raise ModelError(f"{path}: the model is broken: {_root_cause(error)}") from error
    return LoadedModel(model, _attach_weights(model, data))


def _normalize(proto: onnx.ModelProto) -> None:
    """Spell in today's way what older or other tools spell otherwise."""
    for body in (proto, *proto.functions):
        for entry in body.opset_import:
            if entry.domain == "ai.onnx":  # a second name of the default domain
                entry.domain = ""
    if 0 < proto.ir_version < _DEFAULTS_SINCE:
        # Every initializer had to be listed as an input then, and none could be overridden.
        weights = {tensor.name for tensor in proto.graph.initializer}
        inputs = [value for value in proto.graph.input if value.name not in weights]
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
        proto.ir_version = _DEFAULTS_SINCE


def _sort(model: ir.Model) -> None:
    for graph in bodies(model):
        try:
            graph.sort()
        except ValueError as error:
            raise ModelError("the graph has a cycle: nodes read what depends on them") from error


def _attach_weights(model: ir.Model, data: DataFiles) -> DataLayout:
    """Replace external tensors by file tensors; what they tell of the layout is returned."""
    sizes: dict[str, dict[int, int]] = {}

    def attached(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        if not tensor.nbytes:  # onnx_ir cannot write external tensors of no bytes
            return ir.Tensor(
                tensor.numpy(),
                tensor.dtype,
                name=tensor.name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
        location = str(tensor.location)
        if location == EMBEDDED:
            return FileTensor(data.model.resolve(), tensor)
        # Weights that share their bytes start at the same offset, and count once.
        sizes.setdefault(location, {})[tensor.offset or 0] = tensor.nbytes
        return FileTensor(data.find(location)[0], tensor)

    for value in initializers(model):
        if value.const_value is not None:
            value.const_value = attached(value.const_value)
    for body in bodies(model):
        for node in body.all_nodes():
            for attribute in list(node.attributes.values()):
                if not attribute.is_ref() and attribute.type in _TENSOR_ATTRIBUTES:
                    mapped = _mapped(attribute, attached)
                    if mapped.value is not attribute.value:
                        node.attributes.add(mapped)
    if len(sizes) < 2:
        return DataLayout(tuple(sizes))
    return DataLayout(tuple(sizes), max(sum(parts.values()) for parts in sizes.values()))


def _mapped(
    attribute: ir.Attr, function: Callable[[ir.TensorProtocol], ir.TensorProtocol]
) -> ir.Attr:
    if attribute.type == ir.AttributeType.TENSOR:
        mapped: object = function(attribute.value)  # as_tensor() looks at the whole protocol
    else:
        mapped = [function(tensor) for tensor in attribute.as_tensors()]
    return ir.Attr(attribute.name, attribute.type, mapped, doc_string=attribute.doc_string)


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
