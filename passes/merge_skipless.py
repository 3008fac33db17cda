"""merge-skipless: linear layers that meet without a skip connection or a norm become one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.graph.shapes import dim, dtype_of
from onnx_tricks.inverse import condition
from onnx_tricks.patterns.attention import Attention, OpaqueAttention, find_attentions
from onnx_tricks.patterns.channels import Obstacle
from onnx_tricks.patterns.junction import Junction, find_junction
from onnx_tricks.patterns.sharing import Claim, Conflict, find_conflicts
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.runtime.activations import observe
from onnx_tricks.skipless.choice import Choice, find_choices, judge
from onnx_tricks.skipless.write import take_out

__all__ = ["MergeSkipless"]

_Array = np.ndarray[Any, np.dtype[Any]]
_LEAST_TOLERANCE, _MOST_TOLERANCE = 1.5, 16.0  # below all is refused, above few proofs succeed
_STRICTER = 0.6


@dataclasses.dataclass(frozen=True)
class Merge(Site):
    """Rows between linear layers, and the layer that goes.

    Attributes:
        choice: What goes.
        row: What is to be told of it.
    """

    choice: Choice | None = None
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def details(self) -> list[dict[str, Any]]:
        """What goes, and what that costs in rounding."""
        return [{"node": self.node, **self.row}]


@dataclasses.dataclass(frozen=True)
class MergeSkipless(Pass):
    """Merge a linear layer into its neighbours where neither skip connection nor norm is between.

    ``(a P) M  ==>  a (P M)``                                    (P alone writes what M reads)
    ``x = h O; x Q, x K, x V  ==>  x' = h (O Q); x', x' (Q^-1 K), x' (Q^-1 V)``
    ``x = a P + h O; x M  ==>  x' = a + h (O P^-1); x' (P M)``   (attention and FFN in parallel)

    Shapes: P, Q [D, D], K, V [D, E], M [D, F], O [F, D], or an embedding in its place.
    Exact: in real arithmetic; products and solutions in float64, rounded once to the type of the
    weight. Rounding is felt the more the worse the inverted matrix is conditioned: of all square
    layers at one place, the one goes for which that is least.
    Applies when: nothing but linear layers, lookups and biases writes the rows in front of an
    attention or behind it, and nothing but linear layers reads them.
    Saves: D^2 numbers a place: two places in a block in series, one where FFN and attention are
    parallel, and one in front of the output layer there.
    Source: arXiv:2404.12362.

    Attributes:
        tolerance: How large the predicted error of what is read at one place may become, as a
            multiple of what it was. Where verification fails, a lower one is tried.
    """

    name: ClassVar[str] = "merge-skipless"
    summary: ClassVar[str] = "Merge linear layers with no skip connection or norm between them."
    default: ClassVar[bool] = False

    tolerance: float = 4.0

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield the places at which a layer can go, and why none can at the others."""
        found: dict[int, tuple[str, list[Choice]]] = {}
        for index, item in enumerate(_places(model)):
            if isinstance(item, Skip):
                yield item
            else:
                found[index] = item
        for conflict in find_conflicts(_claims(found)):
            if conflict.claim.owner in found:
                yield Skip(found.pop(conflict.claim.owner)[0], _sharing_reason(conflict))
        rows = _observe(model, [choices[0].junction for _, choices in found.values()])
        taken: set[ir.Node] = set()
        for label, choices in found.values():
            junction = choices[0].junction
            nodes = {one.node for one in (*junction.writers, *junction.readers)}
            if nodes & taken:
                continue  # what becomes of the layer between two places shows when one is done
            taken |= nodes
            dtype = dtype_of(junction.rows) or ir.DataType.FLOAT
            judged = [judge(one, rows.get(junction.rows), dtype) for one in choices]
            good = [one for one in judged if one.growth <= self.tolerance]
            if not good:
                yield Skip(label, self._reason(judged, dtype))
                continue
            best = min(good, key=lambda one: (-one.saved, one.growth))
            yield Merge(
                label,
                inputs=_names(_entering(junction)),
                outputs=_names(one.output for one in best.others),
                choice=best,
                row=_describe(best),
            )

    def stricter(self) -> Self | None:
        """The pass with a lower tolerance, while there is one that may help."""
        if self.tolerance < _LEAST_TOLERANCE:
            return None
        lower = min(self.tolerance, _MOST_TOLERANCE) * _STRICTER
        return dataclasses.replace(self, tolerance=lower)

    def apply(self, model: ir.Model, site: Site) -> None:
        """Take the layer out."""
        assert isinstance(site, Merge)
        assert site.choice is not None
        take_out(model, site.choice)

    def _reason(self, judged: Sequence[Choice], dtype: ir.DataType) -> str:
        best = min(judged, key=lambda one: one.growth)
        return (
            f"without {best.removed.name}, of condition number "
            f"{condition(best.removed.matrix()):.1e}, rounding in {dtype.name} would bring "
            f"{best.growth:.3g} times the error to what is read there; {self.tolerance:g} times "
            "are allowed (--merge-tolerance)"
        )


def _places(model: ir.Model) -> Iterator[tuple[str, list[Choice]] | Skip]:
    """In front of every attention and behind it, each place once: what can go, or why nothing."""
    attentions = list(find_attentions(model))
    known = [one for one in attentions if isinstance(one, Attention)]
    done = {node for one in known for node in _heads_beside(one)}
    seen: set[ir.Value] = set()
    told: set[str] = set()
    for attention in attentions:
        label = attention.node.name or attention.node.op_type
        if isinstance(attention, OpaqueAttention):
            yield Skip(label, attention.reason)
            continue
        for value in _rows_beside(attention):
            if value in seen:
                continue
            seen.add(value)
            junction = find_junction(value)
            if isinstance(junction, Obstacle):
                if junction.node not in done and str(junction) not in told:
                    told.add(str(junction))  # that of a residual stream holds for all of it
                    yield Skip(label, f"{junction}, so that no layer beside it can be merged")
                continue
            seen |= junction.stages
            choices = list(find_choices(junction, known))
            yield (label, choices) if choices else Skip(label, _no_choice(junction))


def _heads_beside(attention: Attention) -> set[ir.Node]:
    """The nodes that make heads of rows and rows of heads: where they are met, a layer has gone."""
    found: set[ir.Node] = set()
    for heads in (attention.query, attention.keys, attention.values):
        if heads.projection is not None and heads.projection.linear is None:
            found |= _between(heads.operand, heads.projection.source)
    if attention.merged is not None:
        made = attention.context.producer()
        found |= _between(attention.merged, attention.context) | ({made} if made else set())
    return found


def _between(value: ir.Value, source: ir.Value) -> set[ir.Node]:
    """The nodes that make one value of another, shapes aside."""
    found: set[ir.Node] = set()
    pending = [value]
    while pending:
        one = pending.pop()
        node = one.producer()
        if one is source or node is None or node in found or node.op_type in ("Shape", "Size"):
            continue
        found.add(node)
        pending += [operand for operand in node.inputs if operand is not None]
    return found


def _rows_beside(attention: Attention) -> list[ir.Value]:
    """What an attention's projections read, and what its output projection writes."""
    parts = [one.projection for one in (attention.query, attention.keys, attention.values)]
    found = [one.source for one in parts if one is not None]
    after = attention.projection.output if attention.projection is not None else None
    # Another width is that of a feed-forward block, into which the output projection has gone.
    if after is not None and any(dim(one, -1) == dim(after, -1) for one in found):
        found.append(after)
    return list(dict.fromkeys(found))


def _no_choice(junction: Junction) -> str:
    sizes = ", ".join(
        " x ".join(map(str, one.weight.tensor.shape))
        for one in (*junction.writers, *junction.readers)
    )
    return f"no layer beside it can go: of weights {sizes} none is square"


def _entering(junction: Junction) -> Iterator[ir.Value]:
    """What the layers and lookups that write the rows read."""
    for made in junction.written:
        for value in made.node.inputs:
            if value is not None and value not in junction.stages and not is_constant(value):
                yield value


def _describe(choice: Choice) -> dict[str, Any]:
    row: dict[str, Any] = {"removed": choice.removed.name, "parameters": choice.saved}
    if choice.inverts:
        row["condition"] = float(f"{condition(choice.removed.matrix()):.3g}")
        row["error_growth"] = float(f"{choice.growth:.3g}")
        row["predicted_error"] = float(f"{choice.error:.3g}")
    return row


def _claims(found: Mapping[int, tuple[str, Sequence[Choice]]]) -> Iterator[Claim]:
    for owner, (_, choices) in found.items():
        junction = choices[0].junction
        for made in junction.written:
            yield Claim(owner, made.weight, made.node, made.index, (owner, "writes"))
        for linear in junction.readers:
            yield Claim(owner, linear.weight, linear.node, linear.weight_index, (owner, "reads"))


def _sharing_reason(conflict: Conflict) -> str:
    weight = conflict.claim.weight
    others = ", ".join(sorted({one.name or one.op_type for one in conflict.others}))
    return (
        f"weight {weight.stored.name!r} is also read by {others or 'the caller'}: a copy of its "
        f"own would take {weight.tensor.nbytes:,} bytes"
    )


def _observe(model: ir.Model, junctions: Sequence[Junction]) -> dict[ir.Value, _Array]:
    """Rows [N, D] float64 of what lies between layers, where the model runs on tokens alone."""
    values = [one.rows for one in junctions if one.rows.graph is model.graph]
    seen = observe(model, values) if values else None
    return {
        value: array.reshape(-1, array.shape[-1]).astype(np.float64)
        for value, array in (seen or {}).items()
    }


def _names(values: Iterable[ir.Value]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.name or "" for one in values))
