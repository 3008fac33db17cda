"""Steps of a decoder: what stays in its caches is what it was shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_tricks.errors import ModelError, UsageError
from onnx_tricks.runtime import Decoder
from onnx_tricks.runtime.sessions import Session, SessionError, read_value, session_options
from tests import toys
from tests.conftest import Export
from tests.runtime.conftest import Slim

TEXT = np.frombuffer(b"def main(argv):\n    return 1", np.uint8)[None].astype(np.int64)


@pytest.mark.parametrize("name", ["demo", "mgm"])
def test_steps_compute_what_one_run_over_the_whole_text_computes(name: str, slim: Slim) -> None:
    original, small = map(Decoder, slim(name))
    whole = original.step(TEXT)
    parts = np.split(TEXT, [11, 12, 20], axis=1)
    stepped = np.concatenate([small.step(part) for part in parts], axis=1)
    assert small.length == TEXT.shape[1]
    np.testing.assert_allclose(stepped, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_padding_on_the_left_changes_nothing(slim: Slim) -> None:
    decoder = Decoder(slim("demo")[1])
    alone = decoder.step(TEXT)
    decoder.reset()
    padded, mask = (np.pad(a, ((0, 0), (5, 0))) for a in (TEXT, np.ones_like(TEXT)))
    rest = decoder.step(padded, mask)[:, 5:]
    np.testing.assert_allclose(rest, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("cache_dtype", ["auto", "bf16"])
def test_reordering_goes_on_with_the_chosen_rows(cache_dtype: str, slim: Slim) -> None:
    decoder = Decoder(slim("demo", cache_dtype)[1])
    prompts = np.stack([TEXT[0], TEXT[0, ::-1], np.roll(TEXT[0], 3)])
    mask = np.ones_like(prompts)
    mask[1, :4] = 0
    rows = [2, 1, 1, 0]
    decoder.step(prompts, mask)
    decoder.reorder(rows)
    reordered = decoder.step(np.full((4, 1), 40))
    decoder.reset()
    decoder.step(prompts[rows], mask[rows])
    np.testing.assert_array_equal(reordered, decoder.step(np.full((4, 1), 40)))


def test_an_exported_decoder_with_cross_caches_runs_too(export: Export) -> None:
    folder = export("t5")
    random = np.random.default_rng(0)
    given = {
        "encoder_hidden_states": random.standard_normal((2, 9, 48)),
        "encoder_attention_mask": np.ones((2, 9)),
    }
    tokens = random.integers(0, 97, (2, 6))
    whole = Decoder(folder).step(tokens, **given)
    decoder = Decoder(folder)
    first = decoder.step(tokens[:, :4], **given)
    steps = [decoder.step(tokens[:, [at]]) for at in (4, 5)]
    np.testing.assert_allclose(np.concatenate([first, *steps], axis=1), whole, atol=1e-5)


def test_a_prompt_in_one_file_and_steps_in_another_compute_the_same(
    export: Export, tmp_path: Path
) -> None:
    merged = export("t5")
    for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        (tmp_path / name).symlink_to(merged / name)
    random = np.random.default_rng(0)
    given = {
        "encoder_hidden_states": random.standard_normal((2, 9, 48)),
        "encoder_attention_mask": np.ones((2, 9)),
    }
    tokens = random.integers(0, 97, (2, 6))
    one, two = Decoder(merged), Decoder(tmp_path)
    for part in np.split(tokens, [4, 5], axis=1):
        expected, found = (decoder.step(part, **given) for decoder in (one, two))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert two.length == tokens.shape[1]


def test_a_fork_goes_on_by_itself(slim: Slim) -> None:
    decoder = Decoder(slim("demo")[1])
    decoder.step(TEXT[:, :9])
    fork = decoder.fork()
    expected = fork.step(TEXT[:, 9:])
    assert (decoder.length, fork.length) == (9, TEXT.shape[1])
    np.testing.assert_array_equal(decoder.step(TEXT[:, 9:]), expected)


@pytest.mark.parametrize("cache_dtype", ["auto", "bf16"])
def test_given_caches_stand_in_for_a_prompt(cache_dtype: str, slim: Slim) -> None:
    # With options of one's own, caches are no buffers with room behind the tokens.
    decoder = Decoder(slim("demo", cache_dtype)[1], options=session_options())
    decoder.step(TEXT[:, :9])
    caches = {name: read_value(value) for name, value in decoder._caches.items()}
    expected = decoder.step(TEXT[:, 9:])
    decoder.resume(caches, np.ones((1, 9)))
    np.testing.assert_array_equal(decoder.step(TEXT[:, 9:]), expected)
    assert decoder.seconds > 0


def test_what_is_missing_unknown_or_misshapen_is_named(export: Export, slim: Slim) -> None:
    decoder = Decoder(export("t5"))
    with pytest.raises(UsageError, match="needs a value for its input encoder_attention_mask"):
        decoder.step([[1]], encoder_hidden_states=np.zeros((1, 2, 48)))
    with pytest.raises(UsageError, match="no input 'encoder_states'; its inputs are"):
        decoder.step([[1]], encoder_states=np.zeros((1, 2, 48)))
    decoder = Decoder(slim("demo")[1])
    with pytest.raises(UsageError, match=r"\[B, T\]"):
        decoder.step([1, 2, 3])
    decoder.step([[1, 2, 3]])
    with pytest.raises(UsageError, match="2 rows of tokens, but 1 in the caches"):
        decoder.step([[1], [2]])


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the folder holds none of"):
        Decoder(tmp_path)
    onnx.save(toys.model("y = MatMul(x, w)"), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="no input takes token ids"):
        Decoder(tmp_path)


@pytest.mark.parametrize("library", ["off", "installed"])
def test_a_mask_of_the_new_tokens_alone_is_refused_and_not_broadcast(
    library: str, slim: Slim, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library == "off":
        monkeypatch.setenv("ONNX_TRICKS_LIBRARY", library)
    session = Session(slim("demo")[1] / "model.onnx")
    past = {
        name: np.zeros([1, 6, 9, 32] if name.endswith("key") else [1, 9, 32], np.float32)
        for name in session.inputs
        if name.startswith("past")
    }
    feeds = {"input_ids": [[97]], "position_ids": [[9]], **past}
    session.run({**feeds, "attention_mask": np.ones((1, 10))})
    with pytest.raises(SessionError):
        session.run({**feeds, "attention_mask": np.ones((1, 1))})
