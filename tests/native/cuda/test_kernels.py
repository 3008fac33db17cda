"""The CUDA kernels compute what the operators are defined to compute, in every mode and type."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.native.cuda.conftest import Emulated
from tests.operators.nodes import EPSILON as EPSILON_OF_KEYS
from tests.operators.nodes import SCALE, SOFTCAP, run_node
from tests.operators.reference import slim_attention, slim_hidden

Array = np.ndarray[Any, np.dtype[Any]]

FLOAT, HALF, BRIEF = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
TYPES = [(FLOAT, FLOAT), (FLOAT, HALF), (FLOAT, BRIEF), (HALF, HALF), (BRIEF, BRIEF)]
EPSILON = {FLOAT: 5e-6, HALF: 1e-3, BRIEF: 8e-3}
"""Of the greatest number; for types of 16 bits twice what rounding the output alone may cost."""

# What computes the sums of the latent, on which machine: see csrc/cuda/plan.h.
PATHS = {"plain": ("plain", 90), "tensor": ("", 80), "cluster": ("", 90)}


@pytest.fixture(autouse=True)
def library(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_TRICKS_LIBRARY", str(emulated.path))


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    most, capability = PATHS[request.param]
    if most:
        monkeypatch.setenv("ONNX_TRICKS_CUDA", most)
    monkeypatch.setenv("EMULATED_CAPABILITY", str(capability))
    return str(request.param)


def key_feeds(
    tokens: int = 1,
    past: int = 100,
    *,
    batch: int = 1,
    heads: int = 4,
    groups: int = 4,
    width: int = 16,
    rank: int = 8,
    rotary: int = 16,
    out: int = 16,
    without: tuple[str, ...] = (),
    norm: bool = False,
) -> dict[str, Array]:
    random = np.random.default_rng((tokens, past, heads, groups, width, rank, rotary))
    shapes = {
        "query": (batch, heads, tokens, width),
        "key": (batch, groups, tokens, width),
        "past_key": (batch, groups, past, width),
        "value_weight": (groups, groups * width + rank, out),
        "bias": (batch, 1, tokens, past + tokens),
        "residual": (batch, tokens, rank),
        "past_residual": (batch, past, rank),
        "key_bias": (groups, 1, width),
        "value_bias": (heads, 1, out),
    }
    feeds = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    if norm:
        feeds["key_gain"], feeds["key_shift"] = random.standard_normal((2, groups, 1, width))
    angles = random.uniform(0, 6, (batch, past + tokens, rotary // 2))
    feeds |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    without += ("residual", "past_residual") * (not rank) + ("cos", "sin") * (not rotary)
    return {name: array for name, array in feeds.items() if name not in without}


def hidden_feeds(
    tokens: int = 1,
    total: int = 101,
    *,
    cross: bool = False,
    batch: int = 1,
    heads: int = 4,
    groups: int = 4,
    width: int = 64,
    keys: int = 6,
    out: int = 16,
) -> dict[str, Array]:
    random = np.random.default_rng((tokens, total, heads, groups, width))
    shapes = {
        "query": (batch, heads, tokens, keys),
        "hidden": (batch, total if cross else tokens, width),
        "past_hidden": (batch, 0 if cross else total - tokens, width),
        "key_weight": (groups, keys, width),
        "value_weight": (groups, width, out),
        "bias": (1, heads, tokens, total),
        "value_bias": (heads, 1, out),
    }
    feeds = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    feeds["key_weight"] /= np.sqrt(width)
    return {n: a for n, a in feeds.items() if not (cross and n == "past_hidden")}


def expected(op_type: str, feeds: dict[str, Array], dtype: Any, cache: Any, **form: Any) -> Any:
    """In float64, from the numbers that the operator gets, new rows rounded as it rounds them."""

    def rounded(name: str, array: Array) -> Array:
        cached = "past" in name or (op_type, name) == ("SlimCrossAttention", "hidden")
        array = array.astype((cache if cached else dtype).numpy())
        if name in ("key", "residual", "hidden"):
            array = array.astype(cache.numpy())
        return array.astype(np.float64)

    feeds = {name: rounded(name, array) for name, array in feeds.items()}
    options: dict[str, Any] = {"scale": SCALE, "softcap": SOFTCAP * form.pop("softcap", False)}
    form.pop("safe", None)
    if op_type == "SlimAttention":
        return slim_attention(feeds, epsilon=EPSILON_OF_KEYS, **options, **form)
    return slim_hidden(feeds, **options, **form)


def check(op_type: str, feeds: dict[str, Array], dtype: Any, cache: Any, **form: Any) -> None:
    results = run_node(op_type, feeds, dtype=dtype, cache=cache, **form)
    wanted = expected(op_type, feeds, dtype, cache, **form)
    close(results[0], wanted[0], EPSILON[dtype])
    for ours, theirs in zip(results[1:], wanted[1:], strict=False):
        np.testing.assert_array_equal(ours.astype(np.float64), theirs)


def close(ours: Array, theirs: Array, epsilon: float) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= epsilon * np.abs(theirs).max()


def took(emulated: Emulated, path: str, cluster: int = 1) -> None:
    """Whether the kernels of a path were launched, and no others."""
    assert emulated.cluster() == (cluster if path == "cluster" else 1)
    assert ("Collect" in emulated.launches()) == (path != "plain")


@pytest.mark.parametrize(("dtype", "cache"), TYPES)
def test_keys_of_every_type_by_every_path(
    emulated: Emulated, path: str, dtype: Any, cache: Any
) -> None:
    emulated.launches()
    check("SlimAttention", key_feeds(batch=2), dtype, cache)
    took(emulated, "plain" if cache == FLOAT else path)


@pytest.mark.parametrize("op_type", ["SlimHiddenAttention", "SlimCrossAttention"])
@pytest.mark.parametrize(("dtype", "cache"), TYPES)
def test_states_of_every_type_by_every_path(
    emulated: Emulated, path: str, op_type: str, dtype: Any, cache: Any
) -> None:
    emulated.launches()
    feeds = hidden_feeds(cross=op_type == "SlimCrossAttention", batch=2, groups=2)
    check(op_type, feeds, dtype, cache, softcap=True)
    took(emulated, "plain" if cache == FLOAT else path)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [0, 16, 32])
def test_keys_are_rotated_in_part_and_either_way(
    emulated: Emulated, path: str, rotary: int, interleaved: bool
) -> None:
    feeds = key_feeds(2, rotary=rotary, width=32, groups=2)
    check("SlimAttention", feeds, FLOAT, HALF, interleaved=interleaved)
    took(emulated, path)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("norm", ["head", "heads"])
@pytest.mark.parametrize(
    ("tokens", "options", "cluster"),
    [
        (1, {}, 1),
        (2, {"groups": 2, "rotary": 0, "without": ("key_bias", "key_shift")}, 1),
        (1, {"heads": 11, "groups": 11, "width": 64, "without": ("key_gain",)}, 2),
        (40, {"rank": 0}, 1),
    ],
)
def test_keys_are_normalised_by_every_path(
    emulated: Emulated,
    path: str,
    tokens: int,
    options: dict[str, Any],
    cluster: int,
    norm: str,
    centered: bool,
) -> None:
    feeds = key_feeds(tokens, 130, norm=True, **options)
    emulated.cluster()
    for dtype in (FLOAT, HALF):
        check("SlimAttention", feeds, dtype, HALF, norm=norm, centered=centered)
        assert emulated.cluster() == (cluster if path == "cluster" else 1)


# Clusters of two, four and eight blocks; and more queries than one block takes.
@pytest.mark.parametrize(
    ("feeds", "cluster"),
    [
        (key_feeds(1, 130, heads=11, groups=11, width=64), 2),
        (key_feeds(1, 70, heads=40, groups=20, width=64, rank=24), 4),
        (key_feeds(1, 70, heads=5, groups=5, width=384, rank=0), 8),
        (hidden_feeds(2, 130, width=704), 2),
        (hidden_feeds(9, 70, width=1312), 4),
        (hidden_feeds(8, 60, width=2592), 8),
        (hidden_feeds(8, 200, batch=2, width=704), 2),
    ],
)
def test_blocks_of_a_cluster_share_the_columns(
    emulated: Emulated, path: str, feeds: dict[str, Array], cluster: int
) -> None:
    op_type = "SlimAttention" if "key" in feeds else "SlimHiddenAttention"
    emulated.launches()
    check(op_type, feeds, FLOAT, HALF)
    took(emulated, path, cluster)


def test_a_large_model_fits_a_cluster(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATED_CAPABILITY", "90")
    emulated.cluster()
    feeds = key_feeds(1, 140, heads=32, groups=32, width=128, rank=32, rotary=128)
    check("SlimAttention", feeds, FLOAT, HALF)
    assert emulated.cluster() == 8


# One row of the batch is split over all processors; each of four goes through all its tiles.
@pytest.mark.parametrize(
    ("total", "batch"), [(1, 1), (63, 1), (64, 1), (65, 1), (300, 1), (270, 4)]
)
def test_tokens_of_any_number_make_tiles_and_splits(path: str, total: int, batch: int) -> None:
    check("SlimAttention", key_feeds(1, total - 1, batch=batch), FLOAT, HALF)
    feeds = hidden_feeds(1, total, batch=batch, heads=3, groups=1)
    check("SlimHiddenAttention", feeds, FLOAT, HALF)


# Odd widths, which no vector of 16 bytes fits.
@pytest.mark.parametrize("tokens", [1, 9, 70])
@pytest.mark.parametrize(("dtype", "cache"), [(FLOAT, FLOAT), (FLOAT, HALF)])
def test_odd_widths_and_prompts(tokens: int, dtype: Any, cache: Any) -> None:
    feeds = key_feeds(tokens, 13, batch=3, groups=2, width=6, rank=3, rotary=4, out=5)
    check("SlimAttention", feeds, dtype, cache, interleaved=True)
    feeds = hidden_feeds(tokens, 83, batch=2, heads=6, groups=3, width=9, out=5)
    check("SlimHiddenAttention", feeds, dtype, cache)


def test_a_prompt_is_masked_by_its_bias(path: str) -> None:
    for tokens in 4, 40:
        feeds = key_feeds(tokens, 70, without=("key_bias", "value_bias"))
        feeds["bias"] = np.triu(np.full((tokens, 70 + tokens), -np.inf), 71)
        check_prompt("SlimAttention", feeds, HALF)


def prompt(op_type: str, tokens: int, other: int, form: dict[str, Any], **options: Any) -> Any:
    feeds = key_feeds if op_type == "SlimAttention" else hidden_feeds
    return op_type, feeds(tokens, other, **options), form


PROMPTS = {
    "several blocks of queries": prompt("SlimAttention", 140, 3, {}),
    "more chunks than one": prompt("SlimAttention", 40, 70, {}, batch=3),
    "heads that share keys": prompt("SlimAttention", 70, 5, {}, groups=2),
    "turned in part": prompt("SlimAttention", 50, 9, {}, width=24, rotary=8),
    "interleaved": prompt("SlimAttention", 50, 9, {"interleaved": True}),
    "softened": prompt("SlimAttention", 50, 9, {"softcap": True}, rotary=0),
    "normalised": prompt("SlimAttention", 50, 9, {"norm": "heads", "centered": True}, norm=True),
    "no terms": prompt("SlimAttention", 33, 0, {}, without=("bias", "value_bias", "key_bias")),
    "keys alone": prompt("SlimAttention", 33, 0, {}, rank=0, rotary=0),
    "96 channels": prompt("SlimAttention", 90, 20, {}, width=80, heads=2, groups=2, out=96),
    "128 channels": prompt("SlimAttention", 50, 20, {}, width=104, heads=2, groups=2),
    "256 channels": prompt("SlimAttention", 90, 20, {}, heads=2, groups=1, width=136, out=40),
    "hidden": prompt("SlimHiddenAttention", 80, 150, {}, keys=8, batch=2),
    "shared": prompt("SlimHiddenAttention", 80, 90, {"softcap": True}, keys=16, groups=2, out=72),
    "encoder": prompt("SlimCrossAttention", 70, 200, {}, keys=8, cross=True),
}


def check_prompt(op_type: str, feeds: dict[str, Array], dtype: Any, **form: Any) -> None:
    """The project's rule: at most twice the error of attention that rounds to its type."""

    def rounded(array: Array) -> Array:
        return array.astype(dtype.numpy()).astype(np.float64)

    ours, *_ = run_node(op_type, feeds, dtype=dtype, cache=dtype, **form)
    exact, *_ = expected(op_type, feeds, dtype, dtype, **form)
    theirs, *_ = expected(op_type, feeds, dtype, dtype, rounded=rounded, **form)
    assert np.abs(ours - exact).max() <= 2 * np.abs(rounded(theirs) - exact).max()


@pytest.mark.parametrize("dtype", [HALF, BRIEF])
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_of_16_bits_are_computed_by_tensor_cores(
    emulated: Emulated, name: str, dtype: Any
) -> None:
    op_type, feeds, form = PROMPTS[name]
    emulated.launches()
    check_prompt(op_type, feeds, dtype, **form)
    launched = emulated.launches()
    assert "Prompt" in launched
    assert "softmax" not in launched
    assert "write_output" not in launched


def test_prompts_can_be_held_back(emulated: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_TRICKS_CUDA", "plain")
    emulated.launches()
    check("SlimAttention", key_feeds(40), HALF, HALF)
    assert "Prompt" not in emulated.launches()


@pytest.mark.parametrize("masked", [-np.inf, float(np.finfo(np.float16).min)])
def test_what_a_prompt_may_not_see_is_not_seen(masked: float) -> None:
    tokens, past = 150, 40
    feeds = key_feeds(tokens, past, heads=2, groups=2)
    feeds["bias"] = np.triu(np.full((tokens, past + tokens), masked), past + 1)
    check_prompt("SlimAttention", feeds, HALF)


def test_small_shares_of_a_long_context_are_kept(path: str) -> None:
    """Equal weights of many tokens: a share of one is no normal number of 16 bits."""
    feeds = hidden_feeds(1, 40_000, cross=True, heads=1, groups=1, width=32, out=8)
    feeds["query"] *= 0
    feeds["hidden"] = np.abs(feeds["hidden"])
    check("SlimCrossAttention", feeds, HALF, HALF)


def test_an_empty_past_is_fine(path: str) -> None:
    check("SlimAttention", key_feeds(3, 0, without=("bias",)), FLOAT, HALF)


@pytest.mark.parametrize(("tokens", "dtype"), [(2, FLOAT), (70, HALF)])
def test_rows_without_anything_to_attend_to(path: str, tokens: int, dtype: Any) -> None:
    feeds = key_feeds(tokens, 70)
    feeds["bias"][:, :, 1] = -np.inf
    safe, *_ = run_node("SlimAttention", feeds, dtype=dtype, cache=HALF, safe=True)
    unsafe, *_ = run_node("SlimAttention", feeds, dtype=dtype, cache=HALF)
    assert (safe[:, 1] == 0).all()
    assert np.isnan(unsafe[:, 1]).all()
    np.testing.assert_array_equal(safe[:, 0], unsafe[:, 0])
    assert np.isfinite(safe[:, 0]).all()


def test_no_states_at_all_give_the_bias(path: str) -> None:
    feeds = hidden_feeds(2, 0, cross=True)
    output, *_ = run_node("SlimCrossAttention", feeds, dtype=FLOAT, cache=HALF)
    wanted = np.broadcast_to(feeds["value_bias"].astype(np.float32).reshape(-1), output.shape)
    np.testing.assert_array_equal(output, wanted)


def test_large_scores_and_weights_keep_within_range(path: str) -> None:
    feeds = hidden_feeds(1, 70)
    feeds["query"] *= 1e6
    check("SlimHiddenAttention", feeds, FLOAT, HALF, softcap=True)


@pytest.mark.parametrize("tokens", [1, 3])
def test_rows_are_appended_where_past_and_present_are_one(path: str, tokens: int) -> None:
    feeds = key_feeds(tokens, 70, batch=2, rank=0)
    output, present = run_node("SlimAttention", feeds, dtype=FLOAT, cache=HALF)
    # Rows behind those in use hold anything.
    buffer = np.full((2, 4, 90, 16), np.nan)
    buffer[:, :, :70] = feeds["past_key"]
    feeds["past_key"] = buffer
    ours, buffer = run_node("SlimAttention", feeds, dtype=FLOAT, cache=HALF, in_place=True)
    np.testing.assert_array_equal(ours, output)
    np.testing.assert_array_equal(buffer[:, :, : 70 + tokens], present)
    assert np.isnan(buffer[:, :, 70 + tokens :]).all()
