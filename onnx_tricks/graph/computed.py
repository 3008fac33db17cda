"""Weights that a graph makes of others before anything else: parts of them, or scaled to a norm.

torch's attention cuts its projections out of one weight, and weight normalisation divides weights
by their own norms. Exporters fold that into the file only where weights are small.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnx_tricks.graph.array_ops import ARRAY_OPS
from onnx_tricks.graph.constants import deferred, is_constant, stored_tensor
from onnx_tricks.graph.edit import add_constant, remove_dead_nodes
from onnx_tricks.graph.shapes import annotate

__all__ = ["computed_weights", "store_weights"]

_VIEWS = frozenset("Cast Flatten Identity Reshape Squeeze Transpose Unsqueeze".split())
_READERS = frozenset("Add Conv ConvTranspose Einsum FusedMatMul GRU Gemm LSTM MatMul RNN".split())


def computed_weights(model: ir.Model) -> list[ir.Value]:
    """The values that constants alone determine, by more than a change of form, and layers read."""
    if any(_is_cut_unseen(node) for node in model.graph.all_nodes()):
        annotate(model)
    return [
        value
        for node in model.graph.all_nodes()
        if node.domain == "" and node.op_type in ARRAY_OPS and node.op_type not in _VIEWS
        for value in node.outputs
        if value.uses() and is_constant(value) and all(_is_layer(one) for one in _readers(value))
    ]


def store_weights(model: ir.Model) -> None:
    """Store computed weights in place of those that they are made of, wherever that saves room.

    Args:
        model: Changed in place.
    """
    found = computed_weights(model)
    made = {value: leaves for value in found if (leaves := _leaves(value))}
    for group in _together(made):
        tensors = {value: _lazy(value) for value in group}
        leaves = set().union(*(made[value] for value in group))
        gone = [one for one in leaves if _leads_only_to(one, set(group))]
        stored = [tensor.nbytes for one in gone if (tensor := stored_tensor(one)) is not None]
        if sum(tensor.nbytes for tensor in tensors.values()) > sum(stored):
            continue
        for value, tensor in tensors.items():
            value.replace_all_uses_with(add_constant(model, value.name or "weight", tensor))
    remove_dead_nodes(model)


def _lazy(value: ir.Value) -> ir.LazyTensor:
    """The weight, computed anew whenever it is read: a model's worth of them fits in no memory."""
    compute = deferred(value)
    assert compute is not None
    array = compute()
    dtype = ir.DataType.from_numpy(array.dtype)
    return ir.LazyTensor(lambda: ir.Tensor(compute()), dtype, ir.Shape(array.shape))


def _is_cut_unseen(node: ir.Node) -> bool:
    """Whether a constant is cut at places that only inferred shapes may tell."""
    cuts = node.domain == "" and node.op_type in ("Slice", "Split")
    return cuts and is_constant(node.inputs[0]) and not is_constant(node.outputs[0])


def _is_layer(node: ir.Node | None) -> bool:
    return node is not None and node.op_type in _READERS and not is_constant(node.outputs[0])


def _readers(value: ir.Value) -> Iterator[ir.Node | None]:
    """What reads a value, or other forms of it; None stands for the caller of the graph."""
    if value.is_graph_output():
        yield None
    for node in value.consumers():
        if node.domain == "" and node.op_type in _VIEWS and len(node.outputs) == 1:
            yield from _readers(node.outputs[0])
        else:
            yield node


def _leaves(value: ir.Value) -> set[ir.Value]:
    """The stored weights that a value is made of."""
    found: set[ir.Value] = set()
    pending, seen = [value], {value}
    while pending:
        one = pending.pop()
        tensor, node = stored_tensor(one), one.producer()
        if tensor is not None and tensor.dtype.is_floating_point():
            found.add(one)
        elif tensor is None and node is not None:
            # What a Shape measures is no constant, though its length may be one.
            new = {one for one in node.inputs if one is not None and is_constant(one)} - seen
            pending += new
            seen |= new
    return found


def _together(made: dict[ir.Value, set[ir.Value]]) -> list[list[ir.Value]]:
    """Values that share what they are made of."""
    groups: list[tuple[list[ir.Value], set[ir.Value]]] = []
    for value, leaves in made.items():
        members, shared = [value], set(leaves)
        for group in [one for one in groups if one[1] & shared]:
            groups.remove(group)
            members, shared = group[0] + members, shared | group[1]
        groups.append((members, shared))
    return [members for members, _ in groups]


def _leads_only_to(leaf: ir.Value, ends: set[ir.Value]) -> bool:
    """Whether nothing needs a stored weight once some values have been made of it."""
    pending = [leaf]
    while pending:
        one = pending.pop()
        if one in ends:
            continue
        if one.is_graph_output() or (one is not leaf and not is_constant(one)):
            return False
        pending += [output for node in one.consumers() for output in node.outputs]
    return True
