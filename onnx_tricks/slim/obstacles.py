"""Why a layer cannot be rewritten, whatever is cached."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.graph.phases import PROMPT, STEP
from onnx_tricks.graph.shapes import dim
from onnx_tricks.patterns.attention import Attention
from onnx_tricks.patterns.cache import STACKED
from onnx_tricks.patterns.projection import Projection
from onnx_tricks.slim.dependence import computed_from
from onnx_tricks.slim.encoder import find_encoded
from onnx_tricks.slim.layers import Layer
from onnx_tricks.slim.masks import unclear_mask
from onnx_tricks.slim.queries import can_be_written

__all__ = ["changes_keys", "obstacle", "too_narrow"]


def obstacle(layer: Layer, mask: ir.Value | None) -> str:
    """Why a layer cannot be rewritten, whatever is cached; empty when it can."""
    views = layer.views
    view = layer.view
    if view.keys.projection is None or view.values.projection is None:
        return (
            "its keys and values come from the caller: export a decoder that makes them of the "
            "encoder's states in its first phase, as Optimum does, and give the folder"
        )
    if changes_keys(view) and (narrow := too_narrow(view.keys.projection)):
        return narrow
    if layer.past_key is not None and layer.past_key is layer.past_value:
        return STACKED
    if layer.present_key is None or layer.present_value is None:
        return (
            "its cache does not leave the graph as outputs of its own: return earlier and new keys "
            "together, and the values likewise"
        )
    if layer.past_key is None or layer.past_value is None:
        return (
            "the graph makes its cache but takes none: give a folder with both phases, "
            f"{PROMPT} and {STEP}"
        )
    for one in views:
        unclear = _unclear_cache(one)
        if unclear:
            return unclear
        unclear = unclear_mask(one, mask)
        if unclear:
            return f"{one.node.op_type} {unclear}"
        if isinstance(one.keys.norm, str):
            return f"its keys {one.keys.norm}"
        if one.keys.norm is not None and one.cross:
            return "the keys of an encoder are normalised"
        rotary = one.keys.rotary
        if rotary is not None and not (rotary.inside or rotary.positions or rotary.rows):
            return "its rotation is not a function of the positions alone"
        if rotary is not None and rotary.start:
            return f"its rotation begins at channel {rotary.start} of a head, not at the first"
        if not can_be_written(one):
            return "its queries are arranged in a way that is not understood"
        if one.merged is None:
            return "its heads are not put side by side after it"
        seen = _seen_outside(one)
        if seen is not None:
            return (
                f"{seen.name!r}, made of its attention weights, is an output too: export the "
                "decoder without them (output_attentions=False)"
            )
    if view.cross and find_encoded(view.keys.projection.source) is None:
        return "the encoder's states are changed by more than a projection before its keys are made"
    sources = [one.keys.projection.source for one in views if one.keys.projection]
    if view.cross and any(one is not sources[0] for one in sources):
        return "the phases of the decoder change the encoder's states each by itself"
    if view.keys.rotary is not None and view.cross:
        return "the keys of an encoder are rotated"
    return _difference(view.keys.projection, view.values.projection)


def _seen_outside(view: Attention) -> ir.Value | None:
    """An output that is made of the scores or weights of a layer, beside the layer's own."""
    assert view.merged is not None
    # Keys and values leave an operator too, perhaps as halves of one output.
    states = [one.cache.present for one in (view.keys, view.values) if one.cache is not None]
    inner = view.node.outputs[1:] if view.weights is None else view.node.inputs[:1]
    sources = [one for one in inner if one is not None and one not in states]
    made = computed_from(sources, ends=[view.merged, *states]).difference(states)
    leaving = [one for one in made if one.is_graph_output()]
    return min(leaving, key=lambda one: one.name or "", default=None)


def changes_keys(view: Attention) -> bool:
    """Whether keys meet queries as more than a linear function of the layer's input."""
    return view.keys.rotary is not None or view.keys.norm is not None


def _unclear_cache(view: Attention) -> str:
    """Why a cache that keys or values are appended to cannot be replaced; empty when it can."""
    for cache in (view.keys.cache, view.values.cache):
        if cache is None or cache.past is None or cache.node is None:
            continue
        axes = cache.past_axes or ()
        if not set(axes) <= {*"bhsk", "hk"} or "s" not in axes:
            return f"what the axes of the input {cache.past.name!r} stand for cannot be told"
        length = dim(cache.past, axes.index("s"))
        if length is not None:
            return (
                f"its cache is made for exactly {length} earlier tokens: export the model with "
                "dynamic axes, so that it can grow from nothing"
            )
    return ""


def too_narrow(keys: Projection) -> str:
    """Why keys do not determine the layer's input; empty where they may."""
    channels = keys.columns.size
    if channels >= keys.width:
        return ""
    return (
        f"its {keys.heads} key heads of {keys.head_width} channels, {channels} in all, cannot "
        f"determine an input of {keys.width}, of which the values are a function"
    )


def _difference(keys: Projection, values: Projection) -> str:
    if keys.source is not values.source:
        return "its keys and values are computed from different inputs"
    if keys.heads != values.heads:
        return f"it has {keys.heads} key heads and {values.heads} value heads"
    return ""
