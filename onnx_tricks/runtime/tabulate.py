"""Tensors that a model computes, row after row, when they are written."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from onnx_tricks.errors import PassError
from onnx_tricks.runtime.sessions import Session

__all__ = ["Bar", "TabulatedTensor", "Tabulation"]

_Array = np.ndarray[Any, np.dtype[Any]]
Bar = Callable[[int], contextlib.AbstractContextManager[Callable[[int], object]]]
"""Shows how far a table is: given its rows, and within the context the rows that are new."""


@dataclasses.dataclass(frozen=True)
class Tabulation:
    """How to compute the rows of a table.

    Attributes:
        model: Computes `step` rows at a time.
        sources: For each input, a function from a slice of the rows to its numbers.
        shapes: For each input, its shape.
        outputs: Names of the outputs, of [step, numbers]; they lie side by side in the table.
        step: How many rows one run computes.
        bar: Shows how far the table is.
    """

    model: ir.Model
    sources: Mapping[str, Callable[[slice], _Array]]
    shapes: Mapping[str, tuple[int, ...]]
    outputs: Sequence[str]
    step: int
    bar: Bar | None = None


class TabulatedTensor(ir.LazyTensor):
    """A table whose rows are computed by ONNX Runtime, fully optimised, a block at a time.

    Neither the table nor what it is computed from is ever in memory whole.
    """

    def __init__(
        self, how: Tabulation, rows: int, width: int, dtype: ir.DataType, name: str | None = None
    ) -> None:
        """Describe the table.

        Args:
            how: Computes the rows.
            rows: Number of rows.
            width: Numbers in a row.
            dtype: Element type; what the model computes is rounded to it.
            name: Its name.
        """
        self._how = how
        super().__init__(self._whole, dtype, ir.Shape([rows, width]), name=name)

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes, computing them block by block."""
        file.writelines(block.tobytes() for block in self._blocks())

    def _whole(self) -> ir.Tensor[_Array]:
        array = np.empty(self.shape.numpy(), dtype=self.dtype.numpy())
        start = 0
        for block in self._blocks():
            array[start : start + len(block)] = block
            start += len(block)
        return ir.Tensor(array, dtype=self.dtype, name=self.name)

    def _blocks(self) -> Iterator[_Array]:
        """Compute the table; each block is [rows, width], C-contiguous."""
        how = self._how
        rows, width = self.shape.numpy()
        session = Session(how.model)
        dtype = self.dtype.numpy()
        with how.bar(rows) if how.bar else contextlib.nullcontext(lambda _: None) as advance:
            for start in range(0, rows, how.step):
                # The last block is as long as the others, and overlaps the one before.
                first = min(start, rows - how.step)
                part = slice(first, first + how.step)
                feeds = {
                    name: read(part).reshape(how.shapes[name]) for name, read in how.sources.items()
                }
                made = session.run(feeds)
                block = np.concatenate([made[name] for name in how.outputs], axis=1)[
                    start - first :
                ].astype(dtype, copy=False)
                if block.shape[1] != width:
                    raise PassError(
                        f"rows of {self.name!r} have {block.shape[1]} numbers, not {width}"
                    )
                yield np.ascontiguousarray(block)
                advance(len(block))
