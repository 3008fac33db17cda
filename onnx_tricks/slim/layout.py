"""The states that layers carry on: their inputs and outputs, shapes, and layout for callers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import onnx_ir as ir

from onnx_tricks.graph.interface import read_interface
from onnx_tricks.operators.signature import VERSION
from onnx_tricks.patterns.heads import Heads
from onnx_tricks.slim.dimensions import Length
from onnx_tricks.slim.plan import LayerPlan
from onnx_tricks.slim.positions import find_mask
from onnx_tricks.slim.states import State, builder_before, state_names

__all__ = [
    "add_states",
    "describe",
    "gone_shapes",
    "leaving_states",
    "may_be_buffers",
    "slots",
    "state_shapes",
]

_KEY_AXES = ("b", "h", "s", "k")  # as the operators keep keys


def slots(plan: LayerPlan) -> dict[str, tuple[str, int]]:
    """The states of a layer by slot: the operator's name for it, and its number of channels."""
    view = plan.layer.view
    if plan.operator == "SlimHiddenAttention":
        assert view.keys.projection is not None
        return {"hidden": ("hidden", view.keys.projection.width)}
    if plan.operator == "SlimCrossAttention":
        return {}
    slots = {"key": ("key", view.head_width)}
    if plan.rank:
        slots["residual"] = ("residual", plan.rank)
    return slots


def _rows(plan: LayerPlan, like: ir.Value, tokens: str) -> list[int | ir.SymbolicDim | str]:
    """The axes of batch and tokens of a cache, by the exporter's names where there are any."""
    named = list(zip(plan.layer.past_axes or (), like.shape or (), strict=False))
    return [
        next((dim for one, dim in named if one == letter and _is_told(dim)), name)
        for letter, name in (("b", "batch_size"), ("s", tokens))
    ]


def _shape(
    plan: LayerPlan, slot: str, rows: Sequence[int | ir.SymbolicDim | str], width: int
) -> ir.Shape:
    """The shape of a state."""
    heads = [plan.layer.view.keys.heads] if slot == "key" else []
    return ir.Shape([rows[0], *heads, rows[1], width])


def _is_told(dim: int | ir.SymbolicDim) -> bool:
    return isinstance(dim, int) or dim.value is not None


def add_states(model: ir.Model, plan: LayerPlan) -> dict[str, ir.Value]:
    """Declare the inputs by which the states of a layer enter, by the operator's names."""
    layer, found = plan.layer, {}
    old = layer.past_key
    if old is None:
        return {}
    inputs = model.graph.inputs
    place, rows = inputs.index(old), _rows(plan, old, "past_sequence_length")
    for slot, (name, width) in slots(plan).items():
        entering = state_names(layer.number, slot)[0]
        if slot == "key" and layer.past_axes == _KEY_AXES:
            value, value.name = old, entering
        else:
            value = ir.Value(name=entering)
            place += 1
            inputs.insert(place, value)
        value.shape = _shape(plan, slot, rows, width)
        value.type = ir.TensorType(plan.cache)
        found[f"past_{name}"] = value
    return found


def gone_shapes(plan: LayerPlan, past: dict[str, ir.Value]) -> dict[ir.Value, list[Length]]:
    """The shapes of the cache inputs of a layer that are to go."""
    layer = plan.layer
    found: dict[ir.Value, list[Length]] = {}
    for old, kind in ((layer.past_key, "keys"), (layer.past_value, "values")):
        if old is None or old is past.get("past_key"):
            continue
        heads = next(h for v in layer.views if _enters(h := getattr(v, kind), old))
        if plan.operator == "SlimCrossAttention":
            state, axis = past["hidden"], 1
        else:
            state = past.get("past_key") or past["past_hidden"]
            axis = 2 if "past_key" in past else 1
        lengths: dict[str, Length] = {
            "b": [(state, 0)],
            "h": heads.heads,
            "s": [(state, axis)],
            "k": heads.head_width,
            "hk": heads.heads * heads.head_width,
        }
        axes = heads.state_axes if heads.cache is None else heads.cache.past_axes or ()
        found[old] = [lengths[one] for one in axes]
    return found


def _enters(heads: Heads, past: ir.Value) -> bool:
    return heads.input is past or (heads.cache is not None and heads.cache.past is past)


def leaving_states(
    plan: LayerPlan, leaving: dict[str, dict[ir.Graph, ir.Value]]
) -> dict[str, list[State]]:
    """What takes the place of a layer's cache outputs."""
    layer = plan.layer
    assert layer.present_key is not None
    assert layer.present_value is not None
    old, states = layer.present_key, []
    rows = _rows(plan, old, "total_sequence_length")
    for slot, (name, width) in slots(plan).items():
        shape = _shape(plan, slot, rows, width)
        leaves = state_names(layer.number, slot)[1]
        states.append(State(leaves, plan.cache, shape, leaving[f"present_{name}"]))
    return {old.name or "": states, layer.present_value.name or "": []}


def state_shapes(model: ir.Model, plans: Sequence[LayerPlan]) -> dict[ir.Value, list[Length]]:
    """The shapes of states, told by token ids and mask, so that a state may be a longer buffer."""
    mask = find_mask(model)
    ids = next((one.name for one in read_interface(model).role("ids")), None)
    tokens = next((value for value in model.graph.inputs if value.name == ids), None)
    if mask is None or tokens is None:
        return {}
    build = builder_before(model, model.graph[0], "onnx_tricks.past")
    lengths = [build.Slice(build.Shape(value), [1], [2]) for value in (mask, tokens)]
    batch: Length = [(tokens, 0)]
    past = build.Sub(*lengths)
    found: dict[ir.Value, list[Length]] = {}
    inputs = {value.name: value for value in model.graph.inputs}
    for plan in plans:
        for slot, (_, width) in slots(plan).items():
            value = inputs[state_names(plan.layer.number, slot)[0]]
            heads = [plan.layer.view.keys.heads] if slot == "key" else []
            found[value] = [batch, *heads, past, width]
    return found


def may_be_buffers(states: Collection[ir.Value], operators: Collection[str]) -> bool:
    """Whether a state may be a buffer with room for more tokens, past and present in one."""
    return bool(states) and all(
        node.op_type in operators for state in states for node in state.consumers()
    )


def describe(plans: Sequence[LayerPlan]) -> dict[str, Any]:
    """The layout of the states, for those who run the model."""
    return {
        "version": VERSION,
        "layers": [
            {**plan.details(), "slots": list(slots(plan)), "cache": plan.cache.name.lower()}
            for plan in plans
        ],
    }
