"""What each trick would change, from the dimensions of a model alone.

The counts are those of the papers: weights of matrices, without biases and norm gains. Symbols: D
model width, E key width, H K query width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

from onnx_tricks.inspect.dimensions import Dimensions
from onnx_tricks.inspect.traffic import Cache, Traffic

__all__ = [
    "ESTIMATES",
    "Change",
    "FirstLayer",
    "Refusal",
    "first_layer",
    "merge_skipless",
    "precompute_first_layer",
    "shrink_weights",
    "slim_attention",
]


@dataclasses.dataclass(frozen=True)
class Change:
    """What a trick changes, in values.

    Attributes:
        where: Which parts of the model it rewrites, in words.
        removed: Stored weights that go.
        added: Stored weights that come.
        read: Weights read once a step: more (positive) or fewer (negative).
        experts: The same for the routed experts of a mixture.
        looked_up: The same for what is looked up for each token.
        caches: The caches afterwards; None where they stay as they are.
        notes: What one has to know to read the figures.
    """

    where: str
    removed: int = 0
    added: int = 0
    read: int = 0
    experts: int = 0
    looked_up: int = 0
    caches: tuple[Cache, ...] | None = None
    notes: tuple[str, ...] = ()

    def applied_to(self, traffic: Traffic, dims: Dimensions) -> Traffic:
        """What a step reads afterwards."""
        return dataclasses.replace(
            traffic,
            weights=traffic.weights + dims.weights(self.read),
            experts=traffic.experts + dims.weights(self.experts),
            rows=traffic.rows + dims.weights(self.looked_up),
            caches=traffic.caches if self.caches is None else self.caches,
        )


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a trick does not apply.

    Attributes:
        reason: In words a user can act on.
        otherwise: What it would change in a model of these dimensions that qualified.
    """

    reason: str
    otherwise: Change | None = None


class FirstLayer(NamedTuple):
    """Reads of the part of the first layer that `precompute_first_layer` replaces.

    Attributes:
        before: Values read for one batch: its weights, and D for each token.
        after: Values read for one batch: a precomputed row for each token.
    """

    before: int
    after: int


def fold_norm(dims: Dimensions) -> Change | Refusal:
    """Gains folded into the linear layers behind them: D for each norm."""
    if not dims.foldable_norms:
        return Refusal("no norm has a gain that only linear layers read (post-norm blocks)")
    gains = dims.foldable_norms * dims.width
    note = "biases of norms go as well where the linear layers can take them"
    notes = (note,) if dims.norm == "layer" else ()
    return Change(f"up to {dims.foldable_norms} norms", gains, read=-gains, notes=notes)


def defer_norm(dims: Dimensions) -> Change | Refusal:
    """The division by the root mean square moved behind the linear layer: no weights change."""
    if dims.norm != "rms":
        return Refusal("the norms are not RMSNorm")
    if not dims.foldable_norms:
        return Refusal("no norm is read by linear layers only (post-norm blocks)")
    return Change(f"up to {dims.foldable_norms} norms", notes=(_NO_BYTES,))


def center_norm(dims: Dimensions) -> Change | Refusal:
    """LayerNorm turned into RMSNorm by centring what is written to the residual stream."""
    if dims.norm != "layer":
        return Refusal("the norms are not LayerNorm")
    if not dims.foldable_norms:
        return Refusal("residual connections read the outputs of the norms (post-norm blocks)")
    return Change(f"up to {dims.foldable_norms} norms", notes=(_NO_BYTES,))


def cancel_norm(dims: Dimensions) -> Change | Refusal:
    """A norm dropped whose readers are all normalised again."""
    if not dims.attention.normed:
        return Refusal("queries, keys and values are not normalised again")
    return Refusal("only queries and keys are normalised again: the values would change scale")


def precompute_first_layer(dims: Dimensions) -> Change | Refusal:
    """Everything between token id and first attention stored for each entry of the vocabulary.

    Serial blocks store ``[x | q | k | v]`` and parallel ones ``[x + ffn | q | k | v]``: D + H K +
    2 E numbers, which is 2 (D + E) where H K = D. Source: arXiv:2402.13388.
    """
    if not dims.vocabulary:
        return Refusal("the model reads no token ids")
    if dims.attention.position == "learned":
        return Refusal("learned positions are added to the embedding, so nothing behind it is a "
                       "function of the token id alone")  # fmt: skip
    if dims.attention.position == "unknown" or (dims.parallel and dims.ffn is None):
        return Refusal("the graph alone does not tell the block's layout: inspect the folder with "
                       "its config.json")  # fmt: skip
    parts = 1 + (dims.encoder is not None and dims.encoder.embeds_tokens)
    row = dims.width + dims.attention.query_width + 2 * dims.attention.key_width
    routed = dims.expert_weights if dims.parallel and dims.ffn and dims.ffn.experts > 1 else 0
    removed = dims.input_projection_weights + (dims.ffn_weights if dims.parallel else 0)
    # A tied head goes on reading the table; in serial blocks x is then looked up there.
    kept = dims.width if dims.tied and not dims.parallel else 0
    table = 0 if dims.tied else dims.embedding_weights
    return Change(
        "the first layer of encoder and decoder" if parts > 1 else "the first layer",
        removed=parts * removed,
        added=parts * (row - kept) * dims.vocabulary - table,
        read=routed - removed if dims.decodes else parts * (routed - removed),
        experts=-routed,
        looked_up=row - dims.width,
    )


def first_layer(dims: Dimensions, batch: int) -> FirstLayer | None:
    """Reads of the precomputed part for one batch; None where it cannot be precomputed.

    All experts of a mixture are counted, as in the paper.
    """
    change = precompute_first_layer(dims)
    if isinstance(change, Refusal):
        return None
    weights = -change.read - change.experts
    return FirstLayer(
        before=weights + batch * dims.width, after=batch * (dims.width + change.looked_up)
    )


def slim_attention(
    dims: Dimensions, cross: Literal["encoder", "keys"] = "encoder"
) -> Change | Refusal:
    """The value cache dropped, or both caches where no rotation stands in between.

    With RoPE the keys stay (E numbers for a token instead of 2 E); without it the layer's input
    takes the place of both (D numbers). Source: arXiv:2503.05840.

    Args:
        dims: The model.
        cross: What cross-attention reads: the encoder output itself, which all layers share, or a
            key cache of each layer (the paper's option 1).
    """
    attention, width, keys = dims.attention, dims.width, dims.attention.key_width
    if not dims.decodes:
        return Refusal("the model keeps no key/value cache")
    rotated = attention.position in ("rope", "unknown") or attention.normed
    own = keys if rotated else width
    usable = own < 2 * keys and (keys >= width or not rotated)
    if not usable and dims.encoder is None:
        return Refusal(_too_few_keys(dims))
    notes: list[str] = []
    grown = dims.layers * keys * (keys - width) if usable and rotated and keys > width else 0
    read = grown
    if usable and rotated:
        notes.append("in half precision r directions of the values stay beside the keys: "
                     "the factor is 2 E / (E + r), r about 16")  # fmt: skip
    if dims.encoder and cross == "encoder":
        # Keys and values were made once; now the weights that make them are read in each step.
        read += dims.layers * dims.key_value_weights
        notes.append(
            "the encoder output, which all layers share, is not counted and taken to stay on chip: "
            f"{width:,} values per encoder token; {dims.layers * width:,} where each layer reads it"
        )
    elif dims.encoder:
        read += dims.layers * keys * max(keys, width)
        grown += dims.layers * keys * max(keys - width, 0)
    return Change(
        f"{dims.layers} layers" + (", self- and cross-attention" if dims.encoder else ""),
        added=grown,
        read=read,
        caches=dims.caches(own if usable else 2 * keys, 0 if cross == "encoder" else keys),
        notes=tuple(notes),
    )


def merge_skipless(dims: Dimensions) -> Change | Refusal:
    """Query and output projections merged into their neighbours: 2 D H K for each layer.

    Every family that is known here has skip connections, so this is always a refusal that tells
    what the same dimensions would save. Source: arXiv:2404.12362.
    """
    reason = "skip connections and norms stand between the linear layers"
    if dims.attention.query_width != dims.width or dims.encoder:
        return Refusal(reason)
    removed = dims.layers * dims.query_output_weights
    note = "an exact rewrite of parallel blocks removes half of it"
    notes = (note,) if dims.parallel else ()
    return Refusal(reason, Change(f"{dims.layers} layers", removed, read=-removed, notes=notes))


def shrink_weights(dims: Dimensions) -> Change | Refusal:
    """The value projection of each head shrunk by K x K: E K for each attention layer.

    Without rotation or norm between them, queries and keys shrink likewise.
    """
    attention = dims.attention
    pairs = 1 if attention.position in ("rope", "unknown") or attention.normed else 2
    head = attention.key_width * attention.head_width
    # Cross-attention reads no key or value weight in a decode step, and neither does an encoder.
    read = dims.layers * pairs * head
    where = "values and outputs" + (", queries and keys" if pairs > 1 else "")
    return Change(where, removed=dims.attention_layers * pairs * head, read=-read)


def _too_few_keys(dims: Dimensions) -> str:
    keys = f"{dims.attention.kv_heads} key/value heads of {dims.attention.head_width}"
    keys += f" give E = {dims.attention.key_width}"
    if dims.attention.key_width < dims.width:
        return f"{keys} < D = {dims.width}: the values are no function of the keys (GQA or MQA)"
    return f"{keys}: the layer's input, D = {dims.width}, is no smaller than keys and values"


_NO_BYTES = "saves operators and latency, no weights"

ESTIMATES: dict[str, Callable[[Dimensions], Change | Refusal]] = {
    "fold-norm": fold_norm,
    "defer-norm": defer_norm,
    "center-norm": center_norm,
    "cancel-norm": cancel_norm,
    "precompute-first-layer": precompute_first_layer,
    "slim-attention": slim_attention,
    "merge-skipless": merge_skipless,
    "shrink-weights": shrink_weights,
}
"""The tricks by the names of their passes."""
