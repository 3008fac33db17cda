"""cancel-norm: RMSNorms dropped where norms behind them undo whatever they do to a row's size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.edit import add_constant, insert
from onnx_tricks.graph.names import node_name
from onnx_tricks.graph.shapes import dtype_of
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.homogeneous import End, spread
from onnx_tricks.patterns.norm import Norm
from onnx_tricks.patterns.norms import find_norms
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.runtime.activations import observe

__all__ = ["CancelNorm"]

_ROUNDINGS = 4


@dataclasses.dataclass(frozen=True)
class Cancellation(Site):
    """One RMSNorm that others make superfluous.

    Attributes:
        norm: The norm.
        error: By how much what the others compute may change, relative, on seeded tokens.
    """

    norm: Norm | None = None
    error: float = 0.0

    def details(self) -> list[dict[str, Any]]:
        """The bound on what epsilon changes."""
        return [{"node": self.node, "epsilon_error": self.error}]


@dataclasses.dataclass(frozen=True)
class CancelNorm(Pass):
    """Drop an RMSNorm where every reader of it is normalised again.

    ``n2(n1(x) W)  ==>  n2(x W)``, as ``n1(x) = c x`` with a number c > 0 for each row

    Shapes: x [..., D], W [D, F]; a gain of n1 stays as ``x * g``.
    Approximate: epsilon no longer counts in the same unit. With M the mean square that n2 measures
    in the original and d the power of c that reaches it, what n2 computes changes by
    ``|sqrt((M + eps) / (M + eps c^(2d))) - 1|``: it is bounded on seeded tokens, reported, and
    refused where it exceeds four roundings in the type of the norm.
    Applies when: from n1 to norms behind it, all paths are linear layers without bias, ReLU,
    products of two such values, and moves of rows; nothing else reads it.
    Saves: the statistic of the row, and the division by it.
    Source: arXiv:2407.09577, section 6.
    """

    name: ClassVar[str] = "cancel-norm"
    summary: ClassVar[str] = "Drop RMSNorms whose every reader is normalised again (epsilon moves)."
    default: ClassVar[bool] = False

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield the norms that can be dropped, and what feels the others."""
        norms = [one for one in find_norms(model) if isinstance(one, Norm)]
        entries = {use: one for one in norms if one.kind in ("rms", "layer") for use in one.entries}
        order = {node: place for place, node in enumerate(model.graph.all_nodes())}
        extents = Extents()
        found: dict[int, tuple[End, ...]] = {}
        for index, norm in enumerate(norms):
            if norm.kind != "rms" or norm.axis != -1 or norm.node.op_type.startswith("Skip"):
                continue
            reached = spread(norm, order, entries, extents)
            reason = str(reached.obstacle or "")
            if norm.biased:
                reason = "its bias would not be scaled along"
            if reason:
                yield Skip(node_name(norm.node), f"{reason}: the size of its rows is felt there")
            elif reached.ends:
                found[index] = reached.ends
        # A norm that undoes the factor of another has to stay.
        for index, ends in list(found.items()):
            if index in found:
                for end in ends:
                    found.pop(norms.index(end.norm), None)
        values = [norms[i].source for i in found] + [
            e.norm.source for es in found.values() for e in es
        ]
        seen = observe(model, values) if found else None
        for index, ends in found.items():
            norm = norms[index]
            if seen is None:
                reason = (
                    "what epsilon does cannot be measured: the model does not run on tokens alone"
                )
                yield Skip(node_name(norm.node), reason)
                continue
            error = max(_error(norm, end, seen) for end in ends)
            allowed = _ROUNDINGS * float(ml_dtypes.finfo(norm.dtype.numpy()).eps) / 2
            if error > allowed:
                yield Skip(
                    node_name(norm.node),
                    f"epsilon would change what the norms behind it compute by {error:.1e}, more "
                    f"than the {allowed:.1e} that rounding in {norm.dtype.name} changes",
                )
                continue
            yield Cancellation(
                node_name(norm.node),
                inputs=(norm.source.name or "",),
                outputs=tuple(end.norm.output.name or "" for end in ends),
                norm=norm,
                error=error,
            )

    def apply(self, model: ir.Model, site: Site) -> None:
        """Let the readers of one norm read its input."""
        assert isinstance(site, Cancellation)
        norm = site.norm
        assert norm is not None
        source = value = norm.read
        given = dtype_of(source) or norm.dtype
        name = f"{node_name(norm.node)}/cancelled"
        if given != norm.dtype:
            to = ir.AttrInt64("to", norm.dtype)
            value = insert(
                norm.node,
                "Cast",
                [value],
                name=name,
                model=model,
                dtype=norm.dtype,
                attributes=[to],
            )
        if not np.all(norm.gain == 1):
            array = norm.gain.astype(norm.dtype.numpy())
            gain = add_constant(model, f"{name}/gain", ir.Tensor(array, dtype=norm.dtype))
            value = insert(
                norm.node, "Mul", [value, gain], name=name, model=model, dtype=norm.dtype
            )
        value.meta.update(norm.output.meta)
        if value is not source:
            value.shape = norm.output.shape
        norm.output.replace_all_uses_with(value)


def _error(norm: Norm, end: End, seen: dict[ir.Value, np.ndarray]) -> float:
    """A bound on the relative change of what a norm computes, over all pairs of observed rows."""
    rows = np.mean(np.square(seen[norm.source].astype(np.float64)), -1) + norm.epsilon
    measured = np.square(seen[end.norm.source].astype(np.float64))
    smallest = measured.mean(end.norm.axis).min()
    factors = np.array([rows.min(), rows.max()]) ** -float(end.degree)
    epsilon = end.norm.epsilon
    ratios = (smallest + epsilon) / (smallest + epsilon * factors)
    return float(np.abs(np.sqrt(ratios) - 1).max())
