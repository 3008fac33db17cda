"""Which stored weights can be rewritten in place, because every reader wants the same change."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping

import onnx_ir as ir

from onnx_tricks.patterns.weight import Weight

__all__ = ["Claim", "Conflict", "find_conflicts", "share_groups"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One reader's wish to change a weight.

    Attributes:
        owner: Who wishes it.
        weight: The weight as its reader sees it.
        node: The reader.
        index: Which of its inputs the weight is.
        change: What is to be done to the stored tensor; equal changes compare equal.
    """

    owner: int
    weight: Weight
    node: ir.Node
    index: int
    change: Hashable


@dataclasses.dataclass(frozen=True)
class Conflict:
    """A stored weight that one owner cannot change in place.

    Attributes:
        claim: The claim that fails.
        others: Readers that want no change, or another one.
    """

    claim: Claim
    others: tuple[ir.Node, ...]


def find_conflicts(claims: Iterable[Claim]) -> list[Conflict]:
    """Find the claims on stored weights that something else reads differently."""
    by_weight: dict[ir.Value, list[Claim]] = defaultdict(list)
    for claim in claims:
        by_weight[claim.weight.stored].append(claim)
    conflicts = []
    for stored, wishes in by_weight.items():
        strangers = _strangers(stored, wishes)
        for claim in wishes:
            others = strangers + [one.node for one in wishes if one.change != claim.change]
            if others or stored.is_graph_output():
                conflicts.append(Conflict(claim, tuple(others)))
    return conflicts


def share_groups(weights: Mapping[int, Iterable[ir.Value]]) -> list[list[int]]:
    """Group owners that share weights, and so have to change them together.

    Args:
        weights: The stored weights of each owner.

    Returns:
        Groups of owners, each sorted, in the order of their first.
    """
    groups: list[tuple[set[int], set[ir.Value]]] = []
    for owner, stored in weights.items():
        members, shared = {owner}, set(stored)
        for group in [one for one in groups if one[1] & shared]:
            groups.remove(group)
            members, shared = members | group[0], shared | group[1]
        groups.append((members, shared))
    return sorted(sorted(members) for members, _ in groups)


def _strangers(stored: ir.Value, wishes: list[Claim]) -> list[ir.Node]:
    """Readers of a stored weight, or of a value on the way from it, that claim nothing."""
    expected: dict[ir.Value, set[tuple[ir.Node, int]]] = defaultdict(set)
    for claim in wishes:
        value = stored
        for node in claim.weight.path:
            expected[value].add((node, 0))
            value = node.outputs[0]
        expected[value].add((claim.node, claim.index))
    return [
        use.node
        for value, known in expected.items()
        for use in value.uses()
        if (use.node, use.idx) not in known and use.node.op_type not in ("Shape", "Size")
    ]
