"""The graph around a junction without the layer that goes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.edit import (
    add_constant,
    fresh_name,
    insert,
    insert_after,
    replace_constant,
    replace_input,
    shared_constant,
)
from onnx_tricks.graph.shapes import dtype_of
from onnx_tricks.graph.spill import spill
from onnx_tricks.patterns.linear import Linear
from onnx_tricks.patterns.weight import Weight
from onnx_tricks.skipless.choice import Choice, Layer, layout_of
from onnx_tricks.weights import change_rows

__all__ = ["take_out"]

_AXES_ARE_INPUTS = 13  # the first opset in which those of Unsqueeze are
_Array = np.ndarray[Any, np.dtype[Any]]


def take_out(model: ir.Model, choice: Choice) -> None:
    """Take a layer out, and multiply it into the weights round the rows that it reads or writes."""
    removed, source = choice.removed, choice.removed.linear.node.inputs[0]
    assert source is not None
    basis, biases = choice.basis, _new_biases(choice)
    changes: dict[ir.Value, tuple[Weight, Callable[[_Array], _Array]]] = {}
    for made in choice.kept:
        shift = None
        if made is choice.place:
            shift = choice.shift / made.node.attributes.get_float("beta", 1.0)
        changes[made.weight.stored] = made.weight, functools.partial(basis.write, shift=shift)
    for layer in choice.others:
        if layer.part is not None:
            _write_part(model, layer, basis.read(layer.matrix().T).T, biases[layer])
        else:
            changes[layer.linear.weight.stored] = layer.linear.weight, basis.read
            bias = biases[layer]
            if bias is not None:
                _set_bias(model, layer.linear, bias)
    for weight, change in changes.values():
        _rewrite(weight, change)
    if removed.part is not None:
        bias = removed.bias() if choice.place is None else None
        removed.output.replace_all_uses_with(_arranged(model, removed, removed.part.source, bias))
    elif choice.writes or removed.linear.bias is None or choice.place is not None:
        removed.output.replace_all_uses_with(source)
    elif removed.linear.bias_add is not None:
        removed.linear.node.outputs[0].replace_all_uses_with(source)
    else:
        bias = removed.bias()
        assert bias is not None
        removed.output.replace_all_uses_with(_plus(model, removed.linear, source, bias))


def _new_biases(choice: Choice) -> dict[Layer, _Array | None]:
    """The biases of the layers that read the rows, [F] float64, and none where they do not change.

    A projection that was packed gets its bias anew in any case.
    """
    bias = choice.removed.bias() if choice.writes or choice.place is not None else None
    found: dict[Layer, _Array | None] = {}
    for layer in choice.others:
        present = layer.bias()
        if bias is None:
            found[layer] = present if layer.part is not None else None
            continue
        weight = layer.matrix() if choice.writes else -choice.basis.read(layer.matrix().T).T
        found[layer] = bias @ weight + (0 if present is None else present)
    return found


def _rewrite(weight: Weight, change: Callable[[_Array], _Array]) -> None:
    """Change a stored weight along its axis: `change` takes and gives rows [M, D] of float64."""
    tensor = weight.tensor
    array = change_rows(tensor.numpy(), weight.axis, change)
    replace_constant(weight.stored, spill(array, tensor.name))
    if array.shape != tuple(tensor.shape.numpy()):
        for node in weight.path:  # the shapes between are inferred when they are needed
            node.outputs[0].shape = None
            node.outputs[0].meta.clear()


def _set_bias(model: ir.Model, linear: Linear, bias: _Array) -> None:
    dtype = dtype_of(linear.output) or linear.weight.tensor.dtype
    name = f"{linear.weight.stored.name}.bias"
    if linear.bias_add is not None:
        index = list(linear.bias_add.inputs).index(linear.bias)
        replace_input(model, linear.bias_add, index, bias.astype(dtype.numpy()), name)
    elif linear.bias_index is not None:
        beta = linear.node.attributes.get_float("beta", 1.0)
        array = (bias / beta).astype(dtype.numpy())
        replace_input(model, linear.node, linear.bias_index, array, name)
    else:
        constant = add_constant(model, name, ir.Tensor(bias.astype(dtype.numpy())))
        insert_after(model, linear.output, "Add", constant)


def _write_part(model: ir.Model, layer: Layer, matrix: _Array, bias: _Array | None) -> None:
    """Give a projection that was packed a linear layer of its own, `matrix` [D, F]."""
    assert layer.part is not None
    node, dtype = layer.linear.node, layer.linear.weight.tensor.dtype
    stem = f"{node.name or layer.linear.weight.stored.name}/{layer.part.output.name}"
    weight = add_constant(model, stem, spill(matrix.astype(dtype.numpy())))
    inputs = [layer.part.source, weight]
    product = insert(node, "MatMul", inputs, name=stem, model=model, dtype=dtype)
    _replace(model, layer.part.output, _arranged(model, layer, product, bias))


def _arranged(model: ir.Model, layer: Layer, rows: ir.Value, bias: _Array | None) -> ir.Value:
    """Rows [B, S, heads x channels] as a projection's output has them."""
    part, node = layer.part, layer.linear.node
    assert part is not None
    dtype = dtype_of(part.output) or layer.linear.weight.tensor.dtype
    if bias is not None:
        rows = _plus(model, layer.linear, rows, bias)
    name, layout = f"{part.output.name}/heads", layout_of(part)
    assert layout is not None

    def put(op_type: str, *inputs: ir.Value, **attributes: Sequence[int]) -> ir.Value:
        listed = ir.convenience.convert_attributes(attributes)
        return insert(node, op_type, inputs, name=name, model=model, dtype=dtype, attributes=listed)

    if layout == "bshk":
        heads = np.array([0, 0, part.heads, part.head_width])
        label = f"heads.{part.heads}.{part.head_width}"
        rows = put("Reshape", rows, shared_constant(model, label, heads))
    order = [layout.index(one[0]) for one in part.axes if one]
    if order != sorted(order):
        rows = put("Transpose", rows, perm=order)
    alone = [place for place, one in enumerate(part.axes) if not one]
    if alone and model.opset_imports.get("", 1) < _AXES_ARE_INPUTS:
        rows = put("Unsqueeze", rows, axes=alone)
    elif alone:
        label = f"axes.{'.'.join(map(str, alone))}"
        rows = put("Unsqueeze", rows, shared_constant(model, label, np.array(alone)))
    return rows


def _plus(model: ir.Model, linear: Linear, rows: ir.Value, bias: _Array) -> ir.Value:
    dtype = dtype_of(linear.output) or linear.weight.tensor.dtype
    stem = f"{linear.weight.stored.name}.bias"
    constant = add_constant(model, stem, ir.Tensor(bias.astype(dtype.numpy())))
    return insert(linear.node, "Add", [rows, constant], name=stem, model=model, dtype=dtype)


def _replace(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Let a new value stand for another, with its name: it means the same."""
    old.replace_all_uses_with(new)
    new.shape = old.shape
    new.name, old.name = old.name, fresh_name(model, f"{old.name}/packed")
