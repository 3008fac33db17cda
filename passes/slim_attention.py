"""slim-attention: caches of half the size and less, from which K and V are rebuilt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import onnx_ir as ir

from onnx_tricks.graph.edit import remove_dead_nodes
from onnx_tricks.graph.interface import read_interface
from onnx_tricks.operators.body import operator_function
from onnx_tricks.operators.signature import DOMAIN, STATE_KEY, VERSION, Form
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.patterns.heads import Heads
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.slim.calibration import sample_inputs
from onnx_tricks.slim.dimensions import Length
from onnx_tricks.slim.layers import Layer, find_layers
from onnx_tricks.slim.masks import Masks
from onnx_tricks.slim.plan import LayerPlan, Mode, Options, needs_inputs, plan_layer
from onnx_tricks.slim.positions import Angles, find_mask
from onnx_tricks.slim.shapes import free_shapes
from onnx_tricks.slim.states import State, builder_before, replace_outputs, state_names
from onnx_tricks.slim.write import form_of, layer_weights, write_operator

__all__ = ["CacheType", "Mode", "Positions", "SlimAttention", "SlimSite"]

CacheType = Literal["auto", "fp32", "fp16", "bf16"]
Positions = Literal["mask", "state"]
_CACHE_TYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
_LEAST_TOLERANCE, _STRICTER = 2.0, 0.6
_OLDEST_OPSET = 13
_OLDEST_IR = 8  # the first with model-local functions


@dataclasses.dataclass(frozen=True)
class SlimSite(Site):
    """All layers of a decoder that are rewritten; they share operators and positions.

    Attributes:
        plans: What each of them caches.
        forms: The form of each operator.
    """

    plans: tuple[LayerPlan, ...] = ()
    forms: dict[str, Form] = dataclasses.field(default_factory=dict)

    def details(self) -> list[dict[str, Any]]:
        """What each layer caches, and what that costs."""
        return [plan.details() for plan in self.plans]


@dataclasses.dataclass(frozen=True)
class SlimAttention(Pass):
    """Cache less per token: keys alone, the layer's input, or the encoder's output.

    ``softmax(q K^T) V  ==>  (softmax(q rot(K)^T) [K | R]) [A; B]``      (rotated keys)
    ``softmax(q K^T) V  ==>  (softmax((q W_K^T) x^T) x) W_V``            (input or encoder)

    Shapes: K [S, E], R [S, r] a residual that tames the inverse, A [E, V], B [r, V], x [S, D].
    Exact: in real arithmetic; weights are combined in float64 and rounded once. Rounding the cache
    brings an error that the rank of the residual bounds.
    Applies when: keys and values are linear in one input, and keys determine it (E >= D) or are
    not rotated.
    Saves: all cached values, but for r numbers a token; for cross-attention the whole cache.
    Source: arXiv:2503.05840.

    Attributes:
        mode: "k" caches keys wherever possible, "x" the input or nothing, "auto" the smaller.
        tolerance: The error that rounding the cache may bring to the values, as a multiple of the
            error of rounding the values themselves. Where verification fails, a lower one is tried.
        rank: Numbers of residual beside each key; None to choose them by the tolerance.
        cache_dtype: Type of the cached states; "auto" for that of the model.
        positions: Where the positions of cached keys come from: "mask" counts along the attention
            mask, as exporters do (or from zero where there is none); "state" keeps them as one more
            state, for callers that choose positions themselves.
        calibrate: Whether the model may write some text first, to learn what its keys look like:
            the same error from about half the rank.
        encoder_dtype: Type in which an encoder's states enter, "auto" for that of the model. They
            stand for the keys and values of all layers, which feel their rounding at once.
    """

    name: ClassVar[str] = "slim-attention"
    summary: ClassVar[str] = "Cache keys, inputs or encoder states alone; changes cache inputs."
    default: ClassVar[bool] = False
    spans_phases: ClassVar[bool] = True

    mode: Mode = "auto"
    tolerance: float = 5.0
    rank: int | None = None
    cache_dtype: CacheType = "auto"
    positions: Positions = "mask"
    calibrate: bool = True
    encoder_dtype: CacheType = "auto"

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield the layers that can cache less, as one site, and why the others cannot."""
        if self.mode == "off" or STATE_KEY in model.metadata_props:
            return
        opset = model.opset_imports.get("", 1)
        plans: list[LayerPlan] = []
        cache, encoder = (_CACHE_TYPES.get(one) for one in (self.cache_dtype, self.encoder_dtype))
        options = Options(self.mode, self.tolerance, self.rank, cache, encoder)
        layers: list[Layer] = []
        for layer in find_layers(model):
            if isinstance(layer, Skip):
                yield layer
            elif opset < _OLDEST_OPSET:
                yield Skip(layer.label, f"opset {opset} is too old: export with opset 13 or newer")
            else:
                layers.append(layer)
        inputs = self._inputs(model, [one for one in layers if needs_inputs(one, options)])
        mask = find_mask(model)
        for layer in layers:
            plan = plan_layer(layer, options, inputs.get(layer), mask)
            if isinstance(plan, Skip):
                yield plan
            else:
                plans.append(plan)
        plans = _with_residuals(plans, options, inputs, mask)
        if plans:
            label = plans[0].layer.label
            yield SlimSite(label, count=len(plans), plans=tuple(plans), forms=form_of(plans, opset))

    def stricter(self) -> Self | None:
        """The pass with a lower tolerance, while there is one that may help."""
        if self.rank is not None or self.tolerance < _LEAST_TOLERANCE:
            return None
        return dataclasses.replace(self, tolerance=self.tolerance * _STRICTER)

    def _inputs(self, model: ir.Model, layers: Sequence[Layer]) -> dict[Layer, Any]:
        """Rows of the inputs of layers, where the caller wants them and the model runs here."""
        sources = [one.view.keys.projection.source for one in layers if one.view.keys.projection]
        if not self.calibrate or not layers or any(v.graph is not model.graph for v in sources):
            return {}
        rows = sample_inputs(model, sources)
        return {} if rows is None else dict(zip(layers, rows, strict=True))

    def apply(self, model: ir.Model, site: Site) -> None:
        """Rewrite the layers."""
        assert isinstance(site, SlimSite)
        run = DryRun(model)
        angles = Angles(model, run, keep=self.positions == "state")
        masks = Masks(model)
        changes: dict[str, list[State]] = {}
        gone: dict[ir.Value, list[Length]] = {}
        for plan in site.plans:
            form = site.forms[plan.operator]
            weights = layer_weights(model, plan, form)
            past = _add_states(model, plan)
            gone |= _known_shapes(plan, past)
            leaving: dict[str, dict[ir.Graph, ir.Value]] = {}
            for view in plan.layer.views:
                graph = view.node.graph
                assert isinstance(graph, ir.Graph)
                written = write_operator(model, plan, view, form, weights, past, angles, masks)
                for name, value in written.items():
                    leaving.setdefault(name, {})[graph] = value
            changes |= _leave(plan, leaving)
        replace_outputs(model, changes)
        for plan in site.plans:
            if plan.operator == "SlimCrossAttention":
                _narrow_source(model, plan)
        angles.declare()
        free_shapes(model, gone, run)
        for value in gone:
            model.graph.inputs.remove(value)
        _choose_phase(model)
        layout, states = _describe(site), _measured_states(model, site)
        free_shapes(model, states, run, going=False)
        remove_dead_nodes(model)
        layout["shared_buffers"] = _are_only_read_by(states, site.forms)
        for operator, form in site.forms.items():
            function = operator_function(operator, form)
            model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION
        model.ir_version = max(model.ir_version or 0, _OLDEST_IR)
        model.metadata_props[STATE_KEY] = json.dumps(layout)


def _with_residuals(
    plans: list[LayerPlan],
    options: Options,
    inputs: Mapping[Layer, Any],
    mask: ir.Value | None,
) -> list[LayerPlan]:
    """Let all layers with cached keys keep a residual if one does: they share an operator."""
    ranks = [plan.rank for plan in plans if plan.rank]
    if not ranks:
        return plans
    least = dataclasses.replace(options, rank=min(ranks))
    planned = [
        plan_layer(plan.layer, least, inputs.get(plan.layer), mask)
        if plan.operator == "SlimAttention" and not plan.rank
        else plan
        for plan in plans
    ]
    return [plan for plan in planned if isinstance(plan, LayerPlan)]


def _slots(plan: LayerPlan) -> dict[str, tuple[str, int]]:
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


def _shape(plan: LayerPlan, slot: str, like: ir.Value, width: int) -> ir.Shape:
    """The shape of a state: the axes of batch and tokens are named as the exporter did."""
    named = list(like.shape) if like.shape is not None and len(like.shape) == 4 else []
    batch, tokens = (named[0], named[2]) if named else ("batch_size", f"{like.name}.tokens")
    if slot == "key":
        return ir.Shape([batch, plan.layer.view.keys.heads, tokens, width])
    return ir.Shape([batch, tokens, width])


def _add_states(model: ir.Model, plan: LayerPlan) -> dict[str, ir.Value]:
    """Declare the inputs by which the states of a layer enter, by the operator's names."""
    layer, found = plan.layer, {}
    old = layer.past_key
    if old is None:
        return {}
    inputs = model.graph.inputs
    place = inputs.index(old)
    for slot, (name, width) in _slots(plan).items():
        if slot == "key":
            value = old
        else:
            value = ir.Value(name=state_names(old.name or "", slot)[0])
            place += 1
            inputs.insert(place, value)
        value.shape = _shape(plan, slot, old, width)
        value.type = ir.TensorType(plan.cache)
        found[f"past_{name}"] = value
    return found


def _known_shapes(plan: LayerPlan, past: dict[str, ir.Value]) -> dict[ir.Value, list[Length]]:
    """The shapes of the cache inputs of a layer that are to go."""
    layer = plan.layer
    found: dict[ir.Value, list[Length]] = {}
    for old, kind in ((layer.past_key, "keys"), (layer.past_value, "values")):
        if old is None or old is past.get("past_key"):
            continue
        heads = next(h for v in layer.views if _enters(h := getattr(v, kind), old))
        if plan.operator == "SlimCrossAttention":
            assert layer.view.keys.projection is not None
            state, axis = layer.view.keys.projection.source, 1
        else:
            state = past.get("past_key") or past["past_hidden"]
            axis = 2 if "past_key" in past else 1
        lengths: dict[str, Length] = {
            "b": [(state, 0)],
            "h": heads.heads,
            "s": [(state, axis)],
            "k": heads.head_width,
        }
        axes = heads.state_axes if heads.cache is None else heads.cache.axes
        found[old] = [lengths[one] for one in axes]
    return found


def _enters(heads: Heads, past: ir.Value) -> bool:
    return heads.input is past or (heads.cache is not None and heads.cache.past is past)


def _leave(plan: LayerPlan, leaving: dict[str, dict[ir.Graph, ir.Value]]) -> dict[str, list[State]]:
    """What takes the place of a layer's cache outputs."""
    layer = plan.layer
    assert layer.present_key is not None
    assert layer.present_value is not None
    old = layer.present_key
    states = []
    for slot, (name, width) in _slots(plan).items():
        present = old.name if slot == "key" else state_names(old.name or "", slot)[1]
        states.append(
            State(
                present or "",
                plan.cache,
                _shape(plan, slot, old, width),
                leaving[f"present_{name}"],
            )
        )
    return {old.name or "": states, layer.present_value.name or "": []}


def _narrow_source(model: ir.Model, plan: LayerPlan) -> None:
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


def _choose_phase(model: ir.Model) -> None:
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


def _measured_states(model: ir.Model, site: SlimSite) -> dict[ir.Value, list[Length]]:
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
    for plan in site.plans:
        key = plan.layer.past_key
        for slot, (_, width) in _slots(plan).items():
            assert key is not None
            value = key if slot == "key" else inputs[state_names(key.name or "", slot)[0]]
            heads = [plan.layer.view.keys.heads] if slot == "key" else []
            found[value] = [batch, *heads, past, width]
    return found


def _are_only_read_by(states: Collection[ir.Value], operators: Collection[str]) -> bool:
    """Whether a state may be a buffer with room for more tokens, past and present in one."""
    return bool(states) and all(
        node.op_type in operators for state in states for node in state.consumers()
    )


def _describe(site: SlimSite) -> dict[str, Any]:
    """The layout of the states, for those who run the model."""
    return {
        "version": VERSION,
        "layers": [
            {**plan.details(), "slots": list(_slots(plan)), "cache": plan.cache.name.lower()}
            for plan in site.plans
        ],
    }
