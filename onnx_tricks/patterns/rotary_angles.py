"""The cos and sin of a rotation: how large they are, and which positions they are of."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_constant
from onnx_tricks.graph.places import INTEGERS
from onnx_tricks.graph.shapes import dtype_of
from onnx_tricks.patterns.dry_run import DryRun, Unknown
from onnx_tricks.patterns.shape_rules import axes_of
from onnx_tricks.patterns.way_back import VIEWS, take_latest

__all__ = ["bare_angle", "looked_up_by", "positions_of", "table_behind", "tables_of", "unscaled"]

_MAX_NODES = 60


def tables_of(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The cos and sin of a RotaryEmbedding operator; None where it scales what it turns."""
    first = 1 if node.domain == "" else 2
    cos, sin = node.inputs[first : first + 2]
    scaled = node.attributes.get_float("scale", 1.0) != 1.0
    if cos is None or sin is None or scaled:
        return None
    return cos, sin


def looked_up_by(value: ir.Value, source: ir.Value) -> ir.Value | None:
    """The positions that a RotaryEmbedding operator between two values looks tables up with."""
    pending = [value]
    for _ in range(_MAX_NODES):
        if not pending:
            return None
        node = pending.pop().producer()
        if node is None:
            continue
        if node.op_type == "RotaryEmbedding":
            index = 3 if node.domain == "" else 1
            return node.inputs[index] if len(node.inputs) > index else None
        data = node.inputs[:1] if node.op_type in VIEWS else node.inputs
        pending += [one for one in data if one is not None and one is not source]
    return None


def bare_angle(value: ir.Value) -> ir.Value:
    """What a cos or sin was before it was unsqueezed."""
    while (node := value.producer()) is not None and node.op_type in ("Unsqueeze", "Identity"):
        assert node.inputs[0] is not None
        value = node.inputs[0]
    return value


def table_behind(angle: ir.Value) -> ir.Value | None:
    """The table out of which a cos or sin is cut, from a row on that is computed.

    Args:
        angle: [T, R], or what makes it one for all heads.
    """
    node = bare_angle(angle).producer()
    if node is None or node.op_type != "Slice" or evaluate(node.inputs[1]) is not None:
        return None
    step = evaluate(node.inputs[4]) if len(node.inputs) > 4 else np.ones(1)
    table, rows = node.inputs[0], axes_of(node, 3) == [0]
    known = table is not None and is_constant(table)
    return table if known and rows and step is not None and np.all(step == 1) else None


def positions_of(run: DryRun, cos: ir.Value, sin: ir.Value) -> ir.Value | None:
    """The integers, one a token, of which cos and sin are functions row by row."""
    frontier = {one for one in (cos, sin) if not is_constant(one)}
    for _ in range(4 * _MAX_NODES):
        if len(frontier) == 1:
            (value,) = frontier
            shape = run.shape(value)
            whole = dtype_of(value) in INTEGERS
            ranked = shape is not None and 1 <= len(shape) <= 2
            if whole and ranked and not _is_column(run, value):
                return value if _row_by_row(run, value, (cos, sin)) else None
        node = take_latest(run, frontier)
        if node is None:
            return None
        # What shapes it does not count among what it is a function of.
        data = node.inputs[:1] if node.op_type in VIEWS - {"Gather", "GatherND"} else node.inputs
        if node.op_type not in ("Shape", "Size"):
            frontier.update(one for one in data if one is not None and not is_constant(one))
    return None


def _is_column(run: DryRun, value: ir.Value) -> bool:
    """Whether a value shows a row of numbers as one below the other, as GatherND wants them."""
    node, shape = value.producer(), run.shape(value)
    if node is None or node.op_type not in ("Reshape", "Unsqueeze") or node.inputs[0] is None:
        return False
    return shape is not None and run.shape(node.inputs[0]) == shape[:-1]


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


def unscaled(cos: ir.Value, sin: ir.Value) -> bool:
    """Whether cos and sin are those of one angle, and nothing scales them."""
    (cos, factor), (sin, other) = (_angle_root(one) for one in (cos, sin))
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
        elif node.op_type not in VIEWS:
            break
        if source is None:
            break
        value = source
    return value, factor
