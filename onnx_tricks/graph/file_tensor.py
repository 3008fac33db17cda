"""Tensors whose bytes lie in a file."""

from __future__ import annotations

import functools
from pathlib import Path

import onnx_ir as ir

__all__ = ["FileTensor"]


class FileTensor(ir.LazyTensor):
    """A tensor whose bytes lie in a file, memory-mapped anew for every read.

    Unlike `onnx_ir.ExternalTensor` it keeps nothing open: the mapping lives as long as the array
    that `numpy` returned, so that neither resident memory nor open files grow with the model. Nor
    does it say how the weight is to be stored: `onnx_ir.save` treats it as any other tensor.
    """

    def __init__(self, path: Path, tensor: ir.ExternalTensor) -> None:
        """Make the tensor that an external one describes.

        Args:
            path: The file that holds the bytes; its place in the model's folder was judged before.
            tensor: Offset in bytes, dtype, shape, name and documentation.
        """
        self.path = path
        self.offset = tensor.offset or 0
        # Without base_dir no rule of containment applies, whatever links led to the file.
        mapped = functools.partial(
            ir.ExternalTensor,
            path,
            self.offset,
            tensor.nbytes,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
        )
        super().__init__(
            mapped,
            tensor.dtype,
            tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props),
        )
