"""Which inputs of a graph are caches, along which axis they grow, and what continues them.

What is done with an input tells: new keys or values are appended to it, and both together leave the
graph. Where that cannot be seen (caches of an encoder do not grow, operators of later tools hide
it), its name does, as exporters write it.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.graph.pasts import Growth, find_buffers, find_pasts
from onnx_tricks.graph.places import INTEGERS

__all__ = ["CacheInput", "find_caches"]


@dataclasses.dataclass(frozen=True)
class CacheInput:
    """A graph input that holds what a model keeps of earlier tokens.

    Attributes:
        axis: Along which it grows; None where it does not, or the graph does not show it.
        output: The graph output that continues it; None where none does.
        buffer: Whether it has a fixed length, and new keys or values are written into it.
    """

    axis: int | None
    output: ir.Value | None
    buffer: bool = False


def find_caches(model: ir.Model) -> dict[ir.Value, CacheInput]:
    """The caches among the inputs of a model, in their order."""
    grown, buffers = find_pasts(model), find_buffers(model)
    outputs = {value.name: value for value in model.graph.outputs}
    found: dict[ir.Value, CacheInput] = {}
    for value in model.graph.inputs:
        growth = grown.get(value)
        axis = None if growth is None else growth.axis
        if growth is not None and growth.output is not None and _can_grow(value, growth):
            found[value] = CacheInput(axis, growth.output)
        elif value in buffers:
            found[value] = CacheInput(None, buffers[value], buffer=True)
        elif _is_named(value):
            name = value.name or ""
            spelled = [name.replace(past, "present") for past in ("past_key_values", "past")]
            found[value] = CacheInput(
                axis, next((outputs[one] for one in spelled if one in outputs), None)
            )
    return found


def _can_grow(value: ir.Value, growth: Growth) -> bool:
    """Whether attention may read what grows, as it does not an image that another is put behind."""
    length = None if value.shape is None else value.shape[growth.axis]
    return growth.read and not isinstance(length, int)


def _is_named(value: ir.Value) -> bool:
    """Whether a graph input is a cache by its name and rank."""
    name = (value.name or "").lower()
    rank = 4 if value.shape is None else len(value.shape)
    integer = value.dtype in INTEGERS
    return name.startswith("past_key_values.") or ("past" in name and rank > 3 and not integer)
