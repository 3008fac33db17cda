"""Rotary position embedding: pairs of channels turned by an angle that the position decides.

Exporters write it in a dozen ways: halves or neighbours as pairs, all channels or some, before or
after the transpose to heads, as one operator or as ten. Here the nodes between two values are run
on labelled numbers, once with cos = 1 and once with sin = 1, and the pairs are read off the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import is_constant
from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.patterns.rotary_angles import (
    looked_up_by,
    positions_of,
    table_behind,
    tables_of,
    unscaled,
)
from onnx_tricks.patterns.rotary_pairs import find_pairs
from onnx_tricks.patterns.way_back import VIEWS, take_latest

__all__ = ["Rotary", "find_rotary"]

_MAX_NODES = 60


@dataclasses.dataclass(frozen=True)
class Rotary:
    """One rotation of heads.

    Attributes:
        source: The heads before it.
        output: The heads after it; their axes may come in another order.
        cos: The value that multiplies the channels themselves, as it is read.
        sin: The value that multiplies the channels of the other half of each pair, as it is read.
        axis: The axis of `output` that holds the channels of a head, counted from the end.
        start: The first channel that is turned.
        width: R, the number of channels that are turned.
        interleaved: Whether neighbours make a pair; otherwise channel i and channel i + R / 2.
        positions: Integers of rank 1 or 2, one a token, of which cos and sin are functions row by
            row; None where they are no such functions.
        inside: The fused attention operator that turns the heads itself, from tables `cos` and
            `sin` [positions, R / 2]; then `source` and `output` are what it reads.
        idle: Values at which nothing is turned: ones for cos, zeros for sin.
    """

    source: ir.Value
    output: ir.Value
    cos: ir.Value
    sin: ir.Value
    axis: int
    start: int
    width: int
    interleaved: bool
    positions: ir.Value | None
    inside: ir.Node | None = None
    idle: Mapping[ir.Value, Array] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def rows(self) -> tuple[ir.Value, ir.Value] | None:
        """The tables whose next rows cos and sin are, where no positions look them up."""
        cos, sin = table_behind(self.cos), table_behind(self.sin)
        return None if cos is None or sin is None else (cos, sin)

    @property
    def keeps_size(self) -> bool:
        """Whether it is one of angles alone: nothing scales cos and sin."""
        return self.inside is None and unscaled(self.cos, self.sin)


def find_rotary(
    run: DryRun, value: ir.Value, projected: Callable[[ir.Value], bool]
) -> Rotary | None:
    """Read a value as heads that have been rotated.

    Args:
        run: The dry run of the model.
        value: The value.
        projected: Whether a value comes out of a linear layer, so that it is heads and not angles.
    """
    found = _before(run, value, projected)
    if found is None:
        return None
    source, factors = found
    groups = _grouped(factors)
    if len(groups) != 2:
        return None
    explicit = looked_up_by(value, source)
    for cos, sin in (groups, groups[::-1]):
        idle = _idle(run, cos, sin, explicit)
        pairs = None if idle is None else find_pairs(run, value, source, idle)
        if idle is not None and pairs is not None:
            positions = explicit or positions_of(run, cos[0], sin[0])
            return Rotary(source, value, cos[0], sin[0], *pairs, positions, idle=idle)
    return None


def _before(
    run: DryRun, value: ir.Value, projected: Callable[[ir.Value], bool]
) -> tuple[ir.Value, list[ir.Value]] | None:
    """The heads before the rotation, and what they are multiplied with on the way.

    Walks back along the values that are linear in the heads, the latest first, until one is left.
    """
    frontier, factors = {value}, dict[ir.Value, None]()
    for _ in range(_MAX_NODES):
        if len(frontier) == 1 and factors:
            return frontier.pop(), list(factors)
        node = take_latest(run, frontier)
        if node is None:
            return None
        operands = [operand for operand in node.inputs if operand is not None]
        if node.op_type == "RotaryEmbedding":
            found = tables_of(node)
            if found is None:
                return None
            frontier.add(operands[0])
            factors.update(dict.fromkeys(found))
        elif node.domain != "":
            return None
        elif node.op_type in ("Add", "Sub", "Concat"):
            frontier.update(operands)
        elif node.op_type in VIEWS or node.op_type == "Neg":
            frontier.add(operands[0])
        elif node.op_type == "Mul":
            heads = [one for one in operands if not is_constant(one) and projected(one)]
            if len(heads) != 1:
                return None
            frontier.add(heads[0])
            other = operands[1 - operands.index(heads[0])]
            if run.number(other) is None:
                factors[other] = None
        else:
            return None
    return None


def _grouped(factors: list[ir.Value]) -> list[list[ir.Value]]:
    """Factors by what they are views of: an unsqueezed or sliced cos is that cos."""
    groups: dict[ir.Value, list[ir.Value]] = {}
    for factor in factors:
        groups.setdefault(_root(factor), []).append(factor)
    return list(groups.values())


def _root(value: ir.Value) -> ir.Value:
    node = value.producer()
    while (
        node is not None
        and node.domain == ""
        and node.op_type in VIEWS - {"Gather", "GatherND", "Split"}
    ):
        source = node.inputs[0]
        assert source is not None
        value, node = source, source.producer()
    return value


def _idle(
    run: DryRun, cos: list[ir.Value], sin: list[ir.Value], positions: ir.Value | None
) -> dict[ir.Value, Array] | None:
    """Ones for cos and zeros for sin."""
    found: dict[ir.Value, Array] = {}
    for values, number in ((cos, 1.0), (sin, 0.0)):
        for value in values:
            shape = run.shape(value)
            if shape is None:
                return None
            found[value] = np.full(shape, number)
    if positions is not None:
        found[positions] = np.zeros(run.shape(positions) or (), np.int64)
    return found
