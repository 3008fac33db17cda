"""Which layers can go where linear layers meet, and how well that is conditioned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.patterns.attention import Attention
from onnx_tricks.patterns.interior import leads_only_to
from onnx_tricks.patterns.junction import Junction
from onnx_tricks.patterns.linear import Linear
from onnx_tricks.patterns.maker import Made
from onnx_tricks.patterns.projection import Projection, bias_of, matrix_of
from onnx_tricks.rounding import storage_error
from onnx_tricks.skipless.basis import Basis

__all__ = ["Choice", "Layer", "find_choices", "judge", "layout_of"]

_Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A layer beside a junction: a linear layer, or one projection out of a packed one.

    Attributes:
        linear: The linear layer.
        part: The projection, where others are packed beside it.
    """

    linear: Linear
    part: Projection | None = None

    @property
    def output(self) -> ir.Value:
        """What it computes, bias included."""
        return self.linear.output if self.part is None else self.part.output

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of channels that it reads and that it computes."""
        if self.part is not None:
            return self.part.width, self.part.columns.size
        inner, outer = matrix_of(self.linear).shape
        return inner, outer

    @property
    def name(self) -> str:
        """The operator and name of its node."""
        node = self.linear.node
        return f"{node.op_type} {node.name or node.outputs[0].name!r}"

    def matrix(self) -> _Array:
        """[in, out] float64."""
        if self.part is not None:
            return self.part.matrix()
        return matrix_of(self.linear).astype(np.float64)

    def bias(self) -> _Array | None:
        """[out] float64; None where there is none."""
        return bias_of(self.linear) if self.part is None else self.part.bias()


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """A layer that can go, and what becomes of the others then.

    Attributes:
        junction: The rows between linear layers.
        removed: The layer that goes.
        writes: Whether it is one that writes the rows, and not one that reads them.
        others: The layers that read the rows and stay.
        place: What takes up the bias of a removed reader; None where it has none, or where its
            bias stays where it is.
        growth: The predicted error of what the others compute, as a multiple of what it was; 0
            where nothing is multiplied with an inverse.
        error: The same error, relative to what they compute.
    """

    junction: Junction
    removed: Layer
    writes: bool
    others: tuple[Layer, ...]
    place: Made | None = None
    growth: float = 0.0
    error: float = 0.0

    @property
    def kept(self) -> list[Made]:
        """The constants that write the rows and stay."""
        if not self.writes:
            return list(self.junction.written)
        own = self.removed.linear.node, self.removed.linear.bias_add
        return [one for one in self.junction.written if one.node not in own]

    @property
    def inverts(self) -> bool:
        """Whether anything is multiplied with an inverse."""
        return bool(self.kept if self.writes else self.others)

    @property
    def saved(self) -> int:
        """How many numbers need not be stored any more."""
        inner, outer = self.removed.shape
        saved = inner * outer
        bias = self.removed.bias()
        if bias is not None and (self.writes or self.place is not None):
            saved += bias.size
        if self.writes:
            columns = [(one.shape[1], one.bias() is None) for one in self.others]
            saved -= sum((inner - outer) * count for count, _ in columns)
            saved -= sum(count for count, bare in columns if bare and bias is not None)
        return saved

    @property
    def basis(self) -> Basis:
        """The basis in which the layer that goes is the identity."""
        return Basis(self.removed.matrix(), inverse=self.writes)

    @property
    def shift(self) -> _Array:
        """What the rows have added to them in the new basis: [D], or zero."""
        bias = self.removed.bias() if self.place is not None else None
        return np.zeros(()) if bias is None else bias


def find_choices(junction: Junction, attentions: Sequence[Attention]) -> Iterator[Choice]:
    """Yield what can go at a junction and save anything.

    Args:
        junction: The rows between linear layers.
        attentions: The attention blocks that may read them.
    """
    layers = [part for one in junction.readers for part in _parts(one, attentions)]
    for writer in junction.writers:
        choice = Choice(
            junction, Layer(writer), writes=True, others=tuple(map(Layer, junction.readers))
        )
        inner, outer = choice.removed.shape
        alone = not choice.kept and _is_direct(junction, writer)
        if (inner == outer or alone) and choice.saved > 0:
            yield choice
    for layer in layers:
        inner, outer = layer.shape
        if inner != outer or layer.output.is_graph_output():
            continue
        # Only a packed layer that loses a projection is taken apart.
        rest = [one for one in layers if one.linear is layer.linear and one is not layer]
        whole = [Layer(one) for one in junction.readers if one.node is not layer.linear.node]
        choice = Choice(junction, layer, writes=False, others=(*whole, *rest))
        yield choice
        place = _place(choice) if layer.bias() is not None else None
        if place is not None:
            yield dataclasses.replace(choice, place=place)


def judge(choice: Choice, rows: _Array | None, dtype: ir.DataType) -> Choice:
    """Predict what rounding does once a layer has gone.

    Args:
        choice: The layer that goes.
        rows: [N, D] of what the rows are; None to take them as white.
        dtype: The type of the rows.
    """
    if not choice.inverts:
        return choice
    width = choice.junction.width
    rows = np.eye(width) * np.sqrt(width) if rows is None else rows
    weights = [one.matrix() for one in choice.others]
    with np.errstate(all="ignore"):
        growth, error = choice.basis.felt(rows, weights, choice.shift)
    # A singular matrix gives numbers that are none.
    growth = growth if math.isfinite(growth) else math.inf
    return dataclasses.replace(choice, growth=growth, error=error * storage_error(dtype.numpy()))


def _is_direct(junction: Junction, writer: Linear) -> bool:
    """Whether nothing but readers would notice another number of channels."""
    return junction.stages <= {writer.node.outputs[0], writer.output} and not any(
        user.op_type in ("Shape", "Size") for one in junction.stages for user in one.consumers()
    )


def _parts(linear: Linear, attentions: Sequence[Attention]) -> list[Layer]:
    """The projections that are packed in a layer, or the layer itself."""
    for attention in attentions:
        found = [attention.query, attention.keys, attention.values]
        parts = [one.projection for one in found if one.projection is not None]
        packed = [one for one in parts if one.linear and one.linear.node is linear.node]
        columns = [column for one in packed for column in one.columns.reshape(-1)]
        whole = sorted(columns) == list(range(matrix_of(linear).shape[1]))
        if len(packed) > 1 and whole and _can_unpack(linear, packed):
            return [Layer(linear, one) for one in packed]
    return [Layer(linear)]


def _can_unpack(linear: Linear, packed: Sequence[Projection]) -> bool:
    arranged = all(layout_of(one) is not None for one in packed)
    outputs = {one.output for one in packed}
    return arranged and len(outputs) == len(packed) and leads_only_to(linear.output, outputs)


def layout_of(part: Projection) -> str | None:
    """How rows lie before they are transposed to a projection's output, if that is all there is."""
    letters = sorted(one for one in part.axes if one)
    if letters == ["b", "hk", "s"]:
        return "bsh"  # one axis for heads and channels
    known = {"bhks": "bshk", **({"bks": "bsk"} if part.heads == 1 else {})}
    return known.get("".join(letters))


def _place(choice: Choice) -> Made | None:
    """What can take up a bias of the rows, if the layers that read them have biases too."""
    if not choice.junction.even or any(one.bias() is None for one in choice.others):
        return None
    biases = [one for one in choice.kept if one.node.op_type == "Add" or one.index == 2]
    tables = [one for one in choice.kept if one.node.op_type == "Gather" and one.index == 0]
    return next(iter((*biases, *tables)), None)
