"""Labels on the numbers of a linear layer's output, which tell where each of them went."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.axes import Axes, complete, read_axes
from onnx_tricks.patterns.dry_run import DryRun, Unknown

__all__ = ["Letters", "Origin", "head_table"]

_MAX_NODES = 20
_Indices = np.ndarray[Any, np.dtype[np.int64]]


class Origin:
    """A linear layer's output with a label on every number: row and column.

    Attributes:
        labels: An array of the output's shape, every number another one.
        source: What the layer reads, [B, S, D], before rows are flattened; None where it is not
            found.
    """

    def __init__(self, run: DryRun, output: ir.Value, rows: ir.Value | None) -> None:
        """Label the output of a layer.

        Args:
            run: The dry run of the model.
            output: The output.
            rows: What the layer reads; the output itself where there is no layer.

        Raises:
            Unknown: A shape is not known.
        """
        self.source: ir.Value | None = None
        shape = run.shape(output)
        if shape is None or rows is None:
            raise Unknown(f"the shape of {output.name!r} is unknown")
        self.labels = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
        source = rows
        for _ in range(_MAX_NODES):
            node = source.producer()
            found = run.shape(source)
            if found is not None and len(found) == 3:
                break
            if node is None or node.domain != "" or node.op_type not in ("Reshape", "Flatten"):
                return
            if node.inputs[0] is None:
                return
            source = node.inputs[0]
        shape_before = run.shape(source)
        if shape_before is None:
            return
        count = shape_before[:-1]
        numbers = np.arange(np.prod(count), dtype=np.float64).reshape(*count, 1)
        sent = run.replay(rows, {source: np.broadcast_to(numbers, shape_before)})
        self._rows = sent.reshape(-1, sent.shape[-1])[:, 0].astype(np.int64)
        self._length = count[-1] if len(count) > 1 else 1
        self.source = source

    def decode(self, array: Array) -> tuple[_Indices, _Indices, _Indices]:
        """From labels to the row of the batch, the token and the column that they come from."""
        row, column = np.divmod(array.astype(np.int64), self.labels.shape[-1])
        number = self._rows[row]
        return number // self._length, number % self._length, column


class Letters:
    """Reads axes, given which column is which channel of which head."""

    def __init__(self, origin: Origin, table: _Indices) -> None:
        """Prepare for the heads whose columns are `table`, [G, K]."""
        self.origin = origin
        width = origin.labels.shape[-1]
        # Columns of other heads, packed beside these, have none.
        self._head, self._channel = np.full(width, -1), np.full(width, -1)
        for (head, channel), column in np.ndenumerate(table):
            self._head[column], self._channel[column] = head, channel

    def axes(self, labels: Array, sequence: int | None = None) -> Axes:
        """What the axes of a value run over, from its labels and perhaps its axis of tokens."""
        batch, token, column = self.origin.decode(labels)
        coordinates = {"b": batch, "h": self._head[column], "s": token, "k": self._channel[column]}
        return complete(read_axes(coordinates), sequence)

    def order(self, labels: Array) -> _Indices:
        """Which head each one in a value is, in its order, for the first token of the batch."""
        batch, token, column = self.origin.decode(labels)
        first = (batch == 0) & (token == 0) & (self._channel[column] == 0)
        order: _Indices = self._head[column[first]]
        return order


def head_table(
    batch: _Indices, rows: _Indices, columns: _Indices
) -> tuple[_Indices, _Indices | None]:
    """Which head each line of an operand is, and the columns of every different head, [G, K].

    The arrays are [..., S, K], of an operand's numbers.
    """
    width = columns.shape[-1]
    first = (batch == batch.min()) & (rows == rows.min())
    lines = columns[first[..., 0]]
    if lines.size == 0 or np.any(first != first[..., :1]):
        return np.zeros(0, np.int64), None
    heads: dict[tuple[int, ...], int] = {}
    order = [heads.setdefault(tuple(line), len(heads)) for line in lines.reshape(-1, width)]
    if len({column for line in heads for column in line}) != len(heads) * width:
        return np.zeros(0, np.int64), None
    table = np.asarray(list(heads), dtype=np.int64)
    # Every other token has the same heads, channel by channel.
    place = np.full(columns.max() + 1, -1)
    place[table] = np.arange(table.size).reshape(table.shape)
    places = place[columns]
    regular = np.all(places % width == np.arange(width)) and np.all(places >= 0)
    whole = regular and np.all(places // width == places[..., :1] // width)
    return np.asarray(order, dtype=np.int64), table if whole else None
