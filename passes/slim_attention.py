"""slim-attention: caches of half the size and less, from which K and V are rebuilt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import onnx_ir as ir

from onnx_tricks.graph.edit import remove_dead_nodes
from onnx_tricks.operators.body import operator_function
from onnx_tricks.operators.signature import DOMAIN, STATE_KEY, VERSION, Form
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.slim.calibration import sample_inputs
from onnx_tricks.slim.dimensions import Length
from onnx_tricks.slim.entrance import Entrance, choose_phase
from onnx_tricks.slim.forms import form_of, sharing
from onnx_tricks.slim.layers import Layer, find_layers
from onnx_tricks.slim.layout import (
    add_states,
    describe,
    gone_shapes,
    leaving_states,
    may_be_buffers,
    state_shapes,
)
from onnx_tricks.slim.masks import Masks
from onnx_tricks.slim.obstacles import obstacle
from onnx_tricks.slim.plan import LayerPlan, Mode, Options, needs_inputs, plan_layer
from onnx_tricks.slim.positions import Angles, find_mask
from onnx_tricks.slim.shapes import free_shapes
from onnx_tricks.slim.states import State, replace_outputs
from onnx_tricks.slim.write import layer_weights, write_operator

__all__ = ["CacheType", "Mode", "Positions", "SlimAttention", "SlimSite"]

CacheType = Literal["auto", "fp32", "fp16", "bf16"]
Positions = Literal["mask", "state"]
_CACHE_TYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
_LEAST_TOLERANCE, _STRICTER = 1.5, 0.6
_OLDEST_OPSET = 13
_OLDEST_IR = 8  # the first with model-local functions


@dataclasses.dataclass(frozen=True)
class SlimSite(Site):
    """All layers of a decoder that are rewritten; they share operators and positions.

    Attributes:
        plans: What each of them caches.
        forms: The form of each operator.
        left: Why the other layers stay as they are.
    """

    plans: tuple[LayerPlan, ...] = ()
    forms: dict[str, Form] = dataclasses.field(default_factory=dict)
    left: tuple[Skip, ...] = ()

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
        cache_dtype: Type of the cached states; "auto" for that in which a layer computes, whatever
            type its cache had.
        positions: Where the positions of cached keys come from: "mask" counts along the attention
            mask, as exporters do; "state" keeps them as one more state, for callers that choose
            positions themselves. Where no mask tells the positions that callers choose, they are a
            state in any case; where callers choose none, they count from zero.
        calibrate: Whether the model may write some text first, to learn what its keys look like:
            the same error from about half the rank.
        encoder_dtype: Type in which an encoder's states enter; "auto" leaves them theirs. They
            stand for the keys and values of all layers, which feel their rounding at once.
    """

    name: ClassVar[str] = "slim-attention"
    summary: ClassVar[str] = "Cache keys, inputs or encoder states alone; changes cache inputs."
    default: ClassVar[bool] = False
    spans_phases: ClassVar[bool] = True
    cautious: ClassVar[bool] = True

    mode: Mode = "auto"
    tolerance: float = 5.0
    rank: int | None = None
    cache_dtype: CacheType = "auto"
    positions: Positions = "mask"
    calibrate: bool = True
    encoder_dtype: CacheType = "auto"

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield the layers that can cache less, as one site, and why the others cannot."""
        if self.mode == "off":
            return
        if STATE_KEY in model.metadata_props:
            # All layers are rewritten at once; the file tells which were left, and why.
            left = json.loads(model.metadata_props[STATE_KEY]).get("left", [])
            yield from (Skip(one["node"], one["reason"]) for one in left)
            return
        opset = model.opset_imports.get("", 1)
        plans: list[LayerPlan] = []
        skips: list[Skip] = []
        cache, encoder = (_CACHE_TYPES.get(one) for one in (self.cache_dtype, self.encoder_dtype))
        options = Options(self.mode, self.tolerance, self.rank, cache, encoder)
        layers: list[Layer] = []
        mask = find_mask(model)
        for layer in find_layers(model):
            if isinstance(layer, Skip):
                skips.append(layer)
            elif opset < _OLDEST_OPSET:
                reason = f"opset {opset} is too old: export with opset 13 or newer"
                skips.append(Skip(layer.label, obstacle(layer, mask) or reason))
            else:
                layers.append(layer)
        inputs = self._inputs(model, [one for one in layers if needs_inputs(one, options)])
        found = [plan_layer(layer, options, inputs.get(layer), mask) for layer in layers]
        skips += [one for one in found if isinstance(one, Skip)]
        for plan in sharing(one for one in found if isinstance(one, LayerPlan)):
            if isinstance(plan, Skip):
                skips.append(plan)
            else:
                plans.append(plan)
        plans = _with_residuals(plans, options, inputs, mask)
        yield from skips
        if plans:
            yield SlimSite(
                plans[0].layer.label,
                count=len(plans),
                plans=tuple(plans),
                forms=form_of(plans, opset),
                left=tuple(skips),
            )

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
        masks, entrance = Masks(model), Entrance(model, narrow=self.encoder_dtype != "auto")
        changes: dict[str, list[State]] = {}
        gone: dict[ir.Value, list[Length]] = {}
        for plan in site.plans:
            form = site.forms[plan.operator]
            weights = layer_weights(model, plan, form)
            past = add_states(model, plan)
            if plan.operator == "SlimCrossAttention":
                past["hidden"] = entrance.of(plan)
            gone |= gone_shapes(plan, past)
            leaving: dict[str, dict[ir.Graph, ir.Value]] = {}
            for view in plan.layer.views:
                graph = view.node.graph
                assert isinstance(graph, ir.Graph)
                written = write_operator(model, plan, view, form, weights, past, angles, masks)
                for name, value in written.items():
                    leaving.setdefault(name, {})[graph] = value
            changes |= leaving_states(plan, leaving)
        replace_outputs(model, changes)
        for plan in site.plans:
            if plan.operator == "SlimCrossAttention":
                entrance.narrow(plan)
        angles.finish()
        free_shapes(model, gone, run)
        for value in gone:
            model.graph.inputs.remove(value)
        choose_phase(model)
        layout, states = describe(site.plans), state_shapes(model, site.plans)
        free_shapes(model, states, run, going=False)
        remove_dead_nodes(model)
        if site.left:
            layout["left"] = [dataclasses.asdict(one) for one in site.left]
        layout["shared_buffers"] = may_be_buffers(states, site.forms)
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
