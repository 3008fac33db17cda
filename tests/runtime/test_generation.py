"""Writing on from prompts."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_tricks.errors import UsageError
from onnx_tricks.runtime import Decoder, Sampling, generate
from onnx_tricks.runtime.generation import _Sampler
from tests.runtime.conftest import Slim

PROMPT = np.frombuffer(b'def main(argv):\n    """Read a file."""\n', np.uint8)[None].astype(int)


@pytest.fixture(scope="module")
def decoder(slim: Slim) -> Decoder:
    return Decoder(slim("demo")[1])


def test_a_slim_model_writes_the_same_200_tokens(slim: Slim, decoder: Decoder) -> None:
    original = generate(slim("demo")[0], PROMPT, max_new_tokens=200)
    assert original.shape == (1, 200)
    assert len(np.unique(original)) > 10
    np.testing.assert_array_equal(generate(decoder, PROMPT, max_new_tokens=200), original)


def test_rows_of_a_padded_batch_are_written_as_if_alone(decoder: Decoder) -> None:
    lengths = (PROMPT.shape[1], 20, 7)
    batch = np.zeros((3, PROMPT.shape[1]), dtype=int)
    mask = np.zeros_like(batch)
    for row, length in enumerate(lengths):
        batch[row, -length:] = PROMPT[0, :length]
        mask[row, -length:] = 1
    together = generate(decoder, batch, mask=mask, max_new_tokens=40)
    for row, length in enumerate(lengths):
        alone = generate(decoder, PROMPT[:, :length], max_new_tokens=40)
        np.testing.assert_array_equal(together[row], alone[0])


def test_a_row_ends_with_its_end_token_and_all_rows_end_the_run(decoder: Decoder) -> None:
    prompts = np.stack([PROMPT[0, -20:], PROMPT[0, :20]])
    free = generate(decoder, prompts, max_new_tokens=40)
    ends = [free[0, 12], free[1, 7]]
    stops = [int(np.argmax(np.isin(row, ends))) for row in free]
    ended = generate(decoder, prompts, max_new_tokens=40, eos=ends, pad=1)
    assert ended.shape == (2, max(stops) + 1)
    for row, stop in enumerate(stops):
        np.testing.assert_array_equal(ended[row, : stop + 1], free[row, : stop + 1])
        assert (ended[row, stop + 1 :] == 1).all()


def test_a_decoder_with_an_encoder_writes_on_from_its_states(slim: Slim) -> None:
    random = np.random.default_rng(0)
    mask = np.ones((2, 9))
    mask[1, 5:] = 0
    given = {
        "encoder_hidden_states": random.standard_normal((2, 9, 48)),
        "encoder_attention_mask": mask,
    }
    written = [generate(folder, [[0], [0]], max_new_tokens=24, **given) for folder in slim("t5")]
    assert len(np.unique(written[0])) > 3
    np.testing.assert_array_equal(*written)


def test_sampling_follows_its_seed_and_can_be_greedy(decoder: Decoder) -> None:
    def write(sampling: Sampling | None) -> list[int]:
        return generate(decoder, PROMPT, max_new_tokens=30, sampling=sampling)[0].tolist()

    assert write(Sampling(seed=1)) == write(Sampling(seed=1)) != write(Sampling(seed=2))
    assert write(Sampling(top_k=1)) == write(Sampling(top_p=1e-9)) == write(None)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (Sampling(temperature=2.0), [0, 1, 2, 3]),
        (Sampling(top_k=2), [1, 2]),
        (Sampling(top_p=0.6), [1, 2]),
        (Sampling(top_p=0.5), [1]),
        (Sampling(temperature=4.0, top_k=3, top_p=0.7), [1, 2]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(
    how: Sampling, kept: list[int]
) -> None:
    probabilities = np.array([0.08, 0.55, 0.3, 0.07])
    count = 40_000
    drawn = _Sampler(how)(np.tile(np.log(probabilities), (count, 1)))
    expected = np.zeros(4)
    expected[kept] = probabilities[kept] ** (1 / how.temperature)
    expected /= expected.sum()
    found = np.bincount(drawn, minlength=4) / count
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / count))


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}])
def test_impossible_sampling_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_padding_on_the_right_is_refused(decoder: Decoder) -> None:
    with pytest.raises(UsageError, match="on the left"):
        generate(decoder, [[1, 2, 0]], mask=[[1, 1, 0]])
