"""Caches as buffers that the native operators append to in place."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_tricks.runtime.decoder import Decoder
from onnx_tricks.runtime.generation import generate
from onnx_tricks.runtime.library import find_library
from onnx_tricks.runtime.sessions import session_options
from tests.runtime.conftest import Slim

TEXT = np.frombuffer(b'def main(argv):\n    """Read the file and print."""\n', np.uint8)[None]
KEY = "past_key_values.0.key"

pytestmark = pytest.mark.skipif(find_library() is None, reason="the library was not built")


def _shape(decoder: Decoder, name: str = KEY) -> list[int]:
    shape: list[int] = decoder._caches[name].shape()
    return shape


def test_a_reserved_buffer_stays_where_it_is(slim: Slim) -> None:
    decoder = Decoder(slim("demo")[1])
    decoder.reserve(TEXT.shape[1] + 3)
    decoder.step(TEXT)
    place = decoder._caches[KEY].data_ptr()
    for _ in range(3):
        decoder.step([[97]])
    assert decoder._caches[KEY].data_ptr() == place
    assert _shape(decoder) == [1, 6, TEXT.shape[1] + 3, 32]


def test_a_buffer_that_is_full_grows_with_what_is_in_it(slim: Slim) -> None:
    folder = slim("demo")[1]
    whole, grown = Decoder(folder, options=session_options()), Decoder(folder)
    expected = whole.step(TEXT)[:, -1]
    for token in TEXT[0]:
        found = grown.step([[token]])[:, -1]
    assert TEXT.shape[1] <= _shape(grown)[2] < 1.5 * TEXT.shape[1]
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_rows_with_padding_are_written_on_as_by_the_original(slim: Slim) -> None:
    tokens, mask = TEXT.repeat(2, axis=0), np.ones((2, TEXT.shape[1]), np.int64)
    mask[1, :9] = 0
    for name in ("demo", "mgm"):
        given = tokens if name == "demo" else tokens % 64
        wrote = [generate(one, given, mask=mask, max_new_tokens=24) for one in slim(name)]
        np.testing.assert_array_equal(*wrote)


def test_a_fork_does_not_write_into_the_buffer_of_the_other(slim: Slim) -> None:
    one = Decoder(slim("demo")[1])
    one.reserve(200)
    one.step(TEXT)
    other = one.fork()
    one.step([[97]])
    expected = one.step([[98]])
    other.step([[120]])
    other.step([[121]])
    one.reset()
    one.step(TEXT)
    one.step([[97]])
    np.testing.assert_allclose(one.step([[98]]), expected, atol=1e-5)


def test_beams_take_their_buffers_along(slim: Slim) -> None:
    folder = slim("demo")[1]
    buffered, plain = Decoder(folder), Decoder(folder, options=session_options())
    assert plain._buffers.inputs == {}
    results = []
    for decoder in (buffered, plain):
        decoder.step(np.concatenate([TEXT, TEXT[:, ::-1]]))
        decoder.reorder([1, 1, 0])
        results.append(decoder.step([[97], [98], [99]]))
    np.testing.assert_allclose(*results, atol=1e-4)
