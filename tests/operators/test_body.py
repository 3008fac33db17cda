"""The plain-ONNX bodies compute what the operators are defined to compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.operators.nodes import EPSILON, SCALE, SOFTCAP, hidden_feeds, key_feeds, run_node
from tests.operators.reference import slim_attention, slim_hidden

Array = np.ndarray[Any, np.dtype[Any]]


def _close(ours: Array, theirs: Array | None, eps: float = 1e-6) -> None:
    assert theirs is not None
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= eps * np.abs(theirs).max()


# A prompt is a step of at least as many tokens as a head is wide: 6.
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("groups", [4, 2])
def test_slim_attention_attends_to_cachedkey_feeds(tokens: int, past: int, groups: int) -> None:
    feeds = key_feeds(tokens, past, groups=groups)
    output, key, residual = run_node("SlimAttention", feeds)
    expected = slim_attention(feeds, scale=SCALE)
    _close(output, expected[0])
    _close(key, expected[1])
    _close(residual, expected[2])


@pytest.mark.parametrize(("rotary", "interleaved"), [(4, False), (4, True), (6, True), (0, False)])
def test_slim_attention_rotates_part_of_a_head_either_way(rotary: int, interleaved: bool) -> None:
    feeds = key_feeds(rotary=rotary)
    output, *_ = run_node("SlimAttention", feeds, interleaved=interleaved)
    _close(output, slim_attention(feeds, interleaved=interleaved, scale=SCALE)[0])


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("norm", ["head", "heads"])
@pytest.mark.parametrize(("tokens", "terms"), [(1, True), (7, True), (1, False)])
def test_slim_attention_normalises_keys_before_it_rotates_them(
    tokens: int, terms: bool, norm: str, centered: bool
) -> None:
    feeds = key_feeds(tokens, rotary=4, bias=terms, norm=terms)
    output, key, _ = run_node("SlimAttention", feeds, norm=norm, centered=centered)
    expected = slim_attention(feeds, norm=norm, centered=centered, epsilon=EPSILON, scale=SCALE)
    _close(output, expected[0])
    _close(key, expected[1])


def test_slim_attention_does_without_residual_and_biases() -> None:
    feeds = key_feeds(rank=0, bias=False)
    output, key = run_node("SlimAttention", feeds)
    expected = slim_attention(feeds, scale=SCALE)
    _close(output, expected[0])
    _close(key, expected[1])


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("groups", [4, 1])
def test_slim_hidden_attention_attends_to_cached_inputs(tokens: int, groups: int) -> None:
    feeds = hidden_feeds(tokens, groups=groups)
    output, hidden = run_node("SlimHiddenAttention", feeds, opset=13, softcap=True)
    expected = slim_hidden(feeds, scale=SCALE, softcap=SOFTCAP)
    _close(output, expected[0])
    _close(hidden, expected[1])


@pytest.mark.parametrize("tokens", [1, 7])
def test_slim_cross_attention_attends_to_an_encoder(tokens: int) -> None:
    feeds = hidden_feeds(tokens, None)
    (output,) = run_node("SlimCrossAttention", feeds, opset=23)
    _close(output, slim_hidden(feeds, scale=SCALE)[0])


@pytest.mark.parametrize("cache", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_narrow_cache_costs_its_rounding_and_no_more(cache: ir.DataType, tokens: int) -> None:
    feeds = key_feeds(tokens)
    narrow = cache.numpy()
    rounded = {
        name: array.astype(narrow).astype(np.float64)
        if name in ("key", "past_key", "residual", "past_residual")
        else array
        for name, array in feeds.items()
    }
    output, *_ = run_node("SlimAttention", feeds, cache=cache)
    _close(output, slim_attention(rounded, scale=SCALE)[0])


def test_half_precision_accumulates_in_single_precision() -> None:
    feeds = {name: array.astype(np.float16) for name, array in key_feeds().items()}
    output, *_ = run_node("SlimAttention", feeds, dtype=ir.DataType.FLOAT16)
    exact = {name: array.astype(np.float64) for name, array in feeds.items()}
    expected, *_ = slim_attention(exact, scale=SCALE)
    assert np.abs(output - expected).max() <= 2**-11 * np.abs(expected).max()


def test_large_keys_in_half_precision_do_not_overflow() -> None:
    feeds = {name: array.astype(np.float16) for name, array in key_feeds(bias=False).items()}
    feeds["query"] *= np.float16(300)
    feeds["past_key"] *= np.float16(300)
    output, *_ = run_node("SlimAttention", feeds, dtype=ir.DataType.FLOAT16)
    assert np.isfinite(output).all()


def test_a_row_in_which_everything_is_masked_gives_zeros_where_the_original_did() -> None:
    feeds = key_feeds(7)
    feeds["bias"][1, :, 2] = -np.inf
    output, *_ = run_node("SlimAttention", feeds, safe=True)
    expected, *_ = slim_attention(feeds, scale=SCALE)
    expected[1, 2] = 0
    _close(output, expected)
