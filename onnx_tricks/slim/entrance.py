"""What a decoder that serves prompts and steps alike takes in."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.slim.plan import LayerPlan
from onnx_tricks.slim.states import builder_before

__all__ = ["choose_phase", "narrow_source"]


def narrow_source(model: ir.Model, plan: LayerPlan) -> None:
    """Let an encoder's states enter in the type in which they are cached."""
    assert plan.layer.view.keys.projection is not None
    source = plan.layer.view.keys.projection.source
    if source.dtype == plan.cache:
        return
    others = [
        (node, index)
        for node, index in source.uses()
        if node.op_type not in ("Shape", "SlimCrossAttention")
    ]
    if others:
        build = builder_before(model, model.graph[0], source.name or "encoder")
        wide = build.Cast(source, to=source.dtype or plan.dtype)
        for node, index in others:
            node.replace_input_with(index, wide)
    source.type = ir.TensorType(plan.cache)


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
