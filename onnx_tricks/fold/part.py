"""One norm with the linear layers that can take its gain and bias, or why they cannot."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.names import node_name
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.norm import Norm
from onnx_tricks.patterns.readers import Reader, find_readers
from onnx_tricks.weights import folded_size, rounding_loss, scale_axis

__all__ = ["Array", "Part", "Scaling", "find_part"]

Array = np.ndarray[Any, np.dtype[Any]]
_SAFE_GAIN = 2.0**60  # no trained float32 or float64 weight leaves its range within such factors


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What a fold does to a stored weight: one factor per input channel."""

    axis: int
    groups: int
    factors: bytes

    @property
    def gain(self) -> Array:
        """[D] float64."""
        return np.frombuffer(self.factors)

    def __call__(self, weight: Array, rows: slice) -> Array:
        """Rows of the folded weight, rounded once to its own type."""
        return scale_axis(weight, self.gain, self.axis, self.groups, rows)


@dataclasses.dataclass(frozen=True)
class Part:
    """One norm and its linear layers.

    Attributes:
        norm: The norm.
        readers: The linear layers behind it.
        biases: The new bias of each of them; empty where the norm has no bias to fold.
        kept: What stays of the norm's bias, divided by the gain; None where nothing does.
    """

    norm: Norm
    readers: tuple[Reader, ...]
    biases: tuple[Array, ...] = ()
    kept: Array | None = None

    def scaling(self, reader: Reader) -> Scaling:
        """What the weight of one reader is multiplied with."""
        channels, linear = reader.channels, reader.linear
        gain = np.ascontiguousarray(self.norm.gain[channels.order])
        return Scaling(linear.weight.axis, linear.groups, gain.tobytes())


def find_part(norm: Norm, extents: Extents) -> Part | str | None:
    """The linear layers behind a norm; or why it cannot be folded; None when nothing is left to."""
    readers = find_readers(norm.output, norm.axis, norm.width, extents)
    if readers.obstacles:
        return f"{readers.obstacles[0]}, so its gain cannot move into weights alone"
    if not readers.linear:
        return "no linear layer reads it"
    part = Part(norm, readers.linear)
    for reader in readers.linear:
        reason = _weight_reason(part, reader)
        if reason:
            return reason
    if not norm.biased:
        return part
    biases = [_folded_bias(norm, reader) for reader in readers.linear]
    refusals = [bias for bias in biases if isinstance(bias, str)]
    arrays = [bias for bias in biases if not isinstance(bias, str)]
    if not refusals and not _outgrows(part, arrays) and not _dominates(part, arrays):
        return dataclasses.replace(part, biases=tuple(arrays))
    if np.all(norm.gain == 1):
        return None
    kept = _kept_bias(norm)
    if kept is None:
        return f"{(refusals or ['its bias'])[0]}, and it cannot stay behind a gain with zeros"
    return dataclasses.replace(part, kept=kept)


def _outgrows(part: Part, biases: list[Array]) -> bool:
    """Whether biases that are not there yet would hold more numbers than gain and bias do."""
    new = [b.size for r, b in zip(part.readers, biases, strict=True) if r.linear.bias is None]
    return sum(new) > 2 * part.norm.width


def _dominates(part: Part, biases: list[Array]) -> bool:
    """Whether a bias would be larger than what it is added to, and its rounding felt most.

    Trained norms have such biases where they take off what all rows have in common: moved behind
    the weights, two large numbers would cancel there that have been rounded on their own. In half
    precision any bias stays: one more rounding there is as large as the model's own error.
    """
    for reader, bias in zip(part.readers, biases, strict=True):
        scaling, tensor = part.scaling(reader), reader.linear.weight.tensor
        if reader.linear.weight.half:
            return True
        size = folded_size(tensor.numpy(), scaling.gain, scaling.axis, scaling.groups)
        if np.linalg.norm(bias.astype(np.float64)) > size:
            return True
    return False


def _kept_bias(norm: Norm) -> Array | None:
    """The bias in front of a gain that has moved on, `beta / g`; None where there is none."""
    assert norm.bias is not None
    with np.errstate(all="ignore"):
        kept: Array = (norm.bias / norm.gain).astype(norm.dtype.numpy())
    return kept if np.all(np.isfinite(kept.astype(np.float64))) else None


def _weight_reason(part: Part, reader: Reader) -> str:
    """Why a weight cannot take the gain; empty when it can."""
    linear, scaling = reader.linear, part.scaling(reader)
    tensor = linear.weight.tensor
    where = f"weight {linear.weight.stored.name!r} of {node_name(linear.node)}"
    length = tensor.shape.numpy()[scaling.axis]
    if not tensor.dtype.is_floating_point() or length * scaling.groups != scaling.gain.size:
        return f"{where} has shape {tuple(tensor.shape)} and type {tensor.dtype.name}, not a weight"
    if linear.weight.widened:
        return (
            f"{where} is stored in {tensor.dtype.name} and computed in a wider type: folding rounds"
        )
    sizes = np.abs(scaling.gain[scaling.gain != 0])
    wild = sizes.size and (sizes.max() > _SAFE_GAIN or sizes.min() < 1 / _SAFE_GAIN)
    if linear.weight.half or wild:
        loss = rounding_loss(tensor.numpy(), scaling.gain, scaling.axis, scaling.groups)
        if loss > 1:
            return f"{where} leaves the range of {tensor.dtype.name} when its gain is folded in"
    return ""


def _folded_bias(norm: Norm, reader: Reader) -> Array | str:
    """The bias of a linear layer with the norm's bias folded in, or why it cannot be."""
    linear, channels = reader.linear, reader.channels
    where = node_name(linear.node)
    if channels.uneven:
        return f"{channels.uneven} before {where}, so that its bias is not the same in every row"
    if linear.contribution is None or not linear.weight.readable:
        return f"{where} has no place for the bias that its own bias would become"
    assert norm.bias is not None
    row = norm.bias[channels.order] * channels.scale
    matrix = linear.weight.read()
    total = linear.contribution(matrix, row)
    dtype = matrix.dtype
    if linear.bias is not None:
        present = evaluate(linear.bias)
        assert present is not None
        total, dtype = present.astype(np.float64) + total, present.dtype
    with np.errstate(over="ignore"):
        rounded = total.astype(dtype)
    if not np.all(np.isfinite(rounded.astype(np.float64))):
        return f"the bias of {where} would leave the range of {dtype}"
    return rounded
