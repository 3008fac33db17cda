"""What a pass is, and the loop that runs passes over a model.

A pass reads the graph (`Pass.sites`) and says where it applies and where it does not, then
changes one site at a time (`Pass.apply`). Reading never mutates; applying never refuses.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import onnx_ir as ir

from onnx_tricks.errors import PassError, TricksError
from onnx_tricks.graph.edit import lower_constants, remove_dead_nodes
from onnx_tricks.graph.shapes import annotate

__all__ = ["Pass", "PassResult", "Site", "Skip", "run_passes"]

_MAX_ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class Skip:
    """A place where a pass does not apply.

    Attributes:
        node: Name of the node that a user would look for in a graph viewer.
        reason: Why, in words a user can act on.
    """

    node: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Site:
    """A place where a pass applies. Passes subclass it with what `Pass.apply` needs.

    Attributes:
        node: Name of the node that a user would look for in a graph viewer.
        count: How many of the pass's subjects (norms, blocks, layers) the site rewrites at once.
        inputs: Names of the values that enter the rewritten region.
        outputs: Names of the values that leave it. Both sets of values exist, under the same
            names and with the same meaning, before and after the rewrite: verification cuts the
            region out of both models along them.
    """

    node: str
    count: int = dataclasses.field(default=1, kw_only=True)
    inputs: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    outputs: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    def details(self) -> list[dict[str, Any]]:
        """What a report tells beyond the count: plain data, one row for each subject."""
        return []


class Pass(abc.ABC):
    """One exact rewrite of a model. Subclasses are frozen dataclasses; fields are their options.

    Class attributes:
        name: The id on the command line; the module is named alike (`fold-norm`, fold_norm.py).
        summary: One line for `onnx-tricks list`.
        default: Whether the pass belongs to the default set: it keeps inputs and outputs and does
            not grow the file.
        spans_phases: Whether the pass needs a decoder's prompt and steps in one model.
        cautious: Whether its error differs so much among inputs that one which verification finds
            close to the limit is too large: `stricter` is then tried as well.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    default: ClassVar[bool] = True
    spans_phases: ClassVar[bool] = False
    cautious: ClassVar[bool] = False

    @abc.abstractmethod
    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield every place where the pass applies or might be expected to; never mutates."""

    def stricter(self) -> Self | None:
        """The pass with less room for error, to try where verification fails; or None."""
        return None

    @abc.abstractmethod
    def apply(self, model: ir.Model, site: Site) -> None:
        """Rewrite one site that `sites` returned."""


@dataclasses.dataclass
class PassResult:
    """What one pass did to one model."""

    name: str
    applied: list[Site]
    skipped: list[Skip]
    seconds: float

    @property
    def count(self) -> int:
        """Number of norms, blocks or layers rewritten."""
        return sum(site.count for site in self.applied)


def run_passes(model: ir.Model, passes: Sequence[Pass]) -> list[PassResult]:
    """Run passes in order on a model, in place.

    Args:
        model: The model to change.
        passes: The passes, in the order in which they run.

    Returns:
        One result per pass.

    Raises:
        PassError: A pass failed on a site that it had accepted.
    """
    results: list[PassResult] = []
    for current in passes:
        start = time.perf_counter()
        try:
            sites, skips = _run(current, model)
        except TricksError:
            raise
        except Exception as error:
            before = ", ".join(result.name for result in results) or "none"
            raise PassError(
                f"{current.name} failed: {type(error).__name__}: {error} (passes before it: "
                f"{before}). This is a defect of onnx-tricks; --skip {current.name} goes around it."
            ) from error
        results.append(PassResult(current.name, sites, skips, time.perf_counter() - start))
    lower_constants(model)
    return results


def _run(current: Pass, model: ir.Model) -> tuple[list[Site], list[Skip]]:
    """Run one pass until it finds no more sites: one rewrite may open the way for another."""
    applied: list[Site] = []
    annotate(model)
    for _ in range(_MAX_ROUNDS):
        found = list(current.sites(model))
        sites = [item for item in found if isinstance(item, Site)]
        skips = [item for item in found if isinstance(item, Skip)]
        applied += sites
        if not sites:
            return applied, skips
        for site in sites:
            current.apply(model, site)
        remove_dead_nodes(model)
    raise PassError(f"{current.name} still finds sites after {_MAX_ROUNDS} rounds")
