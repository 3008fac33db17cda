"""Computed weights kept out of memory until they are written."""

from __future__ import annotations

import tempfile
import weakref
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["spill"]


def spill(array: np.ndarray[Any, np.dtype[Any]], name: str | None = None) -> ir.TensorProtocol:
    """Move an array into a file without a name; it goes with the tensor that is returned.

    What takes long to compute is computed once, and a model's worth of it fits in no memory.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115
    np.ascontiguousarray(array).tofile(file)
    file.flush()

    def read() -> ir.Tensor[Any]:
        # Mapped anew each time, so that what has been read can leave memory.
        return ir.Tensor(np.memmap(file, dtype=array_dtype, mode="r", shape=shape), name=name)

    array_dtype, shape = array.dtype, array.shape
    dtype = ir.DataType.from_numpy(array.dtype)
    tensor = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)
    weakref.finalize(tensor, file.close)
    return tensor
