"""What the native operators say to inputs that do not fit together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnx_tricks.operators.signature import KEY_NORMS
from tests.operators.nodes import Array, hidden_feeds, key_feeds, run_node

Change = Callable[[dict[str, Array]], None]


def _resize(name: str, *shape: int) -> Change:
    def change(feeds: dict[str, Array]) -> None:
        feeds[name] = np.zeros(shape)

    return change


def _without(name: str) -> Change:
    def change(feeds: dict[str, Array]) -> None:
        del feeds[name]

    return change


_KEYS = [
    (_resize("query", 2, 4, 6), r"query is \[2, 4, 6\]; expected \[B, H, T, K\]"),
    (_resize("query", 2, 3, 1, 6), r"value_bias is \[4, 1, 5\]; expected .* H = 3"),
    (_resize("key", 2, 4, 1, 7), r"key is \[2, 4, 1, 7\]; expected .* K = 6"),
    (
        _resize("past_key", 2, 4, 3, 6),
        r"past_key is \[2, 4, 3, 6\].* S = 6 .* 5 rows|past_residual",
    ),
    (_resize("past_key", 3, 4, 5, 6), r"past_key is \[3, 4, 5, 6\]; expected .* B = 2"),
    (
        _resize("value_weight", 4, 26, 5),
        r"value_weight is \[4, 26, 5\]; expected \[G, G K \+ r, V\]",
    ),
    (_resize("cos", 2, 6, 4), r"sin is \[2, 6, 3\]; expected .* A = 4"),
    (_resize("sin", 1, 6, 3), r"sin is \[1, 6, 3\]; expected the shape of cos, \[2, 6, 3\]"),
    (_resize("bias", 2, 1, 1, 7), r"bias is \[2, 1, 1, 7\]; expected what broadcasts"),
    (_resize("residual", 2, 1, 4), r"past_residual is \[2, 5, 3\]; expected .* r = 4"),
    (_without("sin"), "cos is given without sin"),
    (_without("past_residual"), "residual is given without past_residual"),
    (_resize("key_bias", 4, 6), r"key_bias is \[4, 6\]; expected \[G, 1, K\]"),
    (_resize("key_gain", 4, 1, 6), "key_gain is given without key_norm"),
    (_resize("key_shift", 4, 1, 6), "key_shift is given without key_norm"),
    (_resize("value_bias", 4, 1, 6), r"value_bias is \[4, 1, 6\]; expected \[H, 1, V\]"),
]


@pytest.mark.parametrize(("change", "message"), _KEYS, ids=[m[:30] for _, m in _KEYS])
def test_wrong_shapes_are_named_with_those_expected(
    change: Change, message: str, library: Path
) -> None:
    feeds = key_feeds()
    change(feeds)
    with pytest.raises(Exception, match=f"SlimAttention: .*({message})"):
        run_node("SlimAttention", feeds)


def test_terms_of_a_norm_are_of_the_keys_shape(library: Path) -> None:
    feeds = key_feeds(norm=True)
    feeds["key_gain"] = np.zeros((1, 1, 6))
    with pytest.raises(Exception, match=r"key_gain is \[1, 1, 6\]; expected \[G, 1, K\]"):
        run_node("SlimAttention", feeds, norm="head")


@pytest.mark.parametrize(("op_type", "norm"), [("SlimAttention", 3), ("SlimHiddenAttention", 1)])
def test_norms_that_no_kernel_knows_are_refused(
    op_type: str, norm: int, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KEY_NORMS, "head", norm)
    feeds = key_feeds() if op_type == "SlimAttention" else hidden_feeds()
    with pytest.raises(Exception, match=f"{op_type}: key_norm is {norm}; expected"):
        run_node(op_type, feeds, norm="head")


def test_wider_rotation_than_keys_is_refused(library: Path) -> None:
    feeds = key_feeds()
    feeds["cos"] = feeds["sin"] = np.zeros((2, 6, 4))
    with pytest.raises(Exception, match=r"cos is \[2, 6, 4\]; expected at most K / 2 channels"):
        run_node("SlimAttention", feeds)


def test_heads_that_groups_do_not_divide_are_refused(library: Path) -> None:
    feeds = key_feeds(bias=False)
    feeds["query"] = np.zeros((2, 3, 1, 6))
    with pytest.raises(Exception, match="query has 3 heads, value_weight 4 groups"):
        run_node("SlimAttention", feeds)


@pytest.mark.parametrize("op_type", ["SlimHiddenAttention", "SlimCrossAttention"])
def test_weights_of_another_width_are_refused(op_type: str, library: Path) -> None:
    feeds = hidden_feeds(1, 5 if op_type == "SlimHiddenAttention" else None)
    feeds["key_weight"] = np.zeros((4, 6, 9))
    with pytest.raises(Exception, match=rf"{op_type}: key_weight is \[4, 6, 9\]; .* D = 8"):
        run_node(op_type, feeds)


def test_a_buffer_without_room_is_refused(library: Path) -> None:
    feeds = key_feeds(3, 5)
    feeds["past_key"] = feeds["past_key"][:, :, :4]
    feeds["past_residual"] = feeds["past_residual"][:, :4]
    with pytest.raises(Exception, match="S - T rows, or a buffer of at least S"):
        run_node("SlimAttention", feeds)
