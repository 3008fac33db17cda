"""The dimensions of a transformer, and the weights, caches and reads that follow from them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from onnx_tricks.inspect.traffic import Amount, Cache, Traffic

__all__ = ["Attention", "Dimensions", "Encoder", "FeedForward", "Position"]

Position = Literal["rope", "alibi", "relative", "learned", "none", "unknown"]
"""How positions enter: learned ones are added to the embedding, all others act in attention."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention layer.

    Attributes:
        heads: Query heads H.
        kv_heads: Key/value heads G.
        head_width: Width K of a head.
        position: How positions enter.
        normed: Whether queries and keys are normalised by head or row.
        window: Tokens that the sliding-window layers see; None where no layer has a window.
        windowed: How many layers have a sliding window.
    """

    heads: int
    kv_heads: int
    head_width: int
    position: Position
    normed: bool = False
    window: int | None = None
    windowed: int = 0

    @property
    def query_width(self) -> int:
        """H * K."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """E = G * K."""
        return self.kv_heads * self.head_width


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """One feed-forward block.

    Attributes:
        width: Hidden width F, of each expert in a mixture.
        gated: Whether it is a gated linear unit: three matrices in place of two.
        experts: Routed experts; 1 where there is no mixture.
        chosen: Experts that a token uses.
        shared_width: Hidden width of what all tokens use beside the experts.
    """

    width: int
    gated: bool
    experts: int = 1
    chosen: int = 1
    shared_width: int = 0


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The encoder of an encoder-decoder model.

    Attributes:
        layers: Its layers.
        tokens: Length of its output where it is fixed (Whisper: 1500); else None.
        embeds_tokens: Whether it reads token ids (T5) rather than features (Whisper).
        ffn: Its feed-forward block.
    """

    layers: int
    tokens: int | None
    embeds_tokens: bool
    ffn: FeedForward


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """The dimensions of a transformer. Weights are those of its matrices, as papers count them.

    Biases, norm gains and routers are left out: together less than a tenth of a per cent.

    Attributes:
        model_type: The family, in the words of Transformers.
        width: Model width D.
        layers: Layers L of the decoder, or of an encoder that stands alone.
        vocabulary: Vocabulary size V.
        attention: The attention layers.
        ffn: The feed-forward blocks; None where they are not known.
        context: The longest context the model is made for; None where it is not known.
        parallel: Whether attention and feed-forward block read the same input (GPT-J, Pythia).
        tied: Whether the head is the embedding table.
        has_head: Whether there is an output projection to the vocabulary.
        decodes: Whether the model generates token by token, with a cache.
        norm: Kind of the norms; None where the family has none or it is not known.
        foldable_norms: Norms in the model whose output only linear layers read.
        encoder: The encoder of an encoder-decoder model.
        weight_bytes: Bytes of one weight.
        cache_bytes: Bytes of one number in a cache.
    """

    model_type: str
    width: int
    layers: int
    vocabulary: int
    attention: Attention
    ffn: FeedForward | None
    context: int | None = None
    parallel: bool = False
    tied: bool = False
    has_head: bool = True
    decodes: bool = True
    norm: Literal["rms", "layer"] | None = None
    foldable_norms: int = 0
    encoder: Encoder | None = None
    weight_bytes: int = 4
    cache_bytes: int = 4

    @property
    def query_output_weights(self) -> int:
        """Query and output projection of one layer: 2 D H K."""
        return 2 * self.width * self.attention.query_width

    @property
    def key_value_weights(self) -> int:
        """Key and value projection of one layer: 2 D E."""
        return 2 * self.width * self.attention.key_width

    @property
    def input_projection_weights(self) -> int:
        """Query, key and value projection of one layer: D (H K + 2 E)."""
        return self.query_output_weights // 2 + self.key_value_weights

    @property
    def expert_weights(self) -> int:
        """All routed experts of one layer, or its whole block where there is no mixture."""
        return self._matrices(self.ffn) * self.ffn.width * self.ffn.experts if self.ffn else 0

    @property
    def ffn_weights(self) -> int:
        """All feed-forward weights of one layer."""
        shared = self._matrices(self.ffn) * self.ffn.shared_width if self.ffn else 0
        return self.expert_weights + shared

    @property
    def embedding_weights(self) -> int:
        """The embedding table: D V."""
        return self.width * self.vocabulary

    @property
    def attention_layers(self) -> int:
        """Self-attention layers in decoder and encoder, and cross-attention layers."""
        return self.layers + (self.layers + self.encoder.layers if self.encoder else 0)

    @property
    def parameters(self) -> int:
        """All weights: attention, feed-forward blocks, embedding and head."""
        attention = self.query_output_weights + self.key_value_weights
        blocks = self.attention_layers * attention + self.layers * self.ffn_weights
        if self.encoder:
            blocks += (
                self.encoder.layers * self._matrices(self.encoder.ffn) * (self.encoder.ffn.width)
            )
        return blocks + self.embedding_weights * (1 + (self.has_head and not self.tied))

    @property
    def traffic(self) -> Traffic:
        """What a decode step reads; of an encoder alone, what a token passes through.

        The keys and values of cross-attention were made before the first step, so its key and
        value projection is not read in one.
        """
        layer = self.query_output_weights + self.key_value_weights + self.ffn_weights
        if self.encoder:
            layer += self.query_output_weights
        routed = self.expert_weights if self.ffn and self.ffn.experts > 1 else 0
        head = self.embedding_weights * self.has_head
        return Traffic(
            weights=self.weights(head + self.layers * (layer - routed)),
            experts=self.weights(self.layers * routed),
            used=self.ffn.chosen / self.ffn.experts if self.ffn else 1.0,
            rows=self.weights(self.width),
            caches=self.caches(2 * self.attention.key_width, 2 * self.attention.key_width),
        )

    def caches(self, own: int, cross: int) -> tuple[Cache, ...]:
        """The caches of the decoder.

        Args:
            own: Values that one layer's self-attention keeps for one token.
            cross: The same for its cross-attention.
        """
        if not self.decodes:
            return ()
        windowed = self.attention.windowed
        groups = [
            Cache("self", self._cached(own * (self.layers - windowed))),
            Cache("self", self._cached(own * windowed), window=self.attention.window),
        ]
        if self.encoder:
            tokens = self.encoder.tokens
            groups.append(Cache("cross", self._cached(cross * self.layers), tokens=tokens))
        return tuple(one for one in groups if one.per_token.values)

    def weights(self, values: int) -> Amount:
        """So many weights, in the type of the model."""
        return Amount(values, values * self.weight_bytes)

    def _cached(self, values: int) -> Amount:
        return Amount(values, values * self.cache_bytes)

    def _matrices(self, ffn: FeedForward | None) -> int:
        """Weights of a feed-forward block for each unit of its hidden width: 2 D or 3 D."""
        return 0 if ffn is None else self.width * (3 if ffn.gated else 2)
