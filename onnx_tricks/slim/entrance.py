"""What a decoder that serves prompts and steps alike takes in."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.slim.encoder import Encoded, find_encoded
from onnx_tricks.slim.plan import LayerPlan
from onnx_tricks.slim.states import builder_before

__all__ = ["Entrance", "choose_phase"]


class Entrance:
    """Where an encoder's states enter, once for all layers that read them.

    Args:
        model: The model.
        narrow: Whether the input itself is to have the type in which states are cached; else it
            keeps its own, as an encoder beside the decoder gives it.
    """

    def __init__(self, model: ir.Model, *, narrow: bool) -> None:
        self._model, self._narrow = model, narrow
        self._written: dict[tuple[object, ...], ir.Value] = {}

    def of(self, plan: LayerPlan) -> ir.Value:
        """What the operator of a layer reads as `hidden`: [B, S, E], in any of its graphs."""
        encoded = _encoded(plan)
        if encoded.direct and (self._narrow or encoded.states.dtype == plan.cache):
            return encoded.states
        layer = encoded.linear and encoded.linear.node
        key = (encoded.states, layer, encoded.mask, plan.cache)
        if key not in self._written:
            name = encoded.states.name or "encoder"
            build = builder_before(self._model, self._model.graph[0], name)
            self._written[key] = encoded.write(build, plan.cache)
        return self._written[key]

    def narrow(self, plan: LayerPlan) -> None:
        """Let the states enter in the type in which they are cached, where that is asked for."""
        encoded = _encoded(plan)
        source = encoded.states
        if not self._narrow or not encoded.direct or source.dtype == plan.cache:
            return
        others = [
            (node, index)
            for node, index in source.uses()
            if node.op_type not in ("Shape", "SlimCrossAttention")
        ]
        if others:
            build = builder_before(self._model, self._model.graph[0], source.name or "encoder")
            wide = build.Cast(source, to=source.dtype or plan.dtype)
            for node, index in others:
                node.replace_input_with(index, wide)
        source.type = ir.TensorType(plan.cache)


def _encoded(plan: LayerPlan) -> Encoded:
    projection = plan.layer.view.keys.projection
    assert projection is not None
    encoded = find_encoded(projection.source)
    assert encoded is not None
    return encoded


def choose_phase(model: ir.Model) -> None:
    """Let a merged decoder tell prompt from step by its caches, and not by an input."""
    branching = next((node for node in model.graph if node.op_type == "If"), None)
    if branching is None:
        return
    flag = branching.inputs[0]
    past = next((v for v in model.graph.inputs if (v.name or "").startswith("past_key")), None)
    if flag is None or not flag.is_graph_input() or past is None or past.shape is None:
        return
    build = builder_before(model, branching, "onnx_tricks.phase")
    axis = 2 if len(past.shape) == 4 else 1
    length = build.Slice(build.Shape(past), [axis], [axis + 1])
    branching.replace_input_with(0, build.Squeeze(build.Greater(length, [0]), [0]))
    model.graph.inputs.remove(flag)
