"""Read the weights of a CTranslate2 model file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_tricks.errors import ModelError

__all__ = ["read_ctranslate2"]

_VERSION = 6
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


class _Reader:
    """A cursor over little-endian binary data."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.offset = 0

    def integer(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.offset)
        self.offset += struct.calcsize(code)
        return int(value)

    def text(self) -> str:
        length = self.integer("H")  # counts the terminating zero
        value = self.data[self.offset : self.offset + length - 1].decode()
        self.offset += length
        return value

    def tensor(self) -> NDArray[Any]:
        shape = [self.integer("I") for _ in range(self.integer("B"))]
        dtype = np.dtype(_DTYPES[self.integer("B")])
        size = self.integer("I")
        value = np.frombuffer(self.data, dtype, size // dtype.itemsize, self.offset)
        self.offset += size
        return value.reshape(shape)


def read_ctranslate2(path: Path) -> dict[str, NDArray[Any]]:
    """Reads all tensors of a ``model.bin`` of binary version 6.

    Args:
        path: The file.

    Returns:
        Read-only arrays by name, in the dtype of the file; linear weights are ``[out, in]``.

    Raises:
        ModelError: The file has another binary version or bytes are left over.
    """
    reader = _Reader(path.read_bytes())
    if (version := reader.integer("I")) != _VERSION:
        raise ModelError(f"{path}: CTranslate2 binary version {version}; {_VERSION} is supported.")
    reader.text()  # name of the specification
    reader.integer("I")  # and its revision
    tensors = {}
    for _ in range(reader.integer("I")):
        name = reader.text()
        tensors[name] = reader.tensor()
    for _ in range(reader.integer("I")):  # aliases
        reader.text()
        reader.text()
    if reader.offset != len(reader.data):
        raise ModelError(f"{path}: {len(reader.data) - reader.offset} bytes are left over.")
    return tensors
