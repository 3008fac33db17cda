"""Writes a folded norm and its linear layers."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.fold.part import Array, Scaling
from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.edit import (
    ChangedTensor,
    add_constant,
    insert_after,
    replace_input,
    shared_vector,
)
from onnx_tricks.graph.names import node_name
from onnx_tricks.graph.spell import write_norm, write_product
from onnx_tricks.patterns.norm import Norm
from onnx_tricks.patterns.readers import Reader

__all__ = ["copy_weight", "make_plain", "set_bias"]


def copy_weight(model: ir.Model, reader: Reader, scaling: Scaling) -> None:
    """Give a linear layer a folded copy of its weight, along the path on which it reads it."""
    linear = reader.linear
    weight = linear.weight
    copy = ChangedTensor(weight.tensor, scaling, None)
    value = add_constant(model, f"{weight.stored.name}.folded", copy)
    for node in weight.path:
        repeated = ir.Node(
            node.domain,
            node.op_type,
            [value, *node.inputs[1:]],
            node.attributes.values(),
            num_outputs=1,
            name=f"{value.name}/{node.op_type}",
        )
        assert linear.node.graph is not None
        linear.node.graph.insert_before(linear.node, repeated)
        value = repeated.outputs[0]
        value.name = repeated.name
    linear.node.replace_input_with(linear.weight_index, value)


def set_bias(model: ir.Model, reader: Reader, bias: Array) -> None:
    """Replace the bias of a linear layer, or add one."""
    linear = reader.linear
    name = f"{linear.weight.stored.name}.bias"
    if linear.bias_index is not None:
        replace_input(model, linear.node, linear.bias_index, bias, name)
    elif linear.bias_add is not None:
        index = list(linear.bias_add.inputs).index(linear.bias)
        replace_input(model, linear.bias_add, index, bias, name)
    else:
        insert_after(model, linear.output, "Add", add_constant(model, name, ir.Tensor(bias)))


def make_plain(model: ir.Model, norm: Norm, kept: Array | None) -> None:
    """Leave of a norm only what does not depend on gain and folded bias."""
    if norm.fused is not None:
        ones = shared_vector(model, 1.0, norm.width, norm.dtype)
        norm.node.replace_input_with(norm.fused.gain, ones)
        if norm.output is not norm.node.outputs[0]:
            _change_added(model, norm, kept)
        elif norm.fused.bias is not None and norm.fused.bias < len(norm.node.inputs):
            if kept is None and norm.fused.maps:
                zeros = shared_vector(model, 0.0, norm.width, norm.dtype)
                norm.node.replace_input_with(norm.fused.bias, zeros)
            elif kept is None:
                norm.node.replace_input_with(norm.fused.bias, None)
            else:
                replace_input(
                    model, norm.node, norm.fused.bias, kept, f"{node_name(norm.node)}.bias"
                )
        return
    name = f"{node_name(norm.node)}/plain"
    bias = None
    if kept is not None:
        shape = (norm.width,) + (1,) * (-1 - norm.axis)
        bias = add_constant(model, f"{name}/bias", ir.Tensor(kept.reshape(shape)))
    if norm.kind in ("rms", "layer") and norm.axis == -1:
        plain = write_norm(
            model,
            norm.node,
            norm.kind,
            norm.read,
            width=norm.width,
            epsilon=norm.epsilon,
            dtype=norm.dtype,
            bias=bias,
            name=name,
        )
    else:
        core = [(norm.read if f.value is norm.source else f.value, f.exponent) for f in norm.core]
        powers = sorted(core, key=lambda p: p[1] != 1)
        plain = write_product(model, norm.node, powers, dtype=norm.dtype, bias=bias, name=name)
    plain.shape = norm.output.shape
    plain.meta.update(norm.output.meta)
    norm.output.replace_all_uses_with(plain)


def _change_added(model: ir.Model, norm: Norm, kept: Array | None) -> None:
    """Change the vector that is added behind an operator without a bias, or add none."""
    add = norm.output.producer()
    assert add is not None
    index, added = next(
        (i, array) for i, v in enumerate(add.inputs) if (array := evaluate(v)) is not None
    )
    if kept is None:
        scaled = add.inputs[1 - index]
        assert scaled is not None
        norm.output.replace_all_uses_with(scaled)
    else:
        replace_input(model, add, index, kept.astype(added.dtype), f"{node_name(norm.node)}.bias")
