"""center-norm: LayerNorms become RMSNorms where nothing but centred rows enters the stream."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.constants import evaluate
from onnx_tricks.graph.edit import (
    Change,
    add_constant,
    fresh_name,
    insert_after,
    rewrite_constant,
)
from onnx_tricks.graph.names import described, node_name
from onnx_tricks.graph.shapes import dtype_of, rank_of
from onnx_tricks.graph.spell import write_centred, write_norm
from onnx_tricks.patterns.maker import Made
from onnx_tricks.patterns.mean import MeanReader, read_mean
from onnx_tricks.patterns.norm import Norm
from onnx_tricks.patterns.norms import find_norms
from onnx_tricks.patterns.sharing import Claim, Conflict, find_conflicts, share_groups
from onnx_tricks.patterns.stream import Stream, Term, Use, find_stream
from onnx_tricks.rewrite import Pass, Site, Skip
from onnx_tricks.weights import axis_mean, center_in_turn, subtract_mean

__all__ = ["CenterNorm"]

_Array = np.ndarray[Any, np.dtype[Any]]
_SKIP, _SKIP_RMS = "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"
_SKIP_BETA, _SKIP_BIAS = 3, 4  # inputs of theirs; output 3 is the sum


@dataclasses.dataclass(frozen=True)
class Centred:
    """What centring makes of a stored constant.

    Attributes:
        axis: The axis over which its mean becomes zero.
        scale: What its channels are multiplied with before, float64.
        values: The centred constant itself, where it has been worked out.
    """

    axis: int
    scale: bytes | None = None
    values: bytes | None = None

    def change(self) -> Change:
        """The change of the stored tensor."""
        means: list[_Array] = []

        def change(weight: _Array, rows: slice) -> _Array:
            if self.values is not None:
                return np.frombuffer(self.values, weight.dtype).reshape(weight.shape)[rows]
            scale = None if self.scale is None else np.frombuffer(self.scale)
            if not means:
                means.append(axis_mean(weight, self.axis, scale))
            return subtract_mean(weight, means[0], self.axis, scale, rows)

        return change


@dataclasses.dataclass(frozen=True)
class Part:
    """One residual stream whose norms can do without a mean.

    Attributes:
        readers: The norms that read it.
        stream: What is added up in it, in the order of execution.
        apart: The terms whose mean is taken off while the model runs, as no weight of theirs can
            be changed.
    """

    readers: tuple[MeanReader, ...]
    stream: Stream
    apart: tuple[Term, ...]

    @property
    def means(self) -> int:
        """How many means are taken off now: several norms may read one difference."""
        return len({reader.difference or reader.norm.output for reader in self.readers})

    @property
    def gains(self) -> bool:
        """Whether weights take means off, and more of them than are taken off while it runs."""
        return bool(self.made) and 2 * len(self.apart) <= self.means

    @property
    def made(self) -> list[Made]:
        """The constants that are centred, as they are read."""
        return [one for term in self.stream.terms if term not in self.apart for one in term.made]

    def changes(self) -> dict[ir.Value, Centred]:
        """What becomes of each stored constant."""
        made = self.made
        found = {one.weight.stored: Centred(one.weight.axis, _scale(one)) for one in made}
        often = collections.Counter(one.weight.stored for one in made)
        biases = [one for one in made if _is_bias(one) and often[one.weight.stored] == 1]
        begins = {term.value for term in self.stream.terms}
        if not any(_scales(value.producer()) for value in self.stream.stages.keys() - begins):
            vectors = [_bias(one) for one in biases]
            rounded = center_in_turn(vectors, [one.weight.tensor.dtype.numpy() for one in biases])
            for one, values in zip(biases, rounded, strict=True):
                found[one.weight.stored] = Centred(one.weight.axis, values=values.tobytes())
        return found


@dataclasses.dataclass(frozen=True)
class Centring(Site):
    """Streams that have to be centred together, because they share weights.

    A site has no bounds: all that a stream holds changes, and streams span whole models.
    """

    parts: tuple[Part, ...] = ()


@dataclasses.dataclass(frozen=True)
class CenterNorm(Pass):
    """Turn LayerNorms into RMSNorms by centring whatever is added to the stream that they read.

    ``LayerNorm(sum x W + b)  ==>  RMSNorm(sum x (W - rowmean(W)) + (b - mean(b)))``

    Shapes: W [F, D], b [D]; an embedding or position table is a W looked up by row.
    Exact: in real arithmetic; means in float64, rounded once to the dtype of W. What rounding
    takes from one bias goes into the next, so that it does not add up along the stream.
    Applies when: every reader of a residual stream is a LayerNorm over its channels.
    Saves: the mean and the subtraction in every norm of the stream.
    Where a term of the sum has no weight to centre (the embedding of a model with a tied head, the
    output of another norm), its mean is taken off at run time; the norms of a stream have to be
    twice as many, or nothing would be saved.
    Source: arXiv:2407.09577, section 3.

    Attributes:
        wide_only: Whether streams with weights in half precision stay as they are: rounding their
            weights once more can be too much, above all together with other passes. So it is
            tried where verification fails.
    """

    name: ClassVar[str] = "center-norm"
    summary: ClassVar[str] = "Centre what enters the residual stream; LayerNorms become RMSNorms."
    default: ClassVar[bool] = False

    wide_only: bool = False

    def stricter(self) -> Self | None:
        """The pass without half precision, where that has not been left out before."""
        return None if self.wide_only else dataclasses.replace(self, wide_only=True)

    def sites(self, model: ir.Model) -> Iterator[Site | Skip]:
        """Yield the streams that can be centred, and why the others cannot."""
        readers: list[MeanReader] = []
        for norm in find_norms(model):
            found = read_mean(norm)
            if isinstance(found, str):
                yield Skip(node_name(norm.node), found)
            elif found is not None:
                readers.append(found)
        parts: dict[int, Part] = {}
        order = {node: place for place, node in enumerate(model.graph.all_nodes())}
        for index, part in enumerate(_streams(readers, order)):
            if isinstance(part, Skip):
                yield part
            elif self.wide_only and any(one.weight.half for one in part.made):
                reason = "in half precision its weights, rounded once more, failed the proof"
                yield Skip(node_name(part.readers[0].norm.node), reason)
            else:
                parts[index] = part
        yield from _settle(parts)

    def apply(self, model: ir.Model, site: Site) -> None:
        """Centre the streams of one site."""
        assert isinstance(site, Centring)
        changes = {k: v for part in site.parts for k, v in part.changes().items()}
        for stored, constant in changes.items():
            rewrite_constant(stored, constant.change())
        for part in site.parts:
            for term in part.stream.terms:
                if term in part.apart:
                    _take_off(model, term)
                elif any(one.scale is not None for one in term.made):
                    _drop_scale(term)
            for reader in part.readers:
                _make_rms(model, reader)


def _streams(readers: list[MeanReader], order: Mapping[ir.Node, int]) -> Iterator[Part | Skip]:
    """The stream of every reader, each stream once."""
    entries = {use: index for index, reader in enumerate(readers) for use in reader.uses}
    # What is written anew cannot be centred inside, by the bias of a norm say.
    norms = {reader.norm.output for reader in readers}
    seen: set[int] = set()
    for index, reader in enumerate(readers):
        if index in seen:
            continue
        norm = reader.norm
        stream = find_stream(reader.source, norm.axis, norm.width, entries.__contains__, norms)
        members = sorted({entries[use] for use in stream.readers if use in entries} | {index})
        seen |= set(members)
        reason = _stream_reason(stream, entries)
        if reason:
            more = f" ({len(members)} norms read this stream)" if len(members) > 1 else ""
            yield Skip(node_name(norm.node), reason + more)
        else:
            terms = sorted(stream.terms, key=lambda term: [order[one.node] for one in term.made])
            stream = dataclasses.replace(stream, terms=tuple(terms))
            apart = tuple(term for term in terms if not _centrable(term))
            yield Part(tuple(readers[one] for one in members), stream, apart)


def _stream_reason(stream: Stream, entries: dict[Use, int]) -> str:
    """Why the readers of a stream forbid centring it; empty when they allow it."""
    if stream.obstacles:
        return f"{stream.obstacles[0]}, so that the residual stream cannot lose its mean"
    for node, index in stream.readers:
        value = node.inputs[index]
        assert value is not None
        if (node, index) not in entries:
            return (
                f"{described(node)} reads {value.name!r} too and is no LayerNorm, so "
                "that the residual stream cannot lose its mean"
            )
        if stream.stages.get(value, -1) != -1:
            return "it normalises another axis than that of the channels"
    return ""


def _centrable(term: Term) -> bool:
    """Whether the constants behind a term can be centred; a narrower type than its own rounds."""
    return bool(term.made) and all(
        one.weight.tensor.dtype.is_floating_point() and not one.weight.widened for one in term.made
    )


def _is_bias(made: Made) -> bool:
    """Whether a constant is one vector that is added to every row."""
    tensor = made.weight.tensor
    adds = made.node.op_type in ("Add", "Gemm", "Sum", _SKIP)
    return adds and tensor.size == tensor.shape.numpy()[made.weight.axis]


def _scale(made: Made) -> bytes | None:
    array = evaluate(made.scale)
    return None if array is None else array.astype(np.float64).reshape(-1).tobytes()


def _bias(made: Made) -> _Array:
    vector = made.weight.tensor.numpy().astype(np.float64).reshape(-1)
    scale = _scale(made)
    return vector if scale is None else vector * np.frombuffer(scale)


def _scales(node: ir.Node | None) -> bool:
    return node is not None and node.op_type in ("Div", "Mul", "Neg", "Sub")


def _settle(parts: dict[int, Part]) -> Iterator[Site | Skip]:
    """Take apart the terms whose weights something else reads; group streams that share weights."""
    while True:
        conflicts = find_conflicts(_claims(parts))
        for owner in {one.claim.owner for one in conflicts}:
            parts[owner] = _without(parts[owner], conflicts)
        refused = {i: p for i, p in parts.items() if not p.gains}
        for index, part in refused.items():
            # One that stands where a mean has been taken off already has nothing left to gain.
            if any(reader.norm.kind == "layer" for reader in part.readers):
                yield Skip(node_name(part.readers[0].norm.node), _term_reason(part))
            del parts[index]
        if not conflicts and not refused:
            break
    for members in share_groups({i: p.changes() for i, p in parts.items()}):
        chosen = tuple(parts[index] for index in members)
        readers = [reader for part in chosen for reader in part.readers]
        yield Centring(node_name(readers[0].norm.node), count=len(readers), parts=chosen)


def _claims(parts: dict[int, Part]) -> Iterator[Claim]:
    for owner, part in parts.items():
        changes = part.changes()
        for one in part.made:
            yield Claim(owner, one.weight, one.node, one.index, changes[one.weight.stored])


def _without(part: Part, conflicts: list[Conflict]) -> Part:
    """The part with those terms apart whose weights are in conflict."""
    lost = {one.claim.weight.stored for one in conflicts}
    apart = [t for t in part.stream.terms if any(one.weight.stored in lost for one in t.made)]
    return dataclasses.replace(part, apart=tuple(dict.fromkeys((*part.apart, *apart))))


def _term_reason(part: Part) -> str:
    term = part.apart[0]
    node = term.value.producer()
    source = f"{node.op_type} {node_name(node)!r}" if node is not None else f"{term.value.name!r}"
    return (
        f"{source} enters the residual stream and has no weight of its own to centre: taking means "
        f"off while the model runs ({len(part.apart)} terms for {part.means} norms) saves "
        "nothing"
    )


def _take_off(model: ir.Model, term: Term) -> None:
    """Put a value without its mean where a term enters the stream."""
    first, index = term.uses[0]
    value = first.inputs[index]
    assert value is not None
    node = value.producer()
    result = write_centred(
        model,
        next(iter(model.graph)) if node is None else _following(node),
        value,
        axis=term.axis,
        dtype=dtype_of(value) or ir.DataType.FLOAT,
        name=f"{value.name}/centred",
    )
    result.shape = value.shape
    result.meta.update(value.meta)
    for reader, index in term.uses:
        reader.replace_input_with(index, result)


def _drop_scale(term: Term) -> None:
    """Remove a product with a constant vector that has moved into the weights before it."""
    node = term.value.producer()
    assert node is not None
    data = next(one for one in node.inputs if one is not term.made[0].scale)
    assert data is not None
    node.outputs[0].replace_all_uses_with(data)


def _following(node: ir.Node) -> ir.Node:
    assert node.graph is not None
    nodes = iter(node.graph)
    while next(nodes) is not node:
        pass
    return next(nodes)


def _make_rms(model: ir.Model, reader: MeanReader) -> None:
    """Replace a LayerNorm of centred rows by an RMSNorm."""
    norm, label = reader.norm, node_name(reader.norm.node)
    if reader.difference is not None:
        node = reader.difference.producer()
        assert node is not None
        assert node.inputs[0] is not None
        reader.difference.replace_all_uses_with(node.inputs[0])
        return
    gain = None if np.all(norm.gain == 1) else _vector(model, norm, "gain")
    bias = _vector(model, norm, "bias") if norm.biased else None
    if norm.node.op_type == _SKIP:
        # An operator that adds and normalises has a twin that does without the mean and the bias.
        norm.node.op_type = _SKIP_RMS
        further = norm.node.inputs[_SKIP_BIAS:]
        norm.node.resize_inputs(_SKIP_BETA + len(further))
        for index, value in enumerate(further, _SKIP_BETA):
            norm.node.replace_input_with(index, value)
        if bias is not None:
            insert_after(model, norm.output, "Add", bias)
        return
    old = norm.output
    new = write_norm(
        model,
        norm.node,
        "rms",
        reader.source,
        width=norm.width,
        epsilon=norm.epsilon,
        dtype=norm.dtype,
        gain=gain,
        bias=bias,
        name=f"{label}/rms",
    )
    new.shape = old.shape
    new.meta.update(old.meta)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    # The name stays with the meaning: it may be that of an output of the model.
    new.name, old.name = old.name, fresh_name(model, f"{label}/layer")


def _vector(model: ir.Model, norm: Norm, word: Literal["gain", "bias"]) -> ir.Value:
    """Gain or bias as a vector: the norm's own where it is stored as one."""
    place = getattr(norm.fused, word) if norm.fused is not None else None
    own: ir.Value | None = None if place is None else norm.node.inputs[place]
    if own is not None and rank_of(own) == 1:
        return own
    array: _Array = getattr(norm, word).astype(norm.dtype.numpy())
    return add_constant(model, f"{node_name(norm.node)}/{word}", ir.Tensor(array, dtype=norm.dtype))
