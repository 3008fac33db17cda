"""Norms that take off the mean of what they read, and would not miss it."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from onnx_tricks.patterns.interior import interior, leak
from onnx_tricks.patterns.norm import FUSED_NORMS, Norm, OpaqueNorm, norm_entries
from onnx_tricks.patterns.product import skip_casts
from onnx_tricks.patterns.statistic import centred
from onnx_tricks.patterns.stream import Use

__all__ = ["MeanReader", "read_mean"]


@dataclasses.dataclass(frozen=True)
class MeanReader:
    """A norm that takes off the mean of what it reads.

    Attributes:
        norm: A LayerNorm, or the RMSNorm of a value whose mean has just been taken off.
        uses: By which it reads the residual stream.
        difference: That value, where it is all that can go: something else reads it, or more of
            the norm, as another norm of the same input may.
    """

    norm: Norm
    uses: tuple[Use, ...]
    difference: ir.Value | None = None

    @property
    def source(self) -> ir.Value:
        """What is read, now."""
        node, index = self.uses[0]
        value = node.inputs[index]
        assert value is not None
        return value


def read_mean(norm: Norm | OpaqueNorm) -> MeanReader | str | None:
    """How a norm that takes a mean off reads its input.

    Args:
        norm: Any norm.

    Returns:
        The reader; why what it reads must keep its mean; or None where the norm takes none off.
    """
    if isinstance(norm, OpaqueNorm):
        layout = FUSED_NORMS.get((norm.node.domain, norm.node.op_type))
        return norm.reason if layout is not None and layout.kind == "layer" else None
    if norm.kind == "rms":
        return _read_difference(norm, norm.source)
    if norm.kind != "layer":
        return None
    if norm.axis != -1:
        return "it normalises another axis than the last"
    if norm.fused is None:
        inner = leak(interior(norm.output, norm.source), norm.output)
        if inner is None:
            return MeanReader(norm, norm_entries(norm))
        if inner is not norm.source and skip_casts(inner) is norm.source:
            # The stream goes on from behind the cast.
            return read_mean(dataclasses.replace(norm, source=inner))
        found = [_read_difference(norm, one.value) for one in norm.core]
        reader = next((one for one in found if one is not None), None)
        return reader or f"{inner.name!r} inside it is read too"
    read = [one for one in norm.node.outputs[1:3] if one.uses() or one.is_graph_output()]
    if read:
        return f"{read[0].name!r}, a statistic of its input, is read too"
    return MeanReader(norm, norm_entries(norm))


def _read_difference(norm: Norm, value: ir.Value) -> MeanReader | None:
    """A norm by the value that it takes the mean off, if this is one."""
    source, difference = centred(value, norm.axis), skip_casts(value)
    if source is None or difference.is_graph_output():
        return None
    inside = interior(difference, source)
    if leak(inside, difference) is not None:
        return None
    uses = tuple((node, index) for node, index in source.uses() if node in inside)
    return MeanReader(norm, uses, difference)
