"""Whether a TensorProto has the bytes that its shape and dtype ask for."""

from __future__ import annotations

import math

import onnx
import onnx_ir as ir

from onnx_tricks.errors import ModelError
from onnx_tricks.graph.external import DataFiles, location_of
from onnx_tricks.graph.protobuf import EMBEDDED

__all__ = ["check_tensor"]

# numpy addresses bytes with signed 64 bits and knows at most 64 axes.
_MAX_BYTES = 2**63 - 1
_MAX_RANK = 64

_TYPED_FIELDS = (
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)
_TYPED_FIELD = {
    ir.DataType.FLOAT: "float_data",
    ir.DataType.COMPLEX64: "float_data",
    ir.DataType.STRING: "string_data",
    ir.DataType.INT64: "int64_data",
    ir.DataType.DOUBLE: "double_data",
    ir.DataType.COMPLEX128: "double_data",
    ir.DataType.UINT32: "uint64_data",
    ir.DataType.UINT64: "uint64_data",
}
_COMPLEX = (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)


def check_tensor(tensor: onnx.TensorProto, where: str, data: DataFiles) -> None:
    """Check one tensor, without reading its data.

    A tensor of external data is left with its location, offset and length and nothing else.

    Args:
        tensor: The tensor.
        where: What to call it in messages.
        data: Where external data is looked up.

    Raises:
        ModelError: Dtype, shape and data do not agree, or external data is not there.
    """
    size, nbytes = _extent(tensor, where)
    if tensor.HasField("segment"):
        raise ModelError(f"{where}: tensors in segments are not supported")
    stored = [field for field in _TYPED_FIELDS if len(getattr(tensor, field))]
    if tensor.HasField("raw_data"):
        stored.append("raw_data")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        stored.append("external data" if location_of(tensor) != EMBEDDED else "raw_data")
    if len(stored) > 1:
        raise ModelError(f"{where} has its data twice, in {' and '.join(stored)}")
    if {"raw_data", "external data"} & {*stored}:
        if tensor.data_type == ir.DataType.STRING:
            raise ModelError(f"{where}: strings cannot be {stored[0]}")
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, nbytes, stored[0], where, data)
        else:
            _require_equal(len(tensor.raw_data), nbytes, "bytes of raw_data", tensor, where)
        return
    dtype = ir.DataType(tensor.data_type)
    field = _TYPED_FIELD.get(dtype, "int32_data")
    if stored and stored[0] != field:
        raise ModelError(f"{where}: {dtype.name} is kept in {field}, not in {stored[0]}")
    expected = size
    if dtype in _COMPLEX:
        expected = 2 * size
    elif dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4):
        expected = nbytes  # packed into bytes, one byte to an entry
    _require_equal(len(getattr(tensor, field)), expected, f"entries of {field}", tensor, where)


def _extent(tensor: onnx.TensorProto, where: str) -> tuple[int, int]:
    """Elements and bytes of the tensor."""
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        raise ModelError(f"{where} has the unknown dtype {tensor.data_type}") from None
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{where} has no dtype")
    dims = list(tensor.dims)
    bits = 8 if dtype == ir.DataType.STRING else dtype.bitwidth
    # Axes of size zero must not hide others that no array can have.
    largest = math.prod(dim for dim in dims if dim) * bits
    if len(dims) > _MAX_RANK or min(dims, default=0) < 0 or largest > 8 * _MAX_BYTES:
        shown = dims if len(dims) <= _MAX_RANK else f"of {len(dims)} axes"
        raise ModelError(f"{where} has the impossible shape {shown}")
    size = math.prod(dims)
    return size, math.ceil(size * bits / 8) if bits < 8 else size * bits // 8


def _check_external(
    tensor: onnx.TensorProto, nbytes: int, kind: str, where: str, data: DataFiles
) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data):
        raise ModelError(f"{where} describes its external data twice")
    location = location_of(tensor)
    offset = _number(entries.get("offset", "0"), "offset", where)
    length = _number(entries.get("length", str(nbytes)), "length", where)
    _require_equal(length, nbytes, f"bytes of {kind}", tensor, where)
    try:
        if location == EMBEDDED:
            available = data.model.stat().st_size
        else:
            _, available = data.find(location)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    if offset + length > available:
        raise ModelError(
            f"{where} needs bytes {offset} to {offset + length} of {location!r}, which has only "
            f"{available} bytes: the file is truncated or not the one that belongs to the model"
        )
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _number(text: str, key: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ModelError(f"{where} has external data with {key} {text[:40]!r}")
    return int(text)


def _require_equal(
    found: int, expected: int, what: str, tensor: onnx.TensorProto, where: str
) -> None:
    if found != expected:
        raise ModelError(
            f"{where} of shape {list(tensor.dims)} and dtype "
            f"{ir.DataType(tensor.data_type).name} has {found} {what}, not {expected}"
        )
