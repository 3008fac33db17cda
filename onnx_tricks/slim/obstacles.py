"""Why a layer cannot be rewritten, whatever is cached."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.graph.shapes import dim
from onnx_tricks.patterns.attention import Attention
from onnx_tricks.patterns.cache import STACKED
from onnx_tricks.patterns.projection import Projection
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
        return "its keys and values come from the caller, and no file beside it makes them"
    if changes_keys(view) and (narrow := too_narrow(view.keys.projection)):
        return narrow
    if layer.past_key is not None and layer.past_key is layer.past_value:
        return STACKED
    if layer.present_key is None or layer.present_value is None:
        return "its cache does not leave the graph as outputs of its own"
    if layer.past_key is None or layer.past_value is None:
        return "the graph makes its cache but takes none: give the folder with both phases"
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
        if rotary is not None and rotary.inside is None and rotary.positions is None:
            return "its rotation is not a function of the positions alone"
        if rotary is not None and rotary.start:
            return f"its rotation begins at channel {rotary.start} of a head, not at the first"
        if not can_be_written(one):
            return "its queries are arranged in a way that is not understood"
        if one.merged is None:
            return "its heads are not put side by side after it"
    if view.cross and find_encoded(view.keys.projection.source) is None:
        return "the encoder's states are changed by more than a projection before its keys are made"
    sources = [one.keys.projection.source for one in views if one.keys.projection]
    if view.cross and any(one is not sources[0] for one in sources):
        return "the phases of the decoder change the encoder's states each by itself"
    if view.keys.rotary is not None and view.cross:
        return "the keys of an encoder are rotated"
    return _difference(view.keys.projection, view.values.projection)


def changes_keys(view: Attention) -> bool:
    """Whether keys meet queries as more than a linear function of the layer's input."""
    return view.keys.rotary is not None or view.keys.norm is not None


def _unclear_cache(view: Attention) -> str:
    """Why a cache that keys or values are appended to cannot be replaced; empty when it can."""
    for cache in (view.keys.cache, view.values.cache):
        if cache is None or cache.past is None or cache.node is None:
            continue
        axes = cache.past_axes or ()
        if not set(axes) <= set("bhsk") or "s" not in axes:
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
