"""Writing a model: one weight at a time, so that memory follows the largest and not their sum."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, cast

import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError

from onnx_tricks.errors import ModelError, PassError
from onnx_tricks.graph.disk import require_space, writing
from onnx_tricks.graph.file_tensor import FileTensor
from onnx_tricks.graph.layout import DataLayout
from onnx_tricks.graph.protobuf import PROTOBUF_LIMIT, STREAMED_BYTES, length_delimited
from onnx_tricks.graph.traverse import initializers

__all__ = ["save_model"]

_TOO_LARGE = (
    "the graph alone, without its initializers, is larger than a protobuf file can be: large "
    "constants must be initializers"
)
_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a weight's bytes go: a data file and an offset in it."""

    location: str
    offset: int


def save_model(model: ir.Model, path: Path, layout: DataLayout | None = None) -> None:
    """Write a model, evaluating each lazy weight once and keeping none.

    The same model gives the same bytes. The files are written in place, not atomically: a caller
    that replaces a model writes into a `Staging` first. The model is not changed.

    Args:
        model: The model.
        path: The .onnx file to write; external data goes beside it.
        layout: How to store the weights; within the file unless given. A model beyond what a
            protobuf file can hold gets external data whatever the layout says.

    Raises:
        UsageError: The files cannot be written, or the disk has too little space.
        ModelError: What is not an initializer is beyond what a protobuf file can hold.
        PassError: A lazy weight is not of the size it announced.
    """
    layout = layout or DataLayout()
    with writing(path):
        if not layout.locations and not _write_embedded(model, path):
            layout = DataLayout((f"{path.name}.data",))
        if layout.locations:
            _write_external(model, path, layout)


def _write_embedded(model: ir.Model, path: Path) -> bool:
    """Write the weights into the .onnx file, or return False if they are too large for it."""
    if sum(tensor.nbytes for tensor in _all_weights(model)) > PROTOBUF_LIMIT:
        return False
    weights = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and _is_streamed(value.const_value)
    }
    proto = _serialize(model, {id(weight): _Place("", 0) for weight in weights.values()})
    entries = [_Entry(tensor, weights.get(tensor.name)) for tensor in proto.graph.initializer]
    del proto.graph.initializer[:]
    graph = _encode(proto.graph)
    proto.ClearField("graph")
    rest = _encode(proto)
    graph_size = len(graph) + sum(entry.size for entry in entries)
    head = rest + length_delimited(_GRAPH, graph_size) + graph
    size = len(rest) + len(length_delimited(_GRAPH, graph_size)) + graph_size
    if size > PROTOBUF_LIMIT:
        return False
    require_space(path.parent, size)
    with path.open("wb") as file:
        file.write(head)
        for entry in entries:
            entry.write(file)
    return True


class _Entry:
    """An initializer in the wire format: what precedes its raw bytes, and these."""

    def __init__(self, proto: onnx.TensorProto, weight: ir.TensorProtocol | None) -> None:
        self.weight = weight
        body = b""
        if weight is not None:
            proto.ClearField("external_data")
            proto.ClearField("data_location")
            body = length_delimited(_RAW_DATA, weight.nbytes)
        body = proto.SerializeToString(deterministic=True) + body
        nbytes = 0 if weight is None else weight.nbytes
        self.head = length_delimited(_INITIALIZER, len(body) + nbytes) + body
        self.size = len(self.head) + nbytes

    def write(self, file: BinaryIO) -> None:
        file.write(self.head)
        if self.weight is not None:
            _write_weight(self.weight, file)


def _write_external(model: ir.Model, path: Path, layout: DataLayout) -> None:
    weights = [tensor for tensor in _all_weights(model) if _is_streamed(tensor)]
    places, files = _arrange(weights, layout)
    proto = _encode(_serialize(model, places))
    data_size = sum(weight.nbytes for held in files.values() for weight in held)
    require_space(path.parent, len(proto) + data_size)
    for location, held in files.items():
        target = path.parent / location
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            for weight in held:
                _write_weight(weight, file)
    path.write_bytes(proto)


def _arrange(
    weights: Sequence[ir.TensorProtocol], layout: DataLayout
) -> tuple[dict[int, _Place], dict[str, list[ir.TensorProtocol]]]:
    """Places by the weights' ids, and the weights that each data file holds, densely, in order.

    Weights that share their bytes (one tensor, or one place in the input) are written once.
    """
    places: dict[int, _Place] = {}
    shared: dict[object, _Place] = {}
    files: dict[str, list[ir.TensorProtocol]] = {}
    locations = iter(layout.locations)
    location, offset = next(locations), 0
    for weight in weights:
        source: object = id(weight)
        if isinstance(weight, FileTensor):
            source = (weight.path, weight.offset, weight.nbytes)
        if source not in shared:
            full = layout.shard_bytes is not None and offset + weight.nbytes > layout.shard_bytes
            if full and offset:
                # The last file takes what is left if a pass has added weights.
                following = next(locations, None)
                location, offset = (following, 0) if following else (location, offset)
            shared[source] = _Place(location, offset)
            files.setdefault(location, []).append(weight)
            offset += weight.nbytes
        places[id(weight)] = shared[source]
    return places, files


def _all_weights(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Initializers of all graphs, subgraphs and functions."""
    for value in initializers(model):
        weight = value.const_value
        if weight is not None and weight.dtype != ir.DataType.STRING:
            yield weight


def _is_streamed(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= STREAMED_BYTES


def _serialize(model: ir.Model, places: Mapping[int, _Place]) -> onnx.ModelProto:
    """The model, with entries of external data for the weights that have a place."""
    replaced: list[tuple[ir.Value, ir.TensorProtocol]] = []
    try:
        for value in initializers(model):
            weight = value.const_value
            if weight is not None and id(weight) in places:
                replaced.append((value, weight))
                value.const_value = _entry(weight, places[id(weight)])
        proto = ir.serde.serialize_model(model)
    finally:
        for value, weight in replaced:
            value.const_value = weight
    _drop_restatements(proto.graph)
    return proto


def _drop_restatements(graph: onnx.GraphProto) -> None:
    """Drop what onnx_ir writes of every initializer beside itself: its dtype and shape."""
    names = {tensor.name for tensor in graph.initializer}
    kept = [
        value
        for value in graph.value_info
        if value.name not in names or value.doc_string or value.metadata_props
    ]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _entry(weight: ir.TensorProtocol, place: _Place) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        place.location,
        place.offset,
        weight.nbytes,
        weight.dtype,
        shape=ir.Shape(weight.shape.numpy()),
        name=weight.name or "",
        doc_string=weight.doc_string,
        metadata_props=dict(weight.metadata_props),
    )


def _encode(proto: onnx.ModelProto | onnx.GraphProto) -> bytes:
    try:
        encoded: bytes = proto.SerializeToString(deterministic=True)
    except EncodeError as error:
        raise ModelError(_TOO_LARGE) from error
    if len(encoded) > PROTOBUF_LIMIT:
        raise ModelError(_TOO_LARGE)
    return encoded


def _write_weight(weight: ir.TensorProtocol, file: BinaryIO) -> None:
    start = file.tell()
    cast("ir.LazyTensor", weight).tofile(file)
    written = file.tell() - start
    if written != weight.nbytes:
        raise PassError(
            f"weight {weight.name!r} was announced with {weight.nbytes} bytes and has {written}; "
            "this is a defect of the pass that made it"
        )
