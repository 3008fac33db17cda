"""Rotary position embedding: pairs of channels turned by an angle that the position decides.

Exporters write it in a dozen ways: halves or neighbours as pairs, all channels or some, before or
after the transpose to heads, as one operator or as ten. Here the nodes between two values are run
on labelled numbers, once with cos = 1 and once with sin = 1, and the pairs are read off the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_constant
from onnx_tricks.graph.shapes import dtype_of
from onnx_tricks.patterns.arithmetic import Array, flat_heads
from onnx_tricks.patterns.dry_run import DryRun, Unknown

__all__ = ["Rotary", "find_rotary", "keeps_size"]

_MOVES = frozenset(
    "Cast Dropout Expand Flatten Gather GatherND Identity Reshape Slice Split Squeeze Tile "
    "Transpose Unsqueeze".split()
)
_OPERATOR = "RotaryEmbedding"
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


def find_rotary(
    run: DryRun, value: ir.Value, projected: Callable[[ir.Value], bool]
) -> Rotary | None:
    """Read a value as heads that have been rotated.

    Args:
        run: The dry run of the model.
        value: The value.
        projected: Whether a value comes out of a linear layer, so that it is heads and not angles.
    """
    region = _region(run, value, projected)
    if region is None:
        return None
    source, factors = region
    groups = _grouped(factors)
    if len(groups) != 2:
        return None
    explicit = _explicit_positions(value, source)
    for cos, sin in (groups, groups[::-1]):
        idle = _constants(run, cos, sin, explicit)
        turn = None if idle is None else _turn(run, value, source, idle)
        if idle is not None and turn is not None:
            axis, start, width, interleaved = turn
            positions = explicit or _positions(run, cos[0], sin[0])
            return Rotary(
                source,
                value,
                cos[0],
                sin[0],
                axis,
                start,
                width,
                interleaved,
                positions,
                None,
                idle,
            )
    return None


def keeps_size(rotary: Rotary) -> bool:
    """Whether a rotation is one of angles alone: nothing scales cos and sin."""
    if rotary.inside is not None:
        return False
    (cos, factor), (sin, other) = (_angle_root(one) for one in (rotary.cos, rotary.sin))
    table, second = evaluate(cos), evaluate(sin)
    if table is not None and second is not None:
        limit = 4 * float(ml_dtypes.finfo(table.dtype).eps)
        size = np.hypot(factor * table.astype(np.float64), other * second.astype(np.float64))
        return bool(np.allclose(size, 1, rtol=0, atol=limit))
    one, another = cos.producer(), sin.producer()
    if one is None or another is None or not factor == other == 1:
        return False
    return (one.op_type, another.op_type) == ("Cos", "Sin") and one.inputs == another.inputs


def _angle_root(value: ir.Value) -> tuple[ir.Value, float]:
    """The table or the operator that a cos or sin is picked from, and by what it is multiplied."""
    factor = 1.0
    for _ in range(_MAX_NODES):
        node = value.producer()
        if node is None or node.domain != "" or is_constant(value):
            break
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Mul":
            numbers = [evaluate(one) for one in node.inputs]
            number = next((one for one in numbers if one is not None), None)
            if number is None or number.size != 1:
                break
            factor *= float(number.reshape(()))
            source = next(v for v, n in zip(node.inputs, numbers, strict=True) if n is not number)
        elif node.op_type == "Concat":
            if len(set(node.inputs)) > 1:
                break
        elif node.op_type not in _MOVES:
            break
        if source is None:
            break
        value = source
    return value, factor


def _constants(
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


def _region(
    run: DryRun, value: ir.Value, projected: Callable[[ir.Value], bool]
) -> tuple[ir.Value, list[ir.Value]] | None:
    """The heads before the rotation, and what they are multiplied with on the way.

    Walks back along the values that are linear in the heads, the latest first, until one is left.
    """
    frontier, factors = {value}, dict[ir.Value, None]()
    for _ in range(_MAX_NODES):
        if len(frontier) == 1 and factors:
            return frontier.pop(), list(factors)
        latest = _latest(run, frontier)
        node = latest.producer() if latest is not None else None
        if latest is None or node is None:
            return None
        frontier.remove(latest)
        operands = [operand for operand in node.inputs if operand is not None]
        if node.op_type == _OPERATOR:
            found = _operator_inputs(node)
            if found is None:
                return None
            frontier.add(operands[0])
            factors.update(dict.fromkeys(found))
        elif node.domain != "":
            return None
        elif node.op_type in ("Add", "Sub", "Concat"):
            frontier.update(operands)
        elif node.op_type in _MOVES or node.op_type == "Neg":
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


def _latest(run: DryRun, values: Iterable[ir.Value]) -> ir.Value | None:
    """The value that is computed last."""

    def place(value: ir.Value) -> int:
        node = value.producer()
        return -1 if node is None else run.order[node]

    return max(values, key=place, default=None)


def _operator_inputs(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The cos and sin of a RotaryEmbedding operator."""
    first = 1 if node.domain == "" else 2
    cos, sin = node.inputs[first : first + 2]
    scaled = node.attributes.get_float("scale", 1.0) != 1.0
    if cos is None or sin is None or scaled:
        return None
    return cos, sin


def _explicit_positions(value: ir.Value, source: ir.Value) -> ir.Value | None:
    """The positions that a RotaryEmbedding operator looks tables up with."""
    pending = [value]
    for _ in range(_MAX_NODES):
        if not pending:
            return None
        node = pending.pop().producer()
        if node is None:
            continue
        if node.op_type == _OPERATOR:
            index = 3 if node.domain == "" else 1
            return node.inputs[index] if len(node.inputs) > index else None
        data = node.inputs[:1] if node.op_type in _MOVES else node.inputs
        pending += [one for one in data if one is not None and one is not source]
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
        and node.op_type in _MOVES - {"Gather", "GatherND", "Split"}
    ):
        source = node.inputs[0]
        assert source is not None
        value, node = source, source.producer()
    return value


def _turn(
    run: DryRun, value: ir.Value, source: ir.Value, idle: Mapping[ir.Value, Array]
) -> tuple[int, int, int, bool] | None:
    """Axis, first channel, number and pairing of the channels turned; None for anything else."""
    shape = run.shape(source)
    if shape is None or 0 in shape:
        return None
    labels = np.arange(1, np.prod(shape) + 1, dtype=np.float64).reshape(shape)
    whole = {one: array for one, array in idle.items() if array.dtype.kind == "i"}
    factors = {one: array for one, array in idle.items() if one not in whole}
    crossing = {one: 1 - array for one, array in factors.items()}
    neither = {one: 0 * array for one, array in factors.items()}
    try:
        kept, crossed, rest = (
            run.replay(value, {source: labels, **whole, **given})
            for given in (factors, crossing, neither)
        )
    except Unknown:
        return None
    if not np.array_equal(np.sort(kept, axis=None), labels.reshape(-1)):
        return None
    crossed = crossed - rest
    heads = _flat_heads(run, value)
    if heads is not None:
        kept, crossed = (one.reshape(*one.shape[:-1], heads, -1) for one in (kept, crossed))
    return _pairs(kept, crossed)


def _flat_heads(run: DryRun, value: ir.Value) -> int | None:
    """How many heads lie side by side in what a RotaryEmbedding operator turns, [B, S, H K]."""
    node, shape = value.producer(), run.shape(value)
    if node is None or node.op_type != _OPERATOR or shape is None or len(shape) != 3:
        return None
    tables = _operator_inputs(node)
    width = None if tables is None else run.shape(tables[0])
    return None if width is None else flat_heads(node, shape[-1], width[-1])


def _pairs(kept: Array, crossed: Array) -> tuple[int, int, int, bool] | None:
    """Which channels each channel takes its sine part from."""
    if crossed.shape != kept.shape or not np.any(crossed):
        return None
    place = np.empty(kept.size + 1, np.int64)
    place[0] = 0
    place[kept.astype(np.int64).reshape(-1)] = np.arange(kept.size)
    taken = np.unravel_index(place[np.abs(crossed).astype(np.int64)], kept.shape)
    own = np.indices(kept.shape, sparse=True)
    turned = crossed != 0
    axes = [axis for axis in range(kept.ndim) if np.any((taken[axis] != own[axis]) & turned)]
    if len(axes) != 1:
        return None
    axis = axes[0]
    lines = np.moveaxis(crossed, axis, -1).reshape(-1, kept.shape[axis])
    others = np.moveaxis(taken[axis], axis, -1).reshape(lines.shape)
    places = np.flatnonzero(lines[0])
    start, width = int(places[0]), len(places)
    same = np.all(np.sign(lines) == np.sign(lines[0])) and np.all(
        others[:, places] == others[0][places]
    )
    expected = np.arange(width)
    if not same or not np.array_equal(places, start + expected):
        return None
    for interleaved in (False, True):
        partner = expected ^ 1 if interleaved else (expected + width // 2) % width
        first = expected % 2 == 0 if interleaved else expected < width // 2
        signs = np.where(first, -1, 1)
        if np.array_equal(others[0][places], start + partner) and np.array_equal(
            np.sign(lines[0][places]), signs
        ):
            return axis - kept.ndim, start, width, interleaved
    return None


def _positions(run: DryRun, cos: ir.Value, sin: ir.Value) -> ir.Value | None:
    """The integers, one a token, that cos and sin are functions of."""
    frontier = {one for one in (cos, sin) if not is_constant(one)}
    for _ in range(4 * _MAX_NODES):
        latest = _latest(run, frontier) if frontier else None
        if len(frontier) == 1:
            (value,) = frontier
            shape = run.shape(value)
            whole = dtype_of(value) in (ir.DataType.INT64, ir.DataType.INT32)
            if whole and shape is not None and 1 <= len(shape) <= 2:
                return value if _row_by_row(run, value, (cos, sin)) else None
        node = latest.producer() if latest is not None else None
        if latest is None or node is None:
            return None
        frontier.remove(latest)
        # What shapes it does not count among what it is a function of.
        data = node.inputs[:1] if node.op_type in _MOVES - {"Gather", "GatherND"} else node.inputs
        if node.op_type not in ("Shape", "Size"):
            frontier.update(one for one in data if one is not None and not is_constant(one))
    return None


def _row_by_row(run: DryRun, positions: ir.Value, results: tuple[ir.Value, ...]) -> bool:
    """Whether shuffling the positions shuffles the rows of cos and sin alike."""
    shape = run.shape(positions)
    assert shape is not None
    straight = np.broadcast_to(np.arange(shape[-1], dtype=np.int64), shape)
    for value in results:
        try:
            before = run.replay(value, {positions: straight})
            after = run.replay(value, {positions: straight[..., ::-1]})
        except Unknown:
            return False
        if not any(
            np.allclose(np.flip(before, axis), after, rtol=1e-12, atol=0)
            for axis in range(before.ndim)
            if before.shape[axis] == shape[-1]
        ):
            return False
    return True
