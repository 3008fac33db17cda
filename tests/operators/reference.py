"""Slim attention in NumPy, in float64, from its definition: K and V made whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def softmax(scores: Array) -> Array:
    top = scores.max(-1, keepdims=True)
    masked = np.isneginf(top)
    powers = np.exp(scores - np.where(masked, 0, top))
    total = powers.sum(-1, keepdims=True)
    return np.where(total == 0, 0, powers / np.where(total == 0, 1, total))


def rotate(keys: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Keys [B, G, S, K] as complex numbers, times exp(i angle)."""
    half = cos.shape[-1]
    first = np.arange(half) * 2 if interleaved else np.arange(half)
    second = first + (1 if interleaved else half)
    turned = (keys[..., first] + 1j * keys[..., second]) * (cos + 1j * sin)[:, None]
    result = keys.copy()
    result[..., first], result[..., second] = turned.real, turned.imag
    return result


def attend(
    query: Array,
    keys: Array,
    values: Array,
    *,
    scale: float,
    bias: Array | None = None,
    softcap: float = 0.0,
    rounded: Callable[[Array], Array] = np.asarray,
) -> Array:
    """Plain attention: [B, T, H V] from query [B, H, T, K], keys and values [B, G, S, ...].

    `rounded` is what a model in a narrower type does to keys, values and weights.
    """
    share = query.shape[1] // keys.shape[1]
    keys, values = (np.repeat(rounded(a), share, axis=1) for a in (keys, values))
    scores = scale * query @ keys.swapaxes(2, 3)
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    heads = rounded(softmax(scores)) @ values
    return heads.transpose(0, 2, 1, 3).reshape(len(heads), heads.shape[2], -1)


def normalise(keys: Array, norm: str, centered: bool, epsilon: float) -> Array:
    """Keys [B, G, S, K], over the channels of a "head" or of all "heads"."""
    axes = -1 if norm == "head" else (1, 3)
    mean = keys.mean(axes, keepdims=True) if centered else 0
    return (keys - mean) / np.sqrt(((keys - mean) ** 2).mean(axes, keepdims=True) + epsilon)


def slim_attention(
    feeds: dict[str, Array],
    *,
    interleaved: bool = False,
    norm: str = "",
    centered: bool = False,
    epsilon: float = 0.0,
    **options: Any,
) -> tuple[Array, Array, Array | None]:
    """The operator SlimAttention: output, present key, present residual."""
    present = np.concatenate([feeds["past_key"], feeds["key"]], axis=2)
    keys = present + feeds.get("key_bias", 0)
    if norm:
        keys = normalise(keys, norm, centered, epsilon)
        keys = keys * feeds.get("key_gain", 1) + feeds.get("key_shift", 0)
    if "cos" in feeds:
        keys = rotate(keys, feeds["cos"], feeds["sin"], interleaved)
    latent = present.transpose(0, 2, 1, 3).reshape(len(present), present.shape[2], -1)
    residual = None
    if "residual" in feeds:
        residual = np.concatenate([feeds["past_residual"], feeds["residual"]], axis=1)
        latent = np.concatenate([latent, residual], axis=2)
    values = latent[:, None] @ feeds["value_weight"]
    output = attend(feeds["query"], keys, values, bias=feeds.get("bias"), **options)
    return output + feeds.get("value_bias", np.zeros(1)).reshape(-1), present, residual


def slim_hidden(feeds: dict[str, Array], **options: Any) -> tuple[Array, Array]:
    """The operators SlimHiddenAttention and SlimCrossAttention: output, present hidden."""
    hidden = feeds["hidden"]
    if "past_hidden" in feeds:
        hidden = np.concatenate([feeds["past_hidden"], hidden], axis=1)
    keys = hidden[:, None] @ feeds["key_weight"].swapaxes(1, 2)
    values = hidden[:, None] @ feeds["value_weight"]
    output = attend(feeds["query"], keys, values, bias=feeds.get("bias"), **options)
    return output + feeds.get("value_bias", np.zeros(1)).reshape(-1), hidden
