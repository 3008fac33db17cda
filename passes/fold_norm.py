"""fold-norm: norm gains and biases folded into the linear layers that read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, Self

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.edit import (
    ChangedTensor,
    add_constant,
    insert_after,
    replace_input,
    rewrite_constant,
    shared_vector,
)
from onnx_tricks.graph.names import node_name
from onnx_tricks.graph.spell import write_norm, write_product
from onnx_tricks.patterns.extents import Extents
from onnx_tricks.patterns.norm import Norm, OpaqueNorm, find_norms
from onnx_tricks.patterns.readers import Reader, find_readers
from onnx_tricks.patterns.sharing import Claim, Conflict, find_conflicts, share_groups
from onnx_tricks.patterns.weight import Weight
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.weights import folded_size, rounding_loss, scale_axis

__all__ = ["FoldNorm"]

SharedWeights = Literal["auto", "rescale", "copy", "skip"]
_Array = np.ndarray[Any, np.dtype[Any]]
_SAFE_GAIN = 2.0**60  # no trained float32 or float64 weight leaves its range within such factors


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What a fold does to a stored weight: one factor per input channel."""

    axis: int
    groups: int
    factors: bytes

    @property
    def gain(self) -> _Array:
        """[D] float64."""
        return np.frombuffer(self.factors)

    def __call__(self, weight: _Array, rows: slice) -> _Array:
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
    biases: tuple[_Array, ...] = ()
    kept: _Array | None = None

    def scaling(self, reader: Reader) -> Scaling:
        """What the weight of one reader is multiplied with."""
        channels, linear = reader.channels, reader.linear
        gain = np.ascontiguousarray(self.norm.gain[channels.order])
        return Scaling(linear.weight.axis, linear.groups, gain.tobytes())


@dataclasses.dataclass(frozen=True)
class Fold(Site):
    """Norms that have to be folded together, because they share weights.

    Attributes:
        parts: The norms.
        conflicts: Weights that something else reads too, and so are not simply rewritten.
    """

    parts: tuple[Part, ...] = ()
    conflicts: tuple[Conflict, ...] = ()


@dataclasses.dataclass(frozen=True)
class FoldNorm(Pass):
    """Fold a norm's gain and bias into the linear layers that read it.

    ``MatMul(g * n(x) + beta, W) + b  ==>  MatMul(n(x), diag(g) @ W) + (b + beta @ W)``

    Shapes: g, beta [D], W [D, F], b [F].
    Exact: in real arithmetic; folded in float64, rounded once to the dtype of W.
    Applies when: g, beta and W are constant and every reader of the norm is linear, whatever mixes
    or scales rows on the way, as long as it takes each channel for itself.
    Saves: D (or 2 D) parameters and one or two element-wise operators per norm.
    The bias stays in the norm, as beta / g, where a linear layer cannot take it (rows that are
    padded or masked in between), where new biases would outgrow what goes (a head without bias),
    or where its rounding would be felt: in half precision, or larger than what it is added to.
    Source: arXiv:2407.09577, Proposition 1 and section 3.5.

    Attributes:
        shared_weights: What to do when something else reads a weight too, as the embedding does in
            a model with a tied head. "rescale" folds the table and divides the gain out of what is
            looked up in it, so that nothing is copied; "copy" gives the linear layer a folded copy
            of its own, which the file grows by; "skip" leaves the norm alone. "auto" rescales
            tables in float32 and float64 and skips those in half precision, where what is looked
            up would be rounded twice.
        wide_only: Whether norms in front of weights in half precision stay as they are: rounding
            those once more is felt, and may fail the proof together with what else is rounded.
    """

    name: ClassVar[str] = "fold-norm"
    summary: ClassVar[str] = "Fold norm gains and biases into the linear layers that read them."

    shared_weights: SharedWeights = "auto"
    wide_only: bool = False

    def stricter(self) -> Self | None:
        """The pass without half precision, where that has not been left out before."""
        return None if self.wide_only else dataclasses.replace(self, wide_only=True)

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield the norms that can be folded, and why the others cannot."""
        extents = Extents()
        parts: dict[int, Part] = {}
        for index, norm in enumerate(find_norms(model)):
            if isinstance(norm, OpaqueNorm):
                yield Skip(node_name(norm.node), norm.reason)
            elif not norm.plain:
                part = _look_behind(norm, extents)
                if part is None:
                    continue
                if isinstance(part, str):
                    yield Skip(node_name(norm.node), part)
                elif self.wide_only and any(one.linear.weight.half for one in part.readers):
                    reason = "in half precision its weights, rounded once more, failed the proof"
                    yield Skip(node_name(norm.node), reason)
                else:
                    parts[index] = part
        while True:
            conflicts = find_conflicts(_claims(parts))
            refused = {c.claim.owner: c for c in conflicts if not self._resolves(c)}
            if not refused:
                break
            for owner, conflict in sorted(refused.items()):
                yield Skip(node_name(parts.pop(owner).norm.node), _sharing_reason(conflict))
        yield from _together(parts, conflicts)

    def apply(self, model: ir.Model, site: Site) -> None:
        """Fold the norms of one site."""
        assert isinstance(site, Fold)
        special = {(c.claim.node, c.claim.index) for c in site.conflicts}
        in_place: dict[ir.Value, Scaling] = {}
        for part in site.parts:
            for reader in part.readers:
                linear = reader.linear
                if (
                    self._policy(linear.weight) == "copy"
                    and (linear.node, linear.weight_index) in special
                ):
                    _copy_weight(model, reader, part.scaling(reader))
                else:
                    in_place[linear.weight.stored] = part.scaling(reader)
        for value, scaling in in_place.items():
            rewrite_constant(value, scaling)
        rescaled = [c for c in site.conflicts if self._policy(c.claim.weight) == "rescale"]
        _divide_lookups(model, rescaled)
        for part in site.parts:
            for reader, bias in zip(part.readers, part.biases, strict=False):
                _set_bias(model, reader, bias)
            _make_plain(model, part.norm, part.kept)

    def _resolves(self, conflict: Conflict) -> bool:
        policy = self._policy(conflict.claim.weight)
        return policy == "copy" or (policy == "rescale" and _lookups(conflict) is not None)

    def _policy(self, weight: Weight) -> SharedWeights:
        if self.shared_weights != "auto":
            return self.shared_weights
        return "skip" if weight.half else "rescale"


def _look_behind(norm: Norm, extents: Extents) -> Part | str | None:
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


def _outgrows(part: Part, biases: list[_Array]) -> bool:
    """Whether biases that are not there yet would hold more numbers than gain and bias do."""
    new = [b.size for r, b in zip(part.readers, biases, strict=True) if r.linear.bias is None]
    return sum(new) > 2 * part.norm.width


def _dominates(part: Part, biases: list[_Array]) -> bool:
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


def _kept_bias(norm: Norm) -> _Array | None:
    """The bias in front of a gain that has moved on, `beta / g`; None where there is none."""
    assert norm.bias is not None
    with np.errstate(all="ignore"):
        kept: _Array = (norm.bias / norm.gain).astype(norm.dtype.numpy())
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


def _folded_bias(norm: Norm, reader: Reader) -> _Array | str:
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


def _claims(parts: dict[int, Part]) -> Iterator[Claim]:
    for owner, part in parts.items():
        for reader in part.readers:
            linear = reader.linear
            yield Claim(
                owner, linear.weight, linear.node, linear.weight_index, part.scaling(reader)
            )


def _together(parts: dict[int, Part], conflicts: list[Conflict]) -> Iterator[Fold]:
    """Group norms that share weights; one site a group, in the order of their first norms."""
    weights = {i: [r.linear.weight.stored for r in part.readers] for i, part in parts.items()}
    for members in share_groups(weights):
        chosen = tuple(parts[index] for index in members)
        yield Fold(
            node_name(chosen[0].norm.node),
            count=len(chosen),
            inputs=tuple(_names(v for part in chosen for v in _sources(part.norm))),
            outputs=tuple(_names(r.linear.output for part in chosen for r in part.readers)),
            parts=chosen,
            conflicts=tuple(c for c in conflicts if c.claim.owner in members),
        )


def _sources(norm: Norm) -> list[ir.Value]:
    if norm.fused is None:
        return [norm.source]
    constants = (norm.fused.gain, norm.fused.bias)
    return [v for i, v in enumerate(norm.node.inputs) if v is not None and i not in constants]


def _names(values: Iterator[ir.Value]) -> list[str]:
    return list(dict.fromkeys(value.name or "" for value in values))


def _lookups(conflict: Conflict) -> list[ir.Node] | None:
    """The Gathers that look up rows of a weight, if nothing else reads it besides."""
    scaling, weight = conflict.claim.change, conflict.claim.weight
    assert isinstance(scaling, Scaling)
    if weight.rank != 2 or scaling.groups != 1 or np.any(scaling.gain == 0):
        return None
    found: list[ir.Node] = []
    pending = [(node, scaling.axis) for node in conflict.others]
    while pending:
        node, axis = pending.pop()
        if (
            node.op_type == "Transpose"
            and node.domain == ""
            and not node.outputs[0].is_graph_output()
        ):
            pending += [(reader, 1 - axis) for reader in node.outputs[0].consumers()]
        elif node.op_type == "Gather" and axis == 1 and node.attributes.get_int("axis", 0) == 0:
            found.append(node)
        else:
            return None
    return None if weight.stored.is_graph_output() else list(dict.fromkeys(found))


def _sharing_reason(conflict: Conflict) -> str:
    weight = conflict.claim.weight
    others = ", ".join(sorted({node_name(node) for node in conflict.others})) or "the caller"
    return (
        f"weight {weight.stored.name!r} is also read by {others}: a copy of its own would take "
        f"{weight.tensor.nbytes:,} bytes (--shared-weights copy)"
    )


def _copy_weight(model: ir.Model, reader: Reader, scaling: Scaling) -> None:
    linear = reader.linear
    weight = linear.weight
    copy = ChangedTensor(weight.tensor, scaling, None)
    value = add_constant(model, f"{weight.stored.name}.folded", copy)
    for node in weight.path:
        repeated = ir.Node(
            node.domain,
            node.op_type,
            [value, *node.inputs[1:]],
            node.attributes.values(),
            num_outputs=1,
            name=f"{value.name}/{node.op_type}",
        )
        assert linear.node.graph is not None
        linear.node.graph.insert_before(linear.node, repeated)
        value = repeated.outputs[0]
        value.name = repeated.name
    linear.node.replace_input_with(linear.weight_index, value)


def _divide_lookups(model: ir.Model, conflicts: Iterable[Conflict]) -> None:
    """Take the gain out again of what is looked up in folded tables, once a table."""
    for conflict in {one.claim.weight.stored: one for one in conflicts}.values():
        scaling, weight = conflict.claim.change, conflict.claim.weight
        assert isinstance(scaling, Scaling)
        dtype = weight.tensor.dtype
        inverse = ir.Tensor((1 / scaling.gain).astype(dtype.numpy()), dtype=dtype)
        factor = add_constant(model, f"{weight.stored.name}.unscale", inverse)
        for node in _lookups(conflict) or ():
            insert_after(model, node.outputs[0], "Mul", factor)


def _set_bias(model: ir.Model, reader: Reader, bias: _Array) -> None:
    linear = reader.linear
    name = f"{linear.weight.stored.name}.bias"
    if linear.bias_index is not None:
        replace_input(model, linear.node, linear.bias_index, bias, name)
    elif linear.bias_add is not None:
        index = list(linear.bias_add.inputs).index(linear.bias)
        replace_input(model, linear.bias_add, index, bias, name)
    else:
        insert_after(model, linear.output, "Add", add_constant(model, name, ir.Tensor(bias)))


def _make_plain(model: ir.Model, norm: Norm, kept: _Array | None) -> None:
    """Leave of a norm only what does not depend on gain and folded bias."""
    if norm.fused is not None:
        ones = shared_vector(model, 1.0, norm.width, norm.dtype)
        norm.node.replace_input_with(norm.fused.gain, ones)
        if norm.fused.bias is not None and norm.fused.bias < len(norm.node.inputs):
            if kept is None:
                norm.node.replace_input_with(norm.fused.bias, None)
            else:
                replace_input(
                    model, norm.node, norm.fused.bias, kept, f"{node_name(norm.node)}.bias"
                )
        return
    name = f"{node_name(norm.node)}/plain"
    bias = None
    if kept is not None:
        shape = (norm.width,) + (1,) * (-1 - norm.axis)
        bias = add_constant(model, f"{name}/bias", ir.Tensor(kept.reshape(shape)))
    if norm.kind in ("rms", "layer") and norm.axis == -1:
        plain = write_norm(
            model,
            norm.node,
            norm.kind,
            norm.read,
            width=norm.width,
            epsilon=norm.epsilon,
            dtype=norm.dtype,
            bias=bias,
            name=name,
        )
    else:
        core = [(norm.read if f.value is norm.source else f.value, f.exponent) for f in norm.core]
        powers = sorted(core, key=lambda p: p[1] != 1)
        plain = write_product(model, norm.node, powers, dtype=norm.dtype, bias=bias, name=name)
    plain.shape = norm.output.shape
    plain.meta.update(norm.output.meta)
    norm.output.replace_all_uses_with(plain)
