"""The wire format of an ONNX file, as far as weights go: reading and writing a model around them.

Most of a model file is the `raw_data` of its initializers. Reading cuts it out and leaves an entry
that says where it lies, so that a parsed model costs what its nodes cost; writing puts it back in,
one tensor at a time. The format is that of https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import onnx
from google.protobuf.message import DecodeError, Message

from onnx_tricks.errors import ModelError

__all__ = ["EMBEDDED", "PROTOBUF_LIMIT", "STREAMED_BYTES", "length_delimited", "read_proto"]

PROTOBUF_LIMIT = 2**31 - 1
"""The most bytes that a protobuf message, and with it an .onnx file, can have."""

STREAMED_BYTES = 1024
"""Tensors of at least so many bytes are read and written on their own, apart from the graph."""

EMBEDDED = "\0"
"""Location of data that lies in the .onnx file itself: a string that cannot name a file."""

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
_ORT_FORMAT = b"ORTM"  # the file identifier of its flatbuffers, after four bytes

_GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
_INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER
_RAW_DATA = onnx.TensorProto.RAW_DATA_FIELD_NUMBER
_EXTERNAL = {
    onnx.TensorProto.EXTERNAL_DATA_FIELD_NUMBER,
    onnx.TensorProto.DATA_LOCATION_FIELD_NUMBER,
}


class _WireError(ValueError):
    """The bytes are not a protobuf message."""


class _Field(NamedTuple):
    """One field of a message: `[begin, end)` with its key, `[start, end)` its payload."""

    number: int
    kind: int
    begin: int
    start: int
    end: int


def read_proto(path: Path) -> onnx.ModelProto:
    """Parse a model file, leaving large initializers of the main graph in it.

    Returns:
        The model; the initializers that stay in the file are external, with location `EMBEDDED`.

    Raises:
        ModelError: There is no such file, or it is not a whole protobuf message.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ModelError("not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if status.st_size == 0:
            raise ModelError("the file is empty")
        if status.st_size > PROTOBUF_LIMIT:
            raise ModelError("not an ONNX model: an .onnx file cannot have more than 2 GiB")
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if data[4:8] == _ORT_FORMAT:
                raise ModelError(
                    "a model in ONNX Runtime's own format (.ort); give the .onnx file that it was "
                    "made from"
                )
            proto = onnx.ModelProto()
            proto.ParseFromString(_without_weights(data))
            _require_text(proto)
            return proto
    except OSError as error:
        raise ModelError(f"the file cannot be read: {error.strerror}") from error
    except (_WireError, DecodeError) as error:
        raise ModelError(f"not an ONNX model, or a truncated one: {error}") from error


def _require_text(message: Message) -> None:
    """Refuse strings that are not UTF-8: protobuf reads them as bytes and cannot write those."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in (value,) if isinstance(value, Message) else value:
                _require_text(part)
        elif field.type == field.TYPE_STRING:
            texts = (value,) if isinstance(value, str | bytes) else value
            if not all(isinstance(text, str) for text in texts):
                raise _WireError(f"the field {field.full_name} holds text that is not UTF-8")


def _without_weights(data: mmap.mmap) -> bytes:
    parts = []
    for field in _fields(data, 0, len(data)):
        if field.number == _GRAPH and field.kind == _LENGTH_DELIMITED:
            graph = _graph_without_weights(data, field)
            parts += [length_delimited(_GRAPH, len(graph)), graph]
        else:
            parts.append(data[field.begin : field.end])
    return b"".join(parts)


def length_delimited(number: int, size: int) -> bytes:
    """What precedes a payload of `size` bytes in field `number`."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(size)


def _graph_without_weights(data: mmap.mmap, graph: _Field) -> bytes:
    parts = []
    copied = graph.start
    for field in _fields(data, graph.start, graph.end):
        if (
            field.number == _INITIALIZER
            and field.kind == _LENGTH_DELIMITED
            and field.end - field.start >= STREAMED_BYTES
        ):
            tensor = _tensor_without_weights(data, field)
            parts += [data[copied : field.begin], length_delimited(_INITIALIZER, len(tensor))]
            parts.append(tensor)
            copied = field.end
    parts.append(data[copied : graph.end])
    return b"".join(parts)


def _tensor_without_weights(data: mmap.mmap, tensor: _Field) -> bytes:
    fields = list(_fields(data, tensor.start, tensor.end))
    raw = [field for field in fields if field.number == _RAW_DATA]
    external = any(field.number in _EXTERNAL for field in fields)
    if external or len(raw) != 1 or raw[0].end - raw[0].start < STREAMED_BYTES:
        return data[tensor.start : tensor.end]
    entry = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    place = {"location": EMBEDDED, "offset": raw[0].start, "length": raw[0].end - raw[0].start}
    for key, value in place.items():
        entry.external_data.add(key=key, value=str(value))
    # Concatenated messages are one message: the entry joins the fields that stay.
    rest = data[tensor.start : raw[0].begin] + data[raw[0].end : tensor.end]
    return rest + bytes(entry.SerializeToString(deterministic=True))


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[_Field]:
    position = start
    while position < end:
        begin = position
        key, position = _read_varint(data, position, end)
        number, kind = key >> 3, key & 7
        stop = position
        if kind == _LENGTH_DELIMITED:
            size, position = _read_varint(data, position, end)
            stop = position + size
        elif kind == _VARINT:
            _, stop = _read_varint(data, position, end)
        elif kind in _FIXED_BYTES:
            stop = position + _FIXED_BYTES[kind]
        else:
            raise _WireError(f"byte {begin} starts no field")
        if stop > end:
            raise _WireError(
                f"the field at byte {begin} would end at byte {stop}, after byte {end}"
            )
        yield _Field(number, kind, begin, position, stop)
        position = stop


def _read_varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position + index >= end:
            break
        byte = data[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise _WireError(f"the number at byte {position} does not end")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
