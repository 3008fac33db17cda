"""Every figure that the papers publish, from the dimensions of the models alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from onnx_tricks.inspect.cost import (
    Change,
    Refusal,
    first_layer,
    merge_skipless,
    precompute_first_layer,
    shrink_weights,
    slim_attention,
)
from onnx_tricks.inspect.dimensions import Dimensions
from onnx_tricks.inspect.from_config import read_config

CONFIGS = Path(__file__).parent / "configs"
WHISPER = ("tiny", "base", "small", "medium", "large")


def dimensions(name: str) -> Dimensions:
    return read_config(CONFIGS / f"{name}.json")


def pythia() -> Dimensions:
    return dimensions("pythia-6.9b")


def mistral() -> Dimensions:
    return dimensions("mistral-7b")


def parallel_mixtral() -> Dimensions:
    """The paper's hypothetical Mixtral, whose attention and experts read the same input."""
    return dataclasses.replace(dimensions("mixtral-8x7b"), parallel=True)


def change(found: Change | Refusal) -> Change:
    assert isinstance(found, Change)
    return found


@pytest.mark.parametrize(
    ("dims", "billions", "layer"),
    [
        (pythia(), "6.9", (33_554_432, 33_554_432, 134_217_728)),
        (mistral(), "7.2", (33_554_432, 8_388_608, 176_160_768)),
        (dimensions("mixtral-8x7b"), "46.7", (33_554_432, 8_388_608, 1_409_286_144)),
    ],
)
def test_weights_are_counted_as_in_2402_13388(dims, billions, layer) -> None:
    assert (dims.query_output_weights, dims.key_value_weights, dims.ffn_weights) == layer
    assert f"{dims.parameters / 1e9:.1f}" == billions


@pytest.mark.parametrize(
    ("dims", "removed", "added", "reads", "factors", "percent"),
    [
        (pythia(), 184_549_376, 619_315_200, (184_553_472, 16_384), (11_264, 704, 44, 11), 6),
        (mistral(), 25_165_824, 196_608_000, (25_169_920, 10_240), (2_458, 154, 10, 3), 2),
        (
            parallel_mixtral(),
            1_434_451_968,
            196_608_000,
            (1_434_456_064, 10_240),
            (140_084, 8_756, 548, 137),
            -3,
        ),
    ],
)
def test_the_first_layer_is_counted_as_in_2402_13388(
    dims, removed, added, reads, factors, percent
) -> None:
    found = change(precompute_first_layer(dims))
    assert (found.removed, found.added) == (removed, added)
    assert first_layer(dims, 1) == reads
    for batch, factor in zip((1, 16, 256, 1024), factors, strict=True):
        before, after = first_layer(dims, batch)
        assert round(before / after) == factor
    assert round(100 * (added - removed) / dims.parameters) == percent


def test_the_first_layer_grows_and_shrinks_memory_as_in_2402_13388() -> None:
    grown = [
        found.added - found.removed
        for found in map(change, map(precompute_first_layer, (pythia(), mistral())))
    ]
    assert grown == [434_765_824, 171_442_176]
    mixtral = change(precompute_first_layer(parallel_mixtral()))
    assert mixtral.added - mixtral.removed == -1_237_843_968


# arXiv:2503.05840, the table of the Whisper models, in millions of values.
PUBLISHED_WHISPER = {
    "encoder output": "0.6 0.8 1.2 1.5 1.9",
    "cross cache": "4.6 9.2 27.6 73.7 122.9",
    "self cache": "1.4 2.8 8.3 22.0 36.7",
    "baseline cache": "6.0 12.0 35.9 95.7 159.6",
    "option 1 cache": "3.0 6.0 18.0 47.9 79.8",
    "option 2 cache": "0.7 1.4 4.1 11.0 18.4",
    "baseline weights": "28.2 48.6 138.9 405.4 800.4",
    "option 1 weights": "28.8 50.1 146.0 430.6 852.8",
    "option 2 weights": "29.4 51.7 153.1 455.8 905.2",
    "baseline at batch 1": "34.2 60.5 174.8 501.2 960.0",
    "option 1 at batch 1": "31.8 56.1 164.0 478.5 932.6",
    "option 2 at batch 1": "30.0 53.1 157.2 466.8 923.6",
    "baseline at batch 64": "6.4 12.7 38.1 102.1 172.1",
    "option 1 at batch 64": "3.4 6.8 20.2 54.6 93.1",
    "option 2 at batch 64": "1.1 2.2 6.5 18.1 32.5",
    "option 1 speed-up at batch 1": "1.08 1.08 1.07 1.05 1.03",
    "option 2 speed-up at batch 1": "1.14 1.14 1.11 1.07 1.04",
    "option 1 speed-up at batch 64": "1.9 1.9 1.9 1.9 1.8",
    "option 2 speed-up at batch 64": "5.6 5.8 5.8 5.6 5.3",
    "option 2 savings": "8.7 8.7 8.7 8.7 8.7",
}
WHISPER_CASES = [
    (key, size, figure)
    for key, figures in PUBLISHED_WHISPER.items()
    for size, figure in zip(WHISPER, figures.split(), strict=True)
]


def whisper_figures(size: str) -> dict[str, float]:
    """Our figures under the paper's names; the rows of the embedding are not in the paper's."""
    dims = dimensions(f"whisper-{size}")
    assert dims.encoder is not None
    assert dims.encoder.tokens is not None
    traffic = {"baseline": dims.traffic}
    for name, cross in (("option 1", "keys"), ("option 2", "encoder")):
        traffic[name] = change(slim_attention(dims, cross)).applied_to(dims.traffic, dims)
    million = 1e6
    found = {
        "encoder output": dims.encoder.tokens * dims.width / million,
        "cross cache": dims.traffic.cache(448, "cross").values / million,
        "self cache": dims.traffic.cache(448, "self").values / million,
    }
    for name, reads in traffic.items():
        found[f"{name} cache"] = reads.cache(448).values / million
        found[f"{name} weights"] = reads.weights.values / million
        for batch in (1, 64):
            step = reads.per_step(batch, 448).values / batch - dims.width
            found[f"{name} at batch {batch}"] = step / million
            before = found[f"baseline at batch {batch}"]
            found[f"{name} speed-up at batch {batch}"] = before / (step / million)
    found["option 2 savings"] = found["baseline cache"] / found["option 2 cache"]
    return found


@pytest.mark.parametrize(("key", "size", "figure"), WHISPER_CASES)
def test_whisper_is_counted_as_in_2503_05840(key: str, size: str, figure: str) -> None:
    found = whisper_figures(size)[key]
    decimals = len(figure.partition(".")[2])
    assert f"{found:.{decimals}f}" == figure


@pytest.mark.parametrize(("size", "factor"), [("tiny", "4.7"), ("large", "7.9")])
def test_the_encoder_output_itself_takes_its_share(size: str, factor: str) -> None:
    found = whisper_figures(size)
    ours = found["baseline cache"] / (found["option 2 cache"] + found["encoder output"])
    assert f"{ours:.1f}" == factor


@pytest.mark.parametrize(("size", "factor"), [("3b", 8), ("11b", 32)])
def test_t5_caches_its_input_in_place_of_keys_and_values(size: str, factor: int) -> None:
    dims = dimensions(f"t5-{size}")
    after = change(slim_attention(dims)).applied_to(dims.traffic, dims)
    before = dims.traffic.cache_per_token("self").values
    assert before == factor * after.cache_per_token("self").values
    assert after.cache_per_token("cross").values == 0


def test_phi_3_mini_128k_is_counted_as_in_2503_05840() -> None:
    dims = dataclasses.replace(dimensions("phi-3-mini-128k"), weight_bytes=1, cache_bytes=1)
    slim = change(slim_attention(dims)).applied_to(dims.traffic, dims)
    # The paper adds figures that it has rounded: 3.8 GB of weights, 25 GB of cache for 128,000.
    weights = round(dims.parameters / 1e9, 1)
    caches = [traffic.cache(128_000).bytes / 1e9 for traffic in (dims.traffic, slim)]
    assert (weights, round(caches[0])) == (3.8, 25)
    assert caches[0] == 2 * caches[1]
    assert (weights + 25, weights + 25 / 2) == (28.8, 16.3)
    for batch, speedup in ((1, "1.8"), (16, "2.0")):
        before, after = (one.per_step(batch, 131_072).bytes for one in (dims.traffic, slim))
        assert f"{before / after:.1f}" == speedup


def test_wide_keys_with_rotation_need_a_larger_matrix() -> None:
    dims = dimensions("codegemma-7b")
    found = change(slim_attention(dims))
    assert found.added == found.read == 28 * (4096 * 4096 - 3072 * 4096)
    after = found.applied_to(dims.traffic, dims).cache_per_token("self").values
    assert dims.traffic.cache_per_token("self").values == 2 * after


@pytest.mark.parametrize(
    ("dims", "left", "percent", "speedup"),
    [(pythia(), "5.8", 16, "1.19"), (mistral(), "6.2", 15, "1.17")],
)
def test_skipless_models_are_counted_as_in_2404_12362(dims, left, percent, speedup) -> None:
    found = merge_skipless(dims)
    assert isinstance(found, Refusal)
    assert found.otherwise is not None
    removed = found.otherwise.removed
    assert removed == 32 * 33_554_432
    assert f"{(dims.parameters - removed) / 1e9:.1f}" == left
    assert round(100 * removed / dims.parameters) == percent
    assert f"{dims.parameters / (dims.parameters - removed):.2f}" == speedup


@pytest.mark.parametrize(
    ("name", "millions", "percent"),
    [
        ("whisper-tiny", "0.025", (17,)),
        ("codegemma-7b", "1.049", (8,)),
        ("t5-3b", "0.524", (12,)),
        ("t5-11b", "2.097", (12, 13)),  # 12.5, which the draft rounds once down and once up
    ],
)
def test_shrunk_value_projections_are_counted_as_in_the_draft(name, millions, percent) -> None:
    dims = dimensions(name)
    # Rotation between them keeps queries and keys as they are, so that the values remain.
    attention = dataclasses.replace(dims.attention, position="rope")
    found = change(shrink_weights(dataclasses.replace(dims, attention=attention)))
    layer = found.removed / dims.attention_layers
    assert f"{layer / 1e6:.3f}" == millions
    assert round(100 * layer / (dims.key_value_weights / 2)) in percent
