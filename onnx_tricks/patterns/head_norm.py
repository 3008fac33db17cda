"""Norms of queries and keys: over each head or over all of them, their gains shared or not.

Beyond the norms that other recognisers know, exporters write them without a gain, with one for
every channel of every head, and as one operator for each head between a Split and a Concat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.names import described
from onnx_tricks.patterns.arithmetic import Array
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.patterns.norm import FUSED_NORMS, Norm
from onnx_tricks.patterns.norms import find_norms
from onnx_tricks.patterns.product import factors, skip_casts
from onnx_tricks.patterns.statistic import (
    centred,
    is_row_statistic,
    mean_square,
    measured_values,
)

__all__ = ["HeadNorm", "HeadNorms", "NormPart", "whole_norm"]

_Matrix = np.ndarray[Any, np.dtype[np.float64]]
_Indices = np.ndarray[Any, np.dtype[np.int64]]
_SPLITS = frozenset("Gather Identity Reshape Slice Split Squeeze Unsqueeze".split())
_MAX_NODES = 10


@dataclasses.dataclass(frozen=True, eq=False)
class HeadNorm:
    """The norm of heads: `n(heads) * gain + shift`, `n` an RMSNorm or a LayerNorm.

    Attributes:
        whole: Whether all heads of a token are normalised together, not each by itself.
        centered: Whether the mean is taken off.
        epsilon: What is added to the mean square.
        gain: [G, K].
        shift: [G, K].
        turned: Whether heads come rotated to it. The rotation keeps their size, and there is no
            more to it than a gain: so all but the gain may as well come before.
    """

    whole: bool
    centered: bool
    epsilon: float
    gain: _Matrix
    shift: _Matrix
    turned: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class NormPart:
    """A norm over the last axis of some heads.

    Attributes:
        output: The value with gain and shift applied.
        source: What enters the norm.
        gain: Broadcasts to the shape of `source`.
        shift: Likewise.
        epsilon: What is added to the mean square.
        centered: Whether the mean is taken off; None where it is another kind of norm.
    """

    output: ir.Value
    source: ir.Value
    gain: Array
    shift: Array
    epsilon: float
    centered: bool | None


class HeadNorms:
    """Finds the norms of heads in one model."""

    def __init__(self, model: ir.Model) -> None:
        """Prepare a model, whose shapes and types have been inferred."""
        self._norms = {norm.output: norm for norm in find_norms(model) if isinstance(norm, Norm)}

    def read(self, value: ir.Value) -> tuple[list[NormPart], ir.Value] | str | None:
        """Read a value as heads that have just been normalised.

        Args:
            value: The value.

        Returns:
            The norms that make it, and the value that all of them read a part of; a text where
            it is a norm that heads cannot have; None where it is none.
        """
        part = self._single(value)
        if part is not None:
            return part if isinstance(part, str) else ([part], part.source)
        node = value.producer()
        if node is None or node.op_type != "Concat" or node.domain != "":
            return None
        parts = [None if one is None else self._single(one) for one in node.inputs]
        known = [one for one in parts if isinstance(one, NormPart)]
        if len(known) < len(parts):
            return None
        source = _common([one.source for one in known])
        return None if source is None else (known, source)

    def _single(self, value: ir.Value) -> NormPart | str | None:
        part = self._read(value)
        if not isinstance(part, NormPart) or part.centered is not False:
            return part
        # An RMSNorm of what has its mean taken off is a LayerNorm.
        origin = centred(part.source, -1)
        return part if origin is None else dataclasses.replace(part, source=origin, centered=True)

    def _read(self, value: ir.Value) -> NormPart | str | None:
        norm, node = self._norms.get(value), value.producer()
        if norm is not None:
            if norm.axis != -1:
                return f"{described(norm.node)} normalises another axis than the last"
            known = norm.kind in ("rms", "layer") and not norm.node.op_type.startswith("Skip")
            bias = np.zeros(()) if norm.bias is None else norm.bias
            centered = norm.kind == "layer" if known else None
            return NormPart(value, norm.source, norm.gain, bias, norm.epsilon, centered)
        if node is None:
            return None
        if (node.domain, node.op_type) in FUSED_NORMS:
            return _fused(node)
        return _product(value) if node.op_type in ("Mul", "Div") and node.domain == "" else None


def _fused(node: ir.Node) -> NormPart | None:
    """An operator whose gain is more than a vector."""
    layout, source = FUSED_NORMS[node.domain, node.op_type], node.inputs[0]
    gain = evaluate(node.inputs[layout.gain])
    plain = layout.bias is None or len(node.inputs) <= layout.bias
    last = node.attributes.get_int("axis", -1) == -1 and not node.op_type.startswith("Skip")
    if source is None or gain is None or not plain or not last:
        return None
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return NormPart(
        node.outputs[0], source, _wide(gain), np.zeros(()), epsilon, layout.kind == "layer"
    )


def _product(value: ir.Value) -> NormPart | None:
    """A value divided by the root of its mean square, times any constants."""
    found = factors(value)
    measured = set().union(*(measured_values(f.value) for f in found if f.exponent != 1))
    found = factors(value, whole=measured)
    core = [one for one in found if not one.constant]
    heads = [one for one in core if not is_row_statistic(one.value, -1)]
    statistics = [one for one in core if one not in heads]
    if len(heads) != 1 or heads[0].exponent != 1 or len(statistics) != 1:
        return None
    size = mean_square(statistics[0].value, -1)
    if size is None or statistics[0].exponent != Fraction(-1, 2):
        return None
    source = skip_casts(heads[0].value)
    centered = size.variance or size.source is not source
    if centered:
        origin = centred(source, -1)
        if origin is not (size.source if size.variance else centred(size.source, -1)):
            return None
        if origin is None:
            return None
        source = origin
    gain: Array = np.ones(())
    for one in found:
        if one.constant:
            number = evaluate(one.value)
            assert number is not None
            gain = gain * _wide(number) ** float(one.exponent)
    return NormPart(value, source, gain, np.zeros(()), size.epsilon, centered)


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _common(values: Sequence[ir.Value]) -> ir.Value | None:
    """The nearest value that all others are parts of."""
    chains = [_behind(value) for value in values]
    return next((one for one in chains[0] if all(one in chain for chain in chains)), None)


def _behind(value: ir.Value) -> list[ir.Value]:
    chain = [value]
    for _ in range(_MAX_NODES):
        node = chain[-1].producer()
        if node is None or node.domain != "" or node.op_type not in _SPLITS:
            break
        if node.inputs[0] is None:
            break
        chain.append(node.inputs[0])
    return chain


def whole_norm(
    run: DryRun,
    parts: Sequence[NormPart],
    last: ir.Value,
    places: Callable[[ir.Value], _Indices],
    shape: tuple[int, ...],
) -> HeadNorm | str:
    """Put the parts of a norm together, channel by channel; or say why it is no norm of heads.

    Args:
        run: The dry run of the model.
        parts: The parts.
        last: The value with which gain and shift end; what lies between scales and adds at most.
        places: Tells, for every number of a value, which channel of all heads it is: g K + k.
        shape: G and K.
    """
    kinds = {(one.centered, one.epsilon) for one in parts}
    centered, epsilon = next(iter(kinds))
    if len(kinds) > 1 or centered is None:
        return "are normalised in another way than by one RMSNorm or LayerNorm"
    sources = [places(one.source) for one in parts]
    scopes = {_scope(one, *shape) for one in sources}
    if len(scopes) > 1 or None in scopes or (scopes == {True} and len(parts) > 1):
        return "are normalised over other channels than those of one head or of all"
    where, rows = places(last), []
    for number in (0.0, 1.0):
        arrays = {
            one.output: np.broadcast_to(number * one.gain + one.shift, at.shape)
            for one, at in zip(parts, sources, strict=True)
        }
        rows.append(_by_channel(run.replay(last, arrays), where, shape))
    shift, total = rows
    if shift is None or total is None:
        return "are scaled after their norm in a way that depends on more than the channel"
    return HeadNorm(scopes == {True}, centered, epsilon, total - shift, shift)


def _by_channel(array: Array, places: _Indices, shape: tuple[int, ...]) -> _Matrix | None:
    """What every channel gets, of this shape; None where that is not one number."""
    found = np.full(shape, np.nan)
    found.reshape(-1)[places] = array
    return None if np.any(found.reshape(-1)[places] != array) else found


def _scope(places: _Indices, heads: int, width: int) -> bool | None:
    """Whether each row of places holds all heads, or exactly one; None for anything else."""
    rows = np.sort(places.reshape(-1, places.shape[-1]), axis=1)
    if rows.shape[1] == heads * width and np.all(rows == np.arange(heads * width)):
        return heads > 1
    if rows.shape[1] != width or np.any(rows % width != np.arange(width)):
        return None
    return False if np.all(rows // width == rows[:, :1] // width) else None
