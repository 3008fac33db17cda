"""Weights that something else reads too: the table of an embedding, above all."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnx_tricks.fold.part import Scaling
from onnx_tricks.graph.edit import add_constant, insert_after
from onnx_tricks.graph.names import node_name
from onnx_tricks.patterns.sharing import Conflict

__all__ = ["divide_lookups", "lookups", "sharing_reason"]


def lookups(conflict: Conflict) -> list[ir.Node] | None:
    """The Gathers that look up rows of a weight, if nothing else reads it besides."""
    scaling, weight = conflict.claim.change, conflict.claim.weight
    assert isinstance(scaling, Scaling)
    if weight.rank != 2 or scaling.groups != 1 or np.any(scaling.gain == 0):
        return None
    found: list[ir.Node] = []
    pending = [(node, scaling.axis) for node in conflict.others]
    while pending:
        node, axis = pending.pop()
        if (
            node.op_type == "Transpose"
            and node.domain == ""
            and not node.outputs[0].is_graph_output()
        ):
            pending += [(reader, 1 - axis) for reader in node.outputs[0].consumers()]
        elif node.op_type == "Gather" and axis == 1 and node.attributes.get_int("axis", 0) == 0:
            found.append(node)
        else:
            return None
    return None if weight.stored.is_graph_output() else list(dict.fromkeys(found))


def sharing_reason(conflict: Conflict) -> str:
    """Why a weight that others read cannot be folded, and the option that folds a copy."""
    weight = conflict.claim.weight
    others = ", ".join(sorted({node_name(node) for node in conflict.others})) or "the caller"
    return (
        f"weight {weight.stored.name!r} is also read by {others}: a copy of its own would take "
        f"{weight.tensor.nbytes:,} bytes (--shared-weights copy)"
    )


def divide_lookups(model: ir.Model, conflicts: Iterable[Conflict]) -> None:
    """Take the gain out again of what is looked up in folded tables, once a table."""
    for conflict in {one.claim.weight.stored: one for one in conflicts}.values():
        scaling, weight = conflict.claim.change, conflict.claim.weight
        assert isinstance(scaling, Scaling)
        dtype = weight.tensor.dtype
        inverse = ir.Tensor((1 / scaling.gain).astype(dtype.numpy()), dtype=dtype)
        factor = add_constant(model, f"{weight.stored.name}.unscale", inverse)
        for node in lookups(conflict) or ():
            insert_after(model, node.outputs[0], "Mul", factor)
