"""precompute-first-layer: what depends on the token id alone, looked up instead of computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import onnx_ir as ir

from onnx_tricks.first_layer.growth import Growth, estimate
from onnx_tricks.first_layer.write import Replacement
from onnx_tricks.graph.names import node_name
from onnx_tricks.patterns.cut import Cut, find_cut
from onnx_tricks.patterns.positions import find_added_rows
from onnx_tricks.patterns.region import Region
from onnx_tricks.patterns.region_search import find_regions
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.runtime.sessions import load_runtime
from onnx_tricks.runtime.tabulate import Bar

__all__ = ["FirstLayer", "Growth", "PrecomputeFirstLayer"]


@dataclasses.dataclass(frozen=True)
class FirstLayer(Site):
    """One lookup of token ids and the first layer behind it.

    Attributes:
        region: What depends on the ids alone.
        cut: What is stored of it.
        growth: What that costs.
    """

    region: Region = dataclasses.field(kw_only=True)
    cut: Cut = dataclasses.field(kw_only=True)
    growth: Growth = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class PrecomputeFirstLayer(Pass):
    """Look up what the first layer computes from the token id alone, up to attention.

    ``q, k, v = n(E[id]) W_QKV  ==>  x, q, k, v = Split(T[id])``, ``T = [E | n(E) W_QKV]``

    Shapes: E [V, D], T [V, n]; n is 2 (D + K) for D query and K key numbers per token, in parallel
    blocks too, where x + FFN(n(x)) takes the place of x.
    Exact: the table is computed by ONNX Runtime from the same operators; sums of a parallel block
    change their order. bfloat16 is computed in float32 and rounded once.
    Applies when: the first linear layers read nothing but the looked-up row (no learned positions).
    Saves: the weights in front of the first attention, and reading them for every token.
    Source: arXiv:2402.13388.

    Attributes:
        max_growth: Refuse where the constants would grow by more than this, in per cent.
        bar: Shows how far a table is while it is written.
    """

    name: ClassVar[str] = "precompute-first-layer"
    summary: ClassVar[str] = "Look up what the first layer computes from the token id alone."
    default: ClassVar[bool] = False

    max_growth: float = 10.0
    bar: Bar | None = dataclasses.field(default=None, repr=False, compare=False)

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield the first layer that can be stored, or why there is none."""
        regions = find_regions(model)
        if not regions:
            yield Skip(
                model.graph.name or "graph",
                "no Gather looks up token ids in a constant table: the model takes embeddings, "
                "images or sound, or its table is packed",
            )
            return
        cuts = [(region, find_cut(region)) for region in regions]
        worth = [(region, cut) for region, cut in cuts if cut.matrices]
        for region, cut in worth:
            growth = estimate(model, region, cut)
            if growth.percent <= self.max_growth:
                # One at a time: the next round sees what is left.
                yield _site(region, cut, growth)
                return
            yield Skip(_label(region), _too_large(region, growth, self.max_growth))
        if not worth:
            # Positions are looked up too, but worked out before.
            region = max(regions, key=lambda one: (one.ids.is_graph_input(), one.vocabulary))
            reason = _obstacle(region)
            if reason:
                yield Skip(_label(region), reason)

    def apply(self, model: ir.Model, site: Site) -> None:
        """Put one table, one Gather and one Split in the place of a first layer."""
        assert isinstance(site, FirstLayer)
        load_runtime()  # which the table will need: better missed now than when files are written
        Replacement(model, site.region, site.cut, self.bar).write()


def _site(region: Region, cut: Cut, growth: Growth) -> FirstLayer:
    names = [region.members[key][0].name for key in cut.stored if key in region.members]
    inputs = [value.name for value in _graph_inputs(region.ids)]
    for join in cut.joins:
        inputs += [value.name for value in join.others]
        names += [value.name for value in join.node.outputs if value.name]
    return FirstLayer(
        _label(region),
        inputs=tuple(name or "" for name in dict.fromkeys(inputs)),
        outputs=tuple(name or "" for name in dict.fromkeys(names)),
        region=region,
        cut=cut,
        growth=growth,
    )


def _too_large(region: Region, growth: Growth, limit: float) -> str:
    numbers = growth.table // region.vocabulary
    return (
        f"its table of {region.vocabulary:,} tokens would take {growth.table:,} bytes ({numbers:,} "
        f"a token) and {growth.removed:,} bytes would go: the constants would grow by "
        f"{growth.percent:.1f} %, from {growth.before:,} to {growth.after:,} bytes "
        f"(--max-growth {limit:g} allows less)"
    )


def _obstacle(region: Region) -> str:
    """Why nothing behind a lookup is worth storing; empty where it is stored already."""
    wide = [members for key, members in region.members.items() if region.row(key).width > 1]
    values = [value for members in wide for value in members]
    readers = list(dict.fromkeys(node for one in values for node in region.outside_readers(one)))
    for node in readers:
        added = find_added_rows(node, region)
        if added is not None:
            return (
                f"{node.name or node.op_type} ({node.op_type}) adds rows of {added!r} that do not "
                "come from the token ids (positions or token types), so that the first layer is "
                "not a function of the token id alone"
            )
    if any(len(operation.outputs) > 1 for operation in region.operations):
        return ""
    named = ", ".join(f"{one.name or one.op_type} ({one.op_type})" for one in readers[:3])
    operands = [operand for one in readers[:1] for operand in one.inputs if operand is not None]
    inputs = [one.name for operand in operands for one in _graph_inputs(operand)]
    others = [name for name in dict.fromkeys(inputs) if name != region.ids.name]
    return (
        "no linear layer with constant weights lies between the lookup and what depends on more "
        f"than the token id: {named or 'nothing reads it'}"
        + (f", which depends on {', '.join(map(repr, others[:2]))}" if others else "")
    )


def _label(region: Region) -> str:
    return node_name(region.lookup)


def _graph_inputs(value: ir.Value) -> list[ir.Value]:
    """The inputs of the graph that a value is computed from."""
    found, pending, seen = [], [value], set()
    while pending:
        one = pending.pop()
        if one in seen:
            continue
        seen.add(one)
        node = one.producer()
        if node is not None:
            pending += [operand for operand in node.inputs if operand is not None]
        elif one.is_graph_input():
            found.append(one)
    return found
