"""The attention layers of a decoder, each with its cache, wherever its phases are written."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from onnx_tricks.graph.caches import find_caches
from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.names import node_name
from onnx_tricks.graph.traverse import inner_graphs
from onnx_tricks.patterns.attention import Attention, OpaqueAttention, find_attentions
from onnx_tricks.patterns.axes import Axes
from onnx_tricks.patterns.heads import Heads
from onnx_tricks.rewrite import Skip
from onnx_tricks.slim.states import SLOTS, state_names

__all__ = ["Layer", "find_layers"]


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One attention layer that keeps keys and values.

    Attributes:
        views: The layer, once for every graph that computes it: the main graph, or both branches
            of a decoder that was merged from one for the prompt and one for steps.
        past_key: The input by which cached keys enter; None where none do.
        past_value: Likewise for values.
        present_key: The output by which keys leave; None where none do.
        present_value: Likewise for values.
        number: By which its states are named: that in the names of its caches, as Optimum gives
            them, or else its place among the layers, or the next that is free.
    """

    views: tuple[Attention, ...]
    past_key: ir.Value | None
    past_value: ir.Value | None
    present_key: ir.Value | None
    present_value: ir.Value | None
    number: int

    @property
    def view(self) -> Attention:
        """The view that knows most: one whose keys and values come from known projections."""
        known = [v for v in self.views if v.keys.projection and v.values.projection]
        return (known or list(self.views))[0]

    @property
    def past_axes(self) -> Axes | None:
        """What the axes of its key cache run over; None where that cannot be told."""
        caches = [view.keys.cache for view in self.views]
        return next((one.past_axes for one in caches if one is not None and one.past_axes), None)

    @property
    def label(self) -> str:
        """The name of the node to look for."""
        return node_name(self.view.node)


def find_layers(model: ir.Model) -> Iterator[Layer | Skip]:
    """Yield the layers of a decoder in order, and attention that is not understood.

    Args:
        model: A model whose shapes and types have been inferred.
    """
    wrapper = next((node for node in model.graph if node.domain and inner_graphs(node)), None)
    if wrapper is not None:
        reason = f"{wrapper.op_type} decides on the caches of the decoder in it"
        yield Skip(node_name(wrapper), f"{reason}: slim the decoder by itself")
        return
    names = _Names(model)
    views: dict[str, list[Attention]] = {}
    opaque = []
    attentions = list(find_attentions(model))
    for view in attentions:
        if isinstance(view, OpaqueAttention):
            opaque.append(Skip(view.node.name or view.node.op_type, view.reason))
        elif (name := names.of(view.keys)) is not None:
            views.setdefault(name, []).append(view)
    keeps = bool(names.pasts) or any("present" in str(one.name) for one in model.graph.outputs)
    if not views and not keeps:
        yield from _without_cache(model, attentions)
        return
    yield from opaque
    inputs = {value.name: value for value in model.graph.inputs}
    outputs = {value.name: value for value in model.graph.outputs}
    branching = next((node for node in model.graph if node.op_type == "If"), None)
    used: set[str | None] = set()
    phases = 1 if branching is None else len(branching.attributes)
    for place, (name, found) in enumerate(views.items()):
        if len(found) < phases and any(view.node.graph is not model.graph for view in found):
            reason = "one phase of the decoder computes it in a way that is not understood"
            yield Skip(found[0].node.name or name, reason)
            continue
        value_name = next((n for v in found if (n := names.of(v.values))), None)
        caches = (
            _entering(found, "keys", inputs.get(names.past_of(name))),
            _entering(found, "values", inputs.get(names.past_of(value_name or ""))),
            outputs.get(name),
            outputs.get(value_name),
        )
        number = place
        if not found[0].cross:  # which carries nothing on
            own = {one.name for one in caches if one is not None}
            number = _free_number(own, inputs.keys() | outputs.keys() | used, place)
            used.update(name for slot in SLOTS for name in state_names(number, slot))
        yield Layer(tuple(found), *caches, number)


def _free_number(own: Collection[str | None], names: Collection[str | None], place: int) -> int:
    """The number in the names of a layer's caches, or one whose states no others are called by.

    Args:
        own: The names of its caches.
        names: All names of inputs and outputs.
        place: The place of the layer among those that are understood.
    """
    told = (re.match(r"(?:present|past_key_values)\.(\d+)\.", str(name)) for name in own)
    numbers = sorted(int(one.group(1)) for one in told if one is not None)
    others = set(names) - set(own)
    return next(
        number
        for number in itertools.chain(numbers, itertools.count(place))
        if not any(others.intersection(state_names(number, slot)) for slot in SLOTS)
    )


def _without_cache(
    model: ir.Model, attentions: Sequence[Attention | OpaqueAttention]
) -> Iterator[Skip]:
    """Tell it of a model that scores tokens; that an encoder keeps nothing needs no word."""
    limits = {value.limit for value in read_interface(model).role("ids")} - {0}
    shapes = (value.shape for value in model.graph.outputs)
    if attentions and any(shape and shape[-1] in limits for shape in shapes):
        reason = "there is no cache: decoders keep keys and values where they are exported to"
        yield Skip(node_name(attentions[0].node), f"{reason} (Optimum's tasks end in -with-past)")


class _Names:
    """The names of caches: of the outputs by which they leave, and the inputs that these continue.

    Attributes:
        pasts: The caches among the inputs, by the name of the output that continues them.
    """

    def __init__(self, model: ir.Model) -> None:
        self.pasts: dict[str, str] = {}
        self._presents: dict[ir.Value, str] = {}
        for value, cache in find_caches(model).items():
            name = value.name or ""
            present = name.replace("past_key_values", "present")
            self._presents[value] = present if cache.output is None else cache.output.name or ""
            self.pasts[self._presents[value]] = name

    def of(self, heads: Heads) -> str | None:
        """The name of the output by which heads leave, or would if they were not there already."""
        if heads.cache is not None and heads.cache.output is not None:
            return heads.cache.output.name
        past = heads.input if heads.cache is None else heads.cache.past
        if past is None or not past.is_graph_input() or past.name is None:
            return None
        return self._presents.get(past, past.name)

    def past_of(self, present: str) -> str:
        """The name of the input that an output continues."""
        return self.pasts.get(present, present.replace("present", "past_key_values"))


def _entering(views: list[Attention], kind: str, named: ir.Value | None) -> ir.Value | None:
    for view in views:
        heads: Heads = getattr(view, kind)
        if heads.cache is not None and heads.cache.past is not None:
            return heads.cache.past
        if heads.input is not None:
            return heads.input
    return named
