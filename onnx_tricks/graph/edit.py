"""Edits that every pass needs: shared constants, new nodes beside old ones, dead code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.graph.traverse import inner_graphs

__all__ = [
    "ChangedTensor",
    "add_constant",
    "fresh_name",
    "insert",
    "insert_after",
    "lower_constants",
    "remove_dead_nodes",
    "replace_constant",
    "replace_input",
    "rewrite_constant",
    "shared_constant",
    "shared_vector",
]

Array = np.ndarray[Any, np.dtype[Any]]
Change = Callable[[Array, slice], Array]
_WRITTEN_BYTES = 1 << 20


def remove_dead_nodes(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads, at every depth."""
    RemoveUnusedNodesPass()(model)
    for graph in model.graph.subgraphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]


def lower_constants(model: ir.Model) -> None:
    """Move constants of the main graph to where they are read, if that is in one graph alone.

    Operators such as BeamSearch hand whatever one of their graphs reads from outside to all of
    them, and ONNX Runtime stops at a graph that does not read it.
    """
    for node in model.graph.all_nodes():
        graphs = inner_graphs(node)
        if node.domain == "" or len(graphs) < 2:
            continue
        for graph in graphs:
            inside = set(graph.all_nodes())
            for name, value in list(model.graph.initializers.items()):
                bound = value.is_graph_input() or value.is_graph_output()
                if value.uses() and not bound and inside.issuperset(value.consumers()):
                    del model.graph.initializers[name]
                    graph.register_initializer(value)


def shared_vector(model: ir.Model, fill: float, width: int, dtype: ir.DataType) -> ir.Value:
    """A constant vector [width] of ones or zeros in the main graph, made once per model.

    Norm operators require a scale (and ONNX Runtime's fusions a bias); what a fold leaves of them
    is this vector, shared by all norms.
    """
    word = {0.0: "zeros", 1.0: "ones"}[fill]
    array = np.full(width, fill, dtype=dtype.numpy())
    return shared_constant(model, f"{word}.{width}.{dtype.name.lower()}", array)


def shared_constant(model: ir.Model, label: str, array: Array) -> ir.Value:
    """A constant of the main graph that is made once per label."""
    name = f"onnx_tricks.{label}"
    existing = model.graph.initializers.get(name)
    return existing if existing is not None else add_constant(model, name, ir.Tensor(array))


def fresh_name(model: ir.Model, stem: str) -> str:
    """A value or initializer name that the model does not use yet."""
    taken: set[str] = model.meta.setdefault("onnx_tricks.names", set())
    if not taken:
        for graph in model.graphs():
            taken.update(ir.convenience.create_value_mapping(graph))
    name, count = stem, 1
    while name in taken:
        count += 1
        name = f"{stem}_{count}"
    taken.add(name)
    return name


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    name: str,
    model: ir.Model,
    dtype: ir.DataType,
    attributes: Sequence[ir.Attr] = (),
) -> ir.Value:
    """Insert a node of one output in front of another and return that output.

    Args:
        before: The node in front of which the new one is placed, in its graph.
        op_type: Operator.
        inputs: Its inputs.
        name: Stem of the names of the node and of its output.
        model: The model, for names that are not taken.
        dtype: Element type of the output.
        attributes: Attributes of the node.
    """
    unique = fresh_name(model, name)
    node = ir.Node("", op_type, inputs, attributes, num_outputs=1, name=unique)
    output = node.outputs[0]
    output.name, output.type = unique, ir.TensorType(dtype)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output


def add_constant(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a constant in the main graph, where inner graphs see it too.

    Args:
        model: The model.
        name: Wanted name; a number is appended where it is taken.
        tensor: The data.
    """
    unique = fresh_name(model, name)
    tensor.name = unique
    value = ir.Value(
        name=unique,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


class ChangedTensor(ir.LazyTensor):
    """A tensor of the same type and shape as another, computed from it when it is written.

    It is written in pieces that stay in the processor's cache: making large weights whole costs
    more in fresh pages of memory than in arithmetic.
    """

    def __init__(self, tensor: ir.TensorProtocol, change: Change, name: str | None) -> None:
        """Describe the tensor.

        Args:
            tensor: What it is computed from.
            change: From an array and a slice of its axis 0 to that part of the new array.
            name: Its name.
        """
        self._source, self._change = tensor, change
        super().__init__(
            lambda: self._part(tensor.numpy(), slice(None)),
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
        )

    def rows(self, rows: slice) -> Array:
        """Part of the tensor, a slice of its axis 0."""
        return self._change(self._source.numpy(), rows)

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes, a block of rows at a time."""
        array = self._source.numpy()
        step = max(1, _WRITTEN_BYTES * len(array) // max(1, array.nbytes))
        for start in range(0, len(array), step):
            self._part(array, slice(start, start + step)).tofile(file)

    def _part(self, array: Array, rows: slice) -> ir.Tensor[Array]:
        return ir.Tensor(self._change(array, rows), dtype=self.dtype, name=self.name)


def rewrite_constant(value: ir.Value, change: Change) -> None:
    """Change the data of an initializer or Constant node, for all its readers.

    Args:
        value: The constant.
        change: As for `ChangedTensor`.
    """
    tensor = stored_tensor(value)
    assert tensor is not None
    replace_constant(value, ChangedTensor(tensor, change, value.name))


def replace_constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Give an initializer or Constant node other data, perhaps of another shape."""
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes.clear()
        node.attributes.add(ir.AttrTensor("value", tensor))
    value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())


def replace_input(model: ir.Model, node: ir.Node, index: int, array: Array, name: str) -> None:
    """Give a node a new constant as one of its inputs, appending inputs where it has fewer.

    The constant keeps its name when nothing else reads it.
    """
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    old = node.inputs[index]
    alone = old is not None and old.is_initializer() and not old.is_graph_output()
    if old is not None and alone and len(old.uses()) == 1:
        old.const_value = ir.Tensor(array, name=old.name)
        old.shape = ir.Shape(array.shape)
        return
    node.replace_input_with(index, add_constant(model, name, ir.Tensor(array)))


def insert_after(model: ir.Model, value: ir.Value, op_type: str, operand: ir.Value) -> None:
    """Let a new node of two inputs, `value` and a constant, stand wherever `value` was read."""
    node = value.producer()
    assert node is not None
    assert node.graph is not None
    readers = value.uses()
    name = fresh_name(model, f"{value.name}/{op_type}")
    added = ir.Node("", op_type, [value, operand], num_outputs=1, name=name)
    node.graph.insert_after(node, added)
    output = added.outputs[0]
    for reader, index in readers:
        reader.replace_input_with(index, output)
    if value.is_graph_output():
        graph = node.graph
        for index, one in enumerate(graph.outputs):
            if one is value:
                graph.outputs[index] = output
    # The name moves on with the meaning: it is part of what users see.
    output.name, value.name = value.name, fresh_name(model, f"{value.name}/{node.op_type}")
    output.shape, output.type = value.shape, value.type
    output.meta.update(value.meta)
