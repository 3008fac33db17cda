"""Decoders without skip connections and without norms, trained for a moment on Python sources.

Attention and feed-forward block in series or in parallel. Two layers of width 48: random weights
would be well conditioned, and those of a trained model are not.
"""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

__all__ = ["Skipless", "Variant", "trained"]

_LENGTH, _BATCH, _STEPS, _RATE = 32, 16, 100, 3e-3


@dataclasses.dataclass(frozen=True)
class Variant:
    """One kind of skipless decoder.

    Attributes:
        parallel: Whether attention and feed-forward block read the same rows and are added.
        groups: G, the number of key heads, of 4 query heads.
        rotary: Whether queries and keys are rotated; otherwise nothing tells positions.
        bias: Whether linear layers have biases.
        gated: Whether the feed-forward block has a gate.
        packed: Whether queries, keys and values come from one product.
        tied: Whether the output layer is the embedding table.
        cache: Whether keys and values of earlier tokens are taken and returned.
    """

    parallel: bool = False
    groups: int = 4
    rotary: bool = True
    bias: bool = False
    gated: bool = True
    packed: bool = False
    tied: bool = False
    cache: bool = False


class _Attention(nn.Module):
    def __init__(self, variant: Variant, width: int, heads: int) -> None:
        super().__init__()
        self.variant, self.heads, self.head = variant, heads, width // heads
        self.sizes = [width, *[variant.groups * self.head] * 2]
        if variant.packed:
            self.projections = nn.ModuleList([nn.Linear(width, sum(self.sizes), variant.bias)])
        else:
            self.projections = nn.ModuleList(
                nn.Linear(width, size, variant.bias) for size in self.sizes
            )
        self.output = nn.Linear(width, width, variant.bias)

    def forward(
        self, x: Tensor, mask: Tensor, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        made = [part(x) for part in self.projections]
        made = list(made[0].split(self.sizes, -1)) if self.variant.packed else made
        heads = [one.view(*x.shape[:2], -1, self.head).transpose(1, 2) for one in made]
        query, key, value = heads
        places = mask.cumsum(1) - 1  # [B, S]
        new = places[:, -x.shape[1] :, None]
        if self.variant.rotary:
            query, key = _rotate(query, new), _rotate(key, new)
        if past:
            key, value = torch.cat((past[0], key), 2), torch.cat((past[1], value), 2)
        repeats = self.heads // self.variant.groups
        keys, values = (one.repeat_interleave(repeats, 1) for one in (key, value))
        scores = query @ keys.transpose(-1, -2) * self.head**-0.5
        hidden = (places[:, None] > new) | (mask[:, None] == 0)
        scores = scores + torch.where(hidden, -1e4, 0.0).to(x.dtype)[:, None]
        mixed = torch.softmax(scores, -1) @ values
        return self.output(mixed.transpose(1, 2).reshape(*x.shape)), (key, value)


class _FeedForward(nn.Module):
    def __init__(self, variant: Variant, width: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, inner, variant.bias) if variant.gated else None
        self.up = nn.Linear(width, inner, variant.bias)
        self.down = nn.Linear(inner, width, variant.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(nn.functional.gelu(self.up(x)))
        return self.down(silu(self.gate(x)) * self.up(x))


class Skipless(nn.Module):
    """Embedding, layers, output layer: nothing else.

    Args:
        variant: Which kind.
        width: D, the number of channels.
        inner: F, those inside the feed-forward block.
        layers: L.
        vocabulary: V.
    """

    def __init__(
        self,
        variant: Variant,
        width: int = 48,
        inner: int = 80,
        layers: int = 2,
        vocabulary: int = 128,
    ) -> None:
        super().__init__()
        self.variant = variant
        self.embedding = nn.Embedding(vocabulary, width)
        self.attention = nn.ModuleList(_Attention(variant, width, 4) for _ in range(layers))
        self.feed_forward = nn.ModuleList(
            _FeedForward(variant, width, inner) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        if variant.tied:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, *cached: Tensor) -> Tensor | tuple[Tensor, ...]:
        """[B, T] to [B, T, V].

        With a cache also a mask [B, S], and by layer keys and values [B, G, P, K], to the same
        keys and values with T tokens more.
        """
        x, present = self.embedding(input_ids), []
        mask, *past = cached or (torch.ones_like(input_ids),)
        for index, (attention, block) in enumerate(
            zip(self.attention, self.feed_forward, strict=True)
        ):
            mixed, states = attention(x, mask, tuple(past[2 * index : 2 * index + 2]))
            x = mixed + block(x) if self.variant.parallel else block(mixed)
            present += states
        logits: Tensor = self.head(x)
        return (logits, *present) if self.variant.cache else logits

    def past(self) -> dict[str, Tensor]:
        """Examples of what the model takes besides tokens, by name."""
        if not self.variant.cache:
            return {}
        names = [f"{i}.{kind}" for i in range(len(self.attention)) for kind in ("key", "value")]
        size = self.embedding.embedding_dim // 4
        return {
            f"past_key_values.{one}": torch.zeros(2, self.variant.groups, 5, size) for one in names
        }


def trained(variant: Variant, *, orthogonal: bool = True) -> Skipless:
    """A model of a kind after 100 steps on the source of Python's textwrap, always the same.

    Args:
        variant: Which kind.
        orthogonal: Whether weights start orthogonal, as skipless models are trained. Otherwise they
            start as independent numbers, and end conditioned as badly as those of other models.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        model = Skipless(dataclasses.replace(variant, cache=False))
        _start(model, orthogonal=orthogonal)
        source = Path(textwrap.__file__).read_text(encoding="utf-8")
        text = torch.tensor([min(ord(letter), 127) for letter in source])
        optimizer = torch.optim.Adam(model.parameters(), _RATE)
        for _ in range(_STEPS):
            starts = torch.randint(len(text) - _LENGTH - 1, (_BATCH, 1))
            rows = text[starts + torch.arange(_LENGTH + 1)]
            logits = model(rows[:, :-1])
            loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
    model.variant = variant
    model.eval()
    return model


def _start(model: Skipless, *, orthogonal: bool) -> None:
    """Weights that keep the size of rows, as nothing else does it here."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(0, 0.1)
                continue
            parameter.normal_(0, parameter.shape[1] ** -0.5)
            if orthogonal:
                for packed in parameter.split(parameter.shape[1]):
                    nn.init.orthogonal_(packed)
        model.embedding.weight.normal_()


def _rotate(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions [B, T, 1] for [B, H, T, K]."""
    half = x.shape[-1] // 2
    angles = places[:, None].to(x.dtype) * 1e4 ** (-torch.arange(half) / half).to(x.dtype)
    cos, sin = angles.cos(), angles.sin()
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
