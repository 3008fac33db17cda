"""Put the operator of a plan in the place of a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.edit import add_constant
from onnx_tricks.graph.shapes import dim, dtype_of, rank_of
from onnx_tricks.operators.signature import DOMAIN, INPUTS, KEY_NORMS, OUTPUTS, Form
from onnx_tricks.patterns.attention import Attention
from onnx_tricks.patterns.head_norm import HeadNorm
from onnx_tricks.patterns.scores import Bias, Mask
from onnx_tricks.slim.forms import counts
from onnx_tricks.slim.masks import Masks
from onnx_tricks.slim.plan import LayerPlan
from onnx_tricks.slim.positions import Angles
from onnx_tricks.slim.queries import write_query
from onnx_tricks.slim.states import builder_before

__all__ = ["layer_weights", "write_operator"]


def layer_weights(model: ir.Model, plan: LayerPlan, form: Form) -> dict[str, ir.Value]:
    """Register the weights of a layer; those without effect are left out."""
    wanted = {*form.inputs, "projection", "query", "query_bias", "query_gain"}
    if "center" in plan.weights and counts(plan.weights["center"]):
        wanted.add("center")
    return {
        name: add_constant(model, f"{plan.layer.label}/{name}", tensor)
        for name, tensor in plan.weights.items()
        if name in wanted
    }


def write_operator(
    model: ir.Model,
    plan: LayerPlan,
    view: Attention,
    form: Form,
    weights: Mapping[str, ir.Value],
    states: Mapping[str, ir.Value],
    angles: Angles,
    masks: Masks,
) -> dict[str, ir.Value]:
    """Write the operator for one view of a layer, and let it take the place of its output.

    Args:
        model: The model.
        plan: What the layer is to cache.
        view: The layer as one graph computes it.
        form: What all nodes of the operator have in common.
        weights: From `layer_weights`.
        states: What carries states in, by the operator's names, such as `past_key` or `hidden`.
        angles: Gives rotation angles for all keys.
        masks: Gives what a fused operator masks by itself.

    Returns:
        The states that leave, by the operator's names, such as `present_key`.
    """
    assert view.merged is not None
    anchor = view.merged.producer()
    assert anchor is not None
    build = builder_before(model, anchor, f"{plan.layer.label}/slim")
    turns = angles.of(build, view, plan.dtype, states["past_key"]) if "cos" in form.inputs else {}
    query = write_query(build, view, weights, turns)
    if not view.query.inside and dtype_of(view.query.state) not in (None, plan.dtype):
        query = build.Cast(query, to=plan.dtype)
    if "query_gain" in weights:
        query = build.Mul(query, weights["query_gain"])
    same = plan.cache == form.cache
    read = states if same else {n: build.Cast(v, to=form.cache) for n, v in states.items()}
    given: dict[str, ir.Value | None] = {**weights, **read, **turns, "query": query}
    if "bias" in form.inputs:
        given["bias"] = _bias(build, view, plan.dtype, masks.of(build, view, query, states))
    if plan.operator == "SlimAttention":
        given |= _project(build, plan, view, weights, query)
    elif plan.operator == "SlimHiddenAttention":
        projection = view.keys.projection
        assert projection is not None
        given["hidden"] = projection.source
    attributes = [ir.AttrFloat32("scale", _scale(view))]
    if form.softcap:
        attributes.append(ir.AttrFloat32("softcap", view.scores.softcap or 0.0))
    attributes.append(ir.AttrInt64("interleaved", int(form.interleaved)))
    attributes.append(ir.AttrInt64("safe", int(form.safe)))
    norm = view.keys.norm
    if form.norm and isinstance(norm, HeadNorm):
        attributes.append(ir.AttrInt64("key_norm", KEY_NORMS[form.norm]))
        attributes.append(ir.AttrInt64("key_centered", int(form.centered)))
        attributes.append(ir.AttrFloat32("key_epsilon", norm.epsilon))
    count = len(OUTPUTS[plan.operator])
    if "residual" not in form.inputs and plan.operator == "SlimAttention":
        count -= 1
    present = [given.get(n) if n in form.inputs else None for n in INPUTS[plan.operator]]
    while present[-1] is None:
        present.pop()
    outputs = build.node(DOMAIN, plan.operator, present, attributes, count)
    output = outputs[0]
    output.type = ir.TensorType(plan.dtype)
    if rank_of(view.merged) == 2:
        output = build.Reshape(output, [-1, view.heads * view.value_width])
    wanted = dtype_of(view.merged)
    if wanted is not None and wanted != plan.dtype:
        output = build.Cast(output, to=wanted)
    view.merged.replace_all_uses_with(output)
    kept = [one if same else build.Cast(one, to=plan.cache) for one in outputs[1:]]
    return dict(zip(OUTPUTS[plan.operator][1:], kept, strict=False))


def _scale(view: Attention) -> float:
    return view.query.scale * view.keys.scale * view.scores.scale


def _project(
    build: Builder,
    plan: LayerPlan,
    view: Attention,
    weights: Mapping[str, ir.Value],
    query: ir.Value,
) -> dict[str, ir.Value]:
    """Keys before rotation and residual of the new tokens."""
    projection = view.keys.projection
    assert projection is not None
    source = projection.source
    if "center" in weights:
        # Before the product: what it takes off would be lost in the rounding of the rest.
        source = build.Sub(source, weights["center"])
    made = build.MatMul(source, weights["projection"])
    keys, rank = plan.layer.view.keys, plan.rank
    channels = keys.heads * keys.head_width
    found, sizes = {}, _tokens(build, query)
    if rank:
        residual = build.Slice(made, [channels], [channels + rank], [-1])
        found["residual"] = build.Reshape(residual, build.Concat(*sizes, [rank], axis=0))
        made = build.Slice(made, [0], [channels], [-1])
    shape = build.Concat(*sizes, [keys.heads], [keys.head_width], axis=0)
    found["key"] = build.Transpose(build.Reshape(made, shape), perm=[0, 2, 1, 3])
    return found


def _tokens(build: Builder, query: ir.Value) -> list[ir.Value]:
    """B and T as tensors [1], from queries [B, H, T, K]."""
    return [build.Slice(build.Shape(query), [axis], [axis + 1]) for axis in (0, 2)]


def _bias(
    build: Builder, view: Attention, dtype: ir.DataType, visible: ir.Value | None
) -> ir.Value:
    """Everything that is added to the scores as one term, [B, H, T, S] or broadcast to it."""
    total = None if visible is None else _visible(build, visible, dtype, safe=view.safe)
    for term in view.scores.terms:
        if isinstance(term, Mask):
            total = _masked(build, term, total, view, dtype)
        else:
            value = _unfolded(build, term, term.value, view)
            if dtype_of(term.value) == ir.DataType.BOOL:
                value = _visible(build, value, dtype, safe=view.safe)
            else:
                value = _scaled(build, value, term, dtype)
            total = value if total is None else build.Add(total, value)
    if total is None:
        return build.Constant(value=ir.Tensor(np.zeros((1, 1, 1, 1), dtype=dtype.numpy())))
    return total


def _visible(build: Builder, value: ir.Value, dtype: ir.DataType, *, safe: bool) -> ir.Value:
    """A mask that says what may be seen, as a term."""
    numbers = dtype.numpy()
    # Where a row of nothing but minus infinity is no sum, the least number has to do.
    least = -np.inf if safe else ml_dtypes.finfo(numbers).min
    zero, masked = (np.asarray(number, dtype=numbers) for number in (0, least))
    return build.Where(value, zero, masked)


def _unfolded(build: Builder, term: Bias | Mask, value: ir.Value, view: Attention) -> ir.Value:
    """What may belong to scores of all heads of all rows one behind the other, [B H, T, S]."""
    node = view.node if term.view is None else term.view
    if node.domain != "" or (term.view is None and node.op_type != "Softmax"):
        return value
    assert node.inputs[0] is not None
    folded = rank_of(node.inputs[0]) == 3
    if not folded or rank_of(value) in (0, 1, 2) or dim(value, 0) == 1:
        return value
    lengths = build.Slice(build.Shape(value), [-2], [2**62])
    return build.Reshape(value, build.Concat([-1], [view.heads], lengths, axis=0))


def _scaled(build: Builder, value: ir.Value, term: Bias | Mask, dtype: ir.DataType) -> ir.Value:
    given = dtype_of(term.value if isinstance(term, Bias) else term.fill)
    if given not in (None, dtype):
        value = build.Cast(value, to=dtype)
    if math.isclose(term.scale, 1.0):
        return value
    return build.Mul(value, np.asarray(term.scale, dtype=dtype.numpy()))


def _masked(
    build: Builder, term: Mask, total: ir.Value | None, view: Attention, dtype: ir.DataType
) -> ir.Value:
    """A replaced score as a term: what it is replaced by outweighs any score."""
    condition = _unfolded(build, term, term.condition, view)
    fill = _scaled(build, _unfolded(build, term, term.fill, view), term, dtype)
    rest = np.zeros((), dtype=dtype.numpy()) if total is None else total
    return build.Where(condition, *((fill, rest) if term.holds else (rest, fill)))
