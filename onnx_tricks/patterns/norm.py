"""What passes see of a norm, whichever way an exporter wrote it.

A norm here is `gain * n(x) + bias`, with `n(x)` an RMSNorm, a LayerNorm, a tanh (DyT) or any other
value divided by a statistic of its own row. One operator or ten nodes, both give the same view.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate, is_default
from onnx_tricks.patterns.interior import interior
from onnx_tricks.patterns.product import Factor

__all__ = [
    "FUSED_NORMS",
    "FusedNorm",
    "Kind",
    "Norm",
    "OpaqueNorm",
    "as_vector",
    "norm_entries",
    "unknown_reason",
    "with_bias",
]

Kind = Literal["rms", "layer", "tanh", "other"]
_Array = np.ndarray[Any, np.dtype[Any]]
_Vector = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class FusedNorm:
    """Which norm an operator computes, and which of its inputs are gain and bias.

    Attributes:
        kind: The norm.
        gain: The input that is its gain.
        bias: The input that is its bias, or None where it takes none.
        maps: Whether channels lie on axis 1, as in images, and the bias has to be there.
    """

    kind: Kind
    gain: int
    bias: int | None = None
    maps: bool = False


_MICROSOFT = "com.microsoft"
FUSED_NORMS: dict[tuple[str, str], FusedNorm] = {
    ("", "LayerNormalization"): FusedNorm("layer", 1, 2),
    ("", "RMSNormalization"): FusedNorm("rms", 1),
    ("", "SimplifiedLayerNormalization"): FusedNorm("rms", 1),
    ("", "GroupNormalization"): FusedNorm("other", 1, 2, maps=True),
    ("", "InstanceNormalization"): FusedNorm("other", 1, 2, maps=True),
    (_MICROSOFT, "LayerNormalization"): FusedNorm("layer", 1, 2),
    (_MICROSOFT, "SimplifiedLayerNormalization"): FusedNorm("rms", 1),
    (_MICROSOFT, "SkipLayerNormalization"): FusedNorm("layer", 2, 3),
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): FusedNorm("rms", 2),
}


@dataclasses.dataclass(frozen=True)
class Norm:
    """One norm: `output = gain * n(source) + bias`.

    Attributes:
        kind: What `n` is. "other" is any value times statistics of its own rows.
        node: The node that makes `output`; the one a refusal names.
        output: The norm with gain and bias applied.
        dtype: Element type of `output`.
        source: What enters the norm, before casts to its compute type.
        axis: The channel axis, counted from the end.
        gain: [D] float64.
        bias: [D] float64, or None where the norm has none.
        epsilon: What is added to the mean square (rms and layer).
        fused: The operator's layout when the norm is one node, else None.
        core: The factors whose product is `n(source)`, for a decomposed norm.
        entries: The uses by which the norm reads its source: nodes, and which of their inputs.
    """

    kind: Kind
    node: ir.Node
    output: ir.Value
    dtype: ir.DataType
    source: ir.Value
    axis: int
    gain: _Vector
    bias: _Vector | None
    epsilon: float = 0.0
    fused: FusedNorm | None = None
    core: tuple[Factor, ...] = ()
    entries: tuple[tuple[ir.Node, int], ...] = ()

    @property
    def read(self) -> ir.Value:
        """What enters the norm now: a rewrite before it may have put a node behind `source`."""
        node, index = self.entries[0]
        value = node.inputs[index]
        assert value is not None
        return value

    @property
    def width(self) -> int:
        """D, the number of channels."""
        return int(self.gain.size)

    @property
    def plain(self) -> bool:
        """Whether gain and bias change nothing: all ones, all zeros."""
        return bool(np.all(self.gain == 1)) and not self.biased

    @property
    def biased(self) -> bool:
        """Whether the bias is there and not all zeros."""
        return self.bias is not None and bool(np.any(self.bias))


@dataclasses.dataclass(frozen=True)
class OpaqueNorm:
    """A norm whose gain or bias is not a known vector."""

    node: ir.Node
    reason: str


def norm_entries(norm: Norm) -> tuple[tuple[ir.Node, int], ...]:
    """The uses by which a norm reads its source: nodes, and which of their inputs it is."""
    if norm.node.op_type == "SkipLayerNormalization":
        return (norm.node, 0), (norm.node, 1)
    if norm.fused is not None:
        return ((norm.node, 0),)
    inside = interior(norm.output, norm.source)
    return tuple((node, index) for node, index in norm.source.uses() if node in inside)


def with_bias(output: ir.Value, width: int, axis: int) -> tuple[ir.Value, _Vector | None]:
    """Step over the Add of a constant vector, if that alone reads the scaled value.

    Args:
        output: The scaled value.
        width: D, the number of its channels.
        axis: Where they lie, counted from the end.

    Returns:
        The sum and the vector [D] in float64; or `output` itself and None.
    """
    readers = output.consumers()
    if len(readers) != 1 or output.is_graph_output() or readers[0].domain != "":
        return output, None
    reader = readers[0]
    if reader.op_type == "Cast":
        following, bias = with_bias(reader.outputs[0], width, axis)
        return (output, None) if bias is None else (following, bias)
    other = [operand for operand in reader.inputs if operand is not output]
    array = evaluate(other[0]) if reader.op_type == "Add" and len(other) == 1 else None
    if array is None or array.ndim < -axis or array.size != width or array.shape[axis] != width:
        return output, None
    return reader.outputs[0], as_vector(array, width)


def as_vector(array: _Array, width: int) -> _Vector:
    """Numbers of a gain or a bias, or one number for all, as [width] in float64."""
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (width,))


def unknown_reason(word: str, value: ir.Value | None) -> str:
    """Why a gain or bias cannot be read."""
    reason = f"its {word} is not a constant of the model"
    if is_default(value):
        reason += " but an input with a default, which callers may override: export the model with "
        reason += "keep_initializers_as_inputs=False"
    return reason
