"""What storing a first layer does to a model, before anything is computed."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.graph.sizes import measure
from onnx_tricks.patterns.cut import Cut
from onnx_tricks.patterns.region import Region
from onnx_tricks.patterns.states import Row

__all__ = ["Growth", "estimate", "stored_rows"]


@dataclasses.dataclass(frozen=True)
class Growth:
    """What storing a first layer does to a model, known before anything is computed.

    Attributes:
        before: Bytes of all constants of the model.
        table: Bytes of the new table.
        removed: Bytes of the constants that go.
        parameters: Change in the number of parameters.
        reads_before: Bytes read for one token, at batch size one, by what is replaced.
        reads_after: Bytes read for one token from the table.
    """

    before: int
    table: int
    removed: int
    parameters: int
    reads_before: int
    reads_after: int

    @property
    def after(self) -> int:
        """Bytes of all constants afterwards."""
        return self.before + self.table - self.removed

    @property
    def percent(self) -> float:
        """By how much the constants grow."""
        return 100 * (self.after - self.before) / max(1, self.before)


def stored_rows(region: Region, cut: Cut) -> dict[int, Row]:
    """What is stored, by key."""
    joined = {join.key: join.rows[0] for join in cut.joins}
    return {key: region.row(joined.get(key, key)) for key in cut.stored}


def estimate(model: ir.Model, region: Region, cut: Cut) -> Growth:
    """Count the bytes and numbers that come and go."""
    rows = stored_rows(region, cut).values()
    width = sum(row.nbytes for row in rows)
    gone = _dead_tensors(region, cut)
    looked_up = [key for one in cut.removed if one.lookup for key in one.outputs if key is not None]
    stored = sum(row.width for row in rows if row.dtype.is_floating_point())
    return Growth(
        before=measure(model).bytes,
        table=region.vocabulary * width,
        removed=sum(tensor.nbytes for tensor in gone),
        parameters=region.vocabulary * stored
        - sum(tensor.size for tensor in gone if tensor.dtype.is_floating_point()),
        reads_before=cut.weights + sum(region.row(key).nbytes for key in looked_up),
        reads_after=width,
    )


def _dead_tensors(region: Region, cut: Cut) -> list[ir.TensorProtocol]:
    """The constants that nothing reads once the removed operations are gone."""
    keys = {key for one in cut.removed for key in one.outputs if key is not None}
    dead = {
        node
        for key in keys
        for value in region.members[key]
        if (node := value.producer()) is not None
    }
    pending = [value for node in dead for value in node.inputs]
    found: dict[int, ir.TensorProtocol] = {}
    while pending:
        value = pending.pop()
        if value is None or value.is_graph_output() or not set(value.consumers()) <= dead:
            continue
        tensor, node = stored_tensor(value), value.producer()
        if tensor is not None:
            found[id(value)] = tensor
        if node is None or node in dead:
            continue
        if all(set(output.consumers()) <= dead for output in node.outputs):
            dead.add(node)
            pending += node.inputs
    return list(found.values())
