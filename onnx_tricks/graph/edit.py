"""Edits that every pass needs: shared constants, new nodes beside old ones, dead code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnx_tricks.graph.constants import stored_tensor

__all__ = [
    "add_constant",
    "fresh_name",
    "insert",
    "insert_after",
    "lazily",
    "remove_dead_nodes",
    "replace_input",
    "rewrite_constant",
    "shared_constant",
    "shared_vector",
]

Array = np.ndarray[Any, np.dtype[Any]]


def remove_dead_nodes(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads, at every depth."""
    RemoveUnusedNodesPass()(model)
    for graph in model.graph.subgraphs():
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]


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
    like: ir.Value | None = None,
    dtype: ir.DataType | None = None,
    attributes: Sequence[ir.Attr] = (),
    domain: str = "",
) -> ir.Value:
    """Insert a node of one output in front of another and return that output.

    Args:
        before: The node in front of which the new one is placed, in its graph.
        op_type: Operator.
        inputs: Its inputs.
        name: Stem of the names of the node and of its output.
        model: The model, for names that are not taken.
        like: A value whose shape (and, unless `dtype` is given, type) the output has.
        dtype: Element type of the output.
        attributes: Attributes of the node.
        domain: Domain of the operator.
    """
    unique = fresh_name(model, name)
    node = ir.Node(domain, op_type, inputs, attributes, num_outputs=1, name=unique)
    output = node.outputs[0]
    output.name = unique
    if like is not None:
        output.shape = like.shape
        output.type = like.type
    if dtype is not None:
        output.type = ir.TensorType(dtype)
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


def lazily(
    tensor: ir.TensorProtocol, function: Callable[[Array], Array], name: str | None
) -> ir.LazyTensor:
    """A tensor of the same type and shape as another, computed from it when it is written."""
    return ir.LazyTensor(
        lambda: ir.Tensor(function(tensor.numpy()), dtype=tensor.dtype, name=name),
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name,
    )


def rewrite_constant(value: ir.Value, function: Callable[[Array], Array]) -> None:
    """Change the data of an initializer or Constant node, for all its readers.

    Args:
        value: The constant.
        function: From the present array to a new one of the same type and shape; called when the
            model is written, so that one tensor at a time is in memory.
    """
    tensor = stored_tensor(value)
    assert tensor is not None
    changed = lazily(tensor, function, value.name)
    node = value.producer()
    if node is None:
        value.const_value = changed
    else:
        node.attributes.clear()
        node.attributes.add(ir.AttrTensor("value", changed))


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
