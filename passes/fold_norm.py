"""fold-norm: norm gains and biases folded into the linear layers that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal, Self

import onnx_ir as ir

from onnx_tricks.fold.part import Part, Scaling, find_part
from onnx_tricks.fold.tables import divide_lookups, lookups, sharing_reason
from onnx_tricks.fold.write import copy_weight, make_plain, set_bias
from onnx_tricks.graph.edit import rewrite_constant
from onnx_tricks.graph.names import node_name
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.norm import Norm, OpaqueNorm
from onnx_tricks.patterns.norms import find_norms
from onnx_tricks.patterns.sharing import Claim, Conflict, find_conflicts, share_groups
from onnx_tricks.patterns.weight import Weight
from onnx_tricks.rewrite import Pass, Site, Skip

__all__ = ["FoldNorm"]

SharedWeights = Literal["auto", "rescale", "copy", "skip"]


@dataclasses.dataclass(frozen=True)
class Fold(Site):
    """Norms that have to be folded together, because they share weights.

    Attributes:
        parts: The norms.
        conflicts: Weights that something else reads too, and so are not simply rewritten.
    """

    parts: tuple[Part, ...] = ()
    conflicts: tuple[Conflict, ...] = ()


@dataclasses.dataclass(frozen=True)
class FoldNorm(Pass):
    """Fold a norm's gain and bias into the linear layers that read it.

    ``MatMul(g * n(x) + beta, W) + b  ==>  MatMul(n(x), diag(g) @ W) + (b + beta @ W)``

    Shapes: g, beta [D], W [D, F], b [F].
    Exact: in real arithmetic; folded in float64, rounded once to the dtype of W.
    Applies when: g, beta and W are constant and every reader of the norm is linear, whatever mixes
    or scales rows on the way, as long as it takes each channel for itself.
    Saves: D (or 2 D) parameters and one or two element-wise operators per norm.
    The bias stays in the norm, as beta / g, where a linear layer cannot take it (rows that are
    padded or masked in between), where new biases would outgrow what goes (a head without bias),
    or where its rounding would be felt: in half precision, or larger than what it is added to.
    Source: arXiv:2407.09577, Proposition 1 and section 3.5.

    Attributes:
        shared_weights: What to do when something else reads a weight too, as the embedding does in
            a model with a tied head. "rescale" folds the table and divides the gain out of what is
            looked up in it, so that nothing is copied; "copy" gives the linear layer a folded copy
            of its own, which the file grows by; "skip" leaves the norm alone. "auto" rescales
            tables in float32 and float64 and skips those in half precision, where what is looked
            up would be rounded twice.
        wide_only: Whether norms in front of weights in half precision stay as they are: rounding
            those once more is felt, and may fail the proof together with what else is rounded.
    """

    name: ClassVar[str] = "fold-norm"
    summary: ClassVar[str] = "Fold norm gains and biases into the linear layers that read them."

    shared_weights: SharedWeights = "auto"
    wide_only: bool = False

    def stricter(self) -> Self | None:
        """The pass without half precision, where that has not been left out before."""
        return None if self.wide_only else dataclasses.replace(self, wide_only=True)

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield the norms that can be folded, and why the others cannot."""
        extents = Extents()
        parts: dict[int, Part] = {}
        for index, norm in enumerate(find_norms(model)):
            if isinstance(norm, OpaqueNorm):
                yield Skip(node_name(norm.node), norm.reason)
            elif not norm.plain:
                part = find_part(norm, extents)
                if part is None:
                    continue
                if isinstance(part, str):
                    yield Skip(node_name(norm.node), part)
                elif self.wide_only and any(one.linear.weight.half for one in part.readers):
                    reason = "in half precision its weights, rounded once more, failed the proof"
                    yield Skip(node_name(norm.node), reason)
                else:
                    parts[index] = part
        while True:
            last = _last_in_line(parts)
            conflicts = find_conflicts(_claims(last))
            refused = {c.claim.owner: c for c in conflicts if not self._resolves(c)}
            if not refused:
                break
            for owner, conflict in sorted(refused.items()):
                yield Skip(node_name(parts.pop(owner).norm.node), sharing_reason(conflict))
        yield from _together(last, conflicts)

    def apply(self, model: ir.Model, site: Site) -> None:
        """Fold the norms of one site."""
        assert isinstance(site, Fold)
        special = {(c.claim.node, c.claim.index) for c in site.conflicts}
        in_place: dict[ir.Value, Scaling] = {}
        for part in site.parts:
            for reader in part.readers:
                linear = reader.linear
                if (
                    self._policy(linear.weight) == "copy"
                    and (linear.node, linear.weight_index) in special
                ):
                    copy_weight(model, reader, part.scaling(reader))
                else:
                    in_place[linear.weight.stored] = part.scaling(reader)
        for value, scaling in in_place.items():
            rewrite_constant(value, scaling)
        rescaled = [c for c in site.conflicts if self._policy(c.claim.weight) == "rescale"]
        divide_lookups(model, rescaled)
        for part in site.parts:
            for reader, bias in zip(part.readers, part.biases, strict=False):
                set_bias(model, reader, bias)
            make_plain(model, part.norm, part.kept)

    def _resolves(self, conflict: Conflict) -> bool:
        policy = self._policy(conflict.claim.weight)
        return policy == "copy" or (policy == "rescale" and lookups(conflict) is not None)

    def _policy(self, weight: Weight) -> SharedWeights:
        if self.shared_weights != "auto":
            return self.shared_weights
        return "skip" if weight.half else "rescale"


def _last_in_line(parts: dict[int, Part]) -> dict[int, Part]:
    """Leave for another round what another gain scales once more on its way to a linear layer."""
    taken: set[tuple[ir.Node, int]] = set()
    found: dict[int, Part] = {}
    for index, part in sorted(parts.items(), reverse=True):
        places = {(one.linear.node, one.linear.weight_index) for one in part.readers}
        if not places & taken:
            found[index] = part
        taken |= places
    return dict(sorted(found.items()))


def _claims(parts: dict[int, Part]) -> Iterator[Claim]:
    for owner, part in parts.items():
        for reader in part.readers:
            linear = reader.linear
            yield Claim(
                owner, linear.weight, linear.node, linear.weight_index, part.scaling(reader)
            )


def _together(parts: dict[int, Part], conflicts: list[Conflict]) -> Iterator[Fold]:
    """Group norms that share weights; one site a group, in the order of their first norms."""
    weights = {i: [r.linear.weight.stored for r in part.readers] for i, part in parts.items()}
    for members in share_groups(weights):
        chosen = tuple(parts[index] for index in members)
        yield Fold(
            node_name(chosen[0].norm.node),
            count=len(chosen),
            inputs=tuple(_names(v for part in chosen for v in _sources(part.norm))),
            outputs=tuple(_names(r.linear.output for part in chosen for r in part.readers)),
            parts=chosen,
            conflicts=tuple(c for c in conflicts if c.claim.owner in members),
        )


def _sources(norm: Norm) -> list[ir.Value]:
    if norm.fused is None:
        return [norm.source]
    constants = (norm.fused.gain, norm.fused.bias)
    return [v for i, v in enumerate(norm.node.inputs) if v is not None and i not in constants]


def _names(values: Iterator[ir.Value]) -> list[str]:
    return list(dict.fromkeys(value.name or "" for value in values))
