"""Decoders whose queries, keys and values are all normalised, as in Gemma 4, with random weights.

Two layers of width 48, pre-norms without a purpose: what reads them is normalised again. DyT can
take the place of the norms round the blocks.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

__all__ = ["DyT", "Normalised", "RMSNorm", "Sizes"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the vocabulary, rows, heads, key heads, one head, the feed-forward block, and so on."""

    vocabulary: int = 97
    width: int = 48
    heads: int = 4
    groups: int = 2
    head: int = 14
    inner: int = 80
    layers: int = 2
    epsilon: float = 1e-6


class RMSNorm(nn.Module):
    """`g * x / rms(x)`, spelled as Transformers spells it."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(1 + torch.rand(width) / 2), epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))


class DyT(nn.Module):
    """`g * tanh(alpha x) + beta`, which takes the place of a norm and knows no rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.rand(width) + start) for start in (0.5, -0.5))
        self.alpha = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class _Attention(nn.Module):
    def __init__(self, sizes: Sizes, *, values: bool, latent: bool, bias: bool) -> None:
        super().__init__()
        own, shared = sizes.heads * sizes.head, sizes.groups * sizes.head
        self.sizes, self.latent = sizes, latent
        self.query = nn.Linear(sizes.width, own, bias=bias)
        self.key = nn.Linear(sizes.width, shared, bias=False)
        self.value = nn.Linear(sizes.width, shared, bias=False)
        self.output = nn.Linear(own, sizes.width, bias=False)
        self.query_norm, self.key_norm = (
            RMSNorm(sizes.head, sizes.epsilon),
            RMSNorm(sizes.head, sizes.epsilon),
        )
        self.value_norm = RMSNorm(sizes.head, sizes.epsilon) if values else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._heads(part(x)) for part in (self.query, self.key, self.value))
        query, key = _rotate(self.query_norm(query)), _rotate(self.key_norm(key))
        if self.latent:  # a part of the keys that skips its norm, as the rotary slice of MLA
            key = key + self._heads(self.key(x))
        value = self.value_norm(value)
        repeats = self.sizes.heads // self.sizes.groups
        query, key, value = (
            query.transpose(1, 2),
            key.transpose(1, 2).repeat_interleave(repeats, 1),
            value.transpose(1, 2).repeat_interleave(repeats, 1),
        )
        scores = query @ key.transpose(-1, -2) / self.sizes.head**0.5
        mask = torch.ones_like(scores).triu(1) * -1e4
        mixed = torch.softmax(scores + mask, -1) @ value
        return self.output(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.sizes.head)


class _FeedForward(nn.Module):
    """A gated block whose gate is a ReLU, which keeps positive factors."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate = nn.Linear(sizes.width, sizes.inner, bias=False)
        self.up = nn.Linear(sizes.width, sizes.inner, bias=False)
        self.down = nn.Linear(sizes.inner, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.gate(x)) * self.up(x))


class Normalised(nn.Module):
    """Embedding, layers with norms before and after each block, norm, head.

    Args:
        values: Whether values are normalised, as queries and keys are (Gemma 4), or not (Qwen 3).
        latent: Whether a part of the keys goes round its norm (as in multi-head latent attention).
        bias: Whether the query projection has a bias.
        tanh: Whether DyT takes the place of the norms before and after each block.
        sizes: The sizes.
    """

    def __init__(
        self,
        *,
        values: bool = True,
        latent: bool = False,
        bias: bool = False,
        tanh: bool = False,
        sizes: Sizes | None = None,
    ) -> None:
        super().__init__()
        sizes = sizes or Sizes()
        torch.manual_seed(0)

        def norm() -> nn.Module:
            return DyT(sizes.width) if tanh else RMSNorm(sizes.width, sizes.epsilon)

        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": _Attention(sizes, values=values, latent=latent, bias=bias),
                    "feed_forward": _FeedForward(sizes),
                    **{f"norm{i}": norm() for i in range(4)},
                }
            )
            for _ in range(sizes.layers)
        )
        self.norm = norm()
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """[B, T] to [B, T, V]."""
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer["norm1"](layer["attention"](layer["norm0"](x)))
            x = x + layer["norm3"](layer["feed_forward"](layer["norm2"](x)))
        return self.head(self.norm(x))


def _rotate(x: Tensor) -> Tensor:
    """Rotary positions for [B, T, H, K]."""
    half = x.shape[-1] // 2
    frequencies = 1e4 ** (-torch.arange(half) / half)
    places = torch.ones_like(x[0, :, 0, :1]).cumsum(0) - 1
    angles = places * frequencies.to(x.dtype)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
