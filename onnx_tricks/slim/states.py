"""The states that a decoder carries from step to step: its cache inputs and outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnx_tricks.graph.build import Builder
from onnx_tricks.graph.edit import fresh_name
from onnx_tricks.graph.shapes import dtype_of

__all__ = ["SLOTS", "State", "builder_before", "replace_outputs", "state_names"]


@dataclasses.dataclass(frozen=True)
class State:
    """An output that carries a state on.

    Attributes:
        name: Its name.
        dtype: Its element type.
        shape: Its shape.
        values: What it is, in every graph that computes it: the main graph, or both branches.
    """

    name: str
    dtype: ir.DataType
    shape: ir.Shape
    values: Mapping[ir.Graph, ir.Value]


SLOTS = ("key", "residual", "hidden")
"""What a layer may carry on."""


def state_names(layer: int, slot: str) -> tuple[str, str]:
    """The names of a state, whatever its cache was called: of the input and of the output.

    Args:
        layer: The layer's number.
        slot: One of `SLOTS`.
    """
    return f"past_key_values.{layer}.{slot}", f"present.{layer}.{slot}"


def builder_before(model: ir.Model, node: ir.Node, stem: str) -> Builder:
    """A builder that places nodes in front of another, in its graph."""
    graph = node.graph
    assert graph is not None
    return Builder(
        lambda new: graph.insert_before(node, new),
        lambda op_type: fresh_name(model, f"{stem}/{op_type}"),
    )


def replace_outputs(model: ir.Model, changes: Mapping[str, Sequence[State]]) -> None:
    """Replace outputs of a model by states, each output by any number of them.

    Args:
        model: The model; its decoder is the main graph, or the two branches of one If.
        changes: What takes the place of an output, by its name.
    """
    graph = model.graph
    branching = next((node for node in graph if node.op_type == "If"), None)
    kept: list[tuple[ir.Value, Sequence[State] | None]] = [
        (output, changes.get(output.name or "")) for output in graph.outputs
    ]
    for output, states in kept:
        if states is not None:
            # Whatever still reads it, its name is that of a state now.
            output.name = fresh_name(model, f"{output.name}/old")
    if branching is None:
        outputs = [v for o, new in kept for v in ([o] if new is None else _named(new, graph))]
    else:
        outputs = _replace_branches(graph, branching, kept)
    graph.outputs.clear()
    graph.outputs.extend(outputs)


def _named(states: Sequence[State], graph: ir.Graph) -> list[ir.Value]:
    """The values of states in one graph, declared."""
    values = []
    for state in states:
        value = state.values[graph]
        value.name, value.shape, value.type = state.name, state.shape, ir.TensorType(state.dtype)
        values.append(value)
    return values


def _replace_branches(
    graph: ir.Graph, branching: ir.Node, kept: Sequence[tuple[ir.Value, Sequence[State] | None]]
) -> list[ir.Value]:
    """Give an If other outputs: a new node in its place, its branches returning the states."""
    becomes = {_behind(output): states for output, states in kept if states is not None}
    plan = [(value, becomes.get(value)) for value in branching.outputs]
    for attribute in branching.attributes.values():
        branch = attribute.as_graph()
        old = list(branch.outputs)
        branch.outputs.clear()
        for output, (_, states) in zip(old, plan, strict=True):
            branch.outputs.extend([output] if states is None else _named(states, branch))
    names: list[ir.Value | State] = [
        one for v, new in plan for one in ([v] if new is None else new)
    ]
    new = ir.Node("", "If", branching.inputs, branching.attributes.values(), num_outputs=len(names))
    new.name = branching.name
    made: dict[str | None, ir.Value] = {}
    for value, like in zip(new.outputs, names, strict=True):
        dtype = dtype_of(like) if isinstance(like, ir.Value) else like.dtype
        value.name, value.shape = like.name, like.shape
        value.type = None if dtype is None else ir.TensorType(dtype)
        made[like.name] = value
    graph.insert_before(branching, new)
    for value, states in plan:
        for reader, index in () if states is not None else list(value.uses()):
            reader.replace_input_with(index, made[value.name])
    return [
        one
        for output, states in kept
        for one in (
            [made.get(output.name, output)] if states is None else [made[s.name] for s in states]
        )
    ]


def _behind(output: ir.Value) -> ir.Value:
    """What an output is before it is cast, as one is that has another type outside."""
    while (node := output.producer()) is not None and node.op_type in ("Cast", "Identity"):
        assert node.inputs[0] is not None
        output = node.inputs[0]
    return output
