"""A spoken sentence, as Whisper hears it and as a decoder is asked to write it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import WhisperFeatureExtractor

from onnx_tricks.graph.interface import Interface
from onnx_tricks.runtime.sessions import Array, Session
from onnx_tricks.verify.cases import Case, Step

_UTTERANCE = Path(__file__).with_name("utterance.npz")
_START = 50257


def features(rows: int) -> Array:
    """The sentence, `rows` times a little later and more softly: [rows, 80, 3000]."""
    samples = np.load(_UTTERANCE)["samples"].astype(np.float32) / 128
    later = [np.pad(samples, (400 * row, 0)) * (1 - 0.05 * row) for row in range(rows)]
    found = WhisperFeatureExtractor()(later, sampling_rate=16000, return_tensors="np")
    return np.asarray(found.input_features)


def encoder_states(folder: Path, rows: int) -> Array:
    """What the encoder of an export makes of the sentence, [rows, 1500, D]."""
    session = Session(folder / "encoder_model.onnx")
    (states,) = session.run({"input_features": features(rows)}).values()
    return states


def spoken_case(interface: Interface, states: Array, tokens: Array) -> Case:
    """The start token as prompt, then the tokens of a transcript one by one.

    Args:
        interface: That of the decoder.
        states: [B, 1500, D].
        tokens: [B, T].
    """
    rows = len(states)
    ids = np.concatenate([np.full((rows, 1), _START), tokens], axis=1)
    steps = []
    for step in range(ids.shape[1]):
        feeds = {
            "input_ids": ids[:, step : step + 1],
            "encoder_hidden_states": states,
            "use_cache_branch": np.array([step > 0]),
        }
        wanted = {value.name for value in interface.inputs}
        valid = np.ones((rows, step + 1), dtype=bool)
        steps.append(Step({n: a for n, a in feeds.items() if n in wanted}, valid, 1))
    return Case("speech", rows, interface.empty_caches(rows), tuple(steps))


def greedy(decoder: Path, states: Array, length: int = 25) -> Array:
    """What a decoder writes, with nothing but ONNX Runtime; whatever caches there are go round."""
    import onnxruntime

    session = onnxruntime.InferenceSession(decoder, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), [output.name for output in session.get_outputs()]
    feeds: dict[str, Array] = {"encoder_hidden_states": states}
    for one in inputs:
        if one.name.startswith("past_key_values"):
            shape = [len(states), *(dim if isinstance(dim, int) else 0 for dim in one.shape[1:])]
            feeds[one.name] = np.zeros(shape, states.dtype)
    tokens = np.full((len(states), 1), _START)
    for step in range(length):
        feeds["input_ids"] = tokens[:, -1:]
        feeds["use_cache_branch"] = np.array([step > 0])
        results = session.run(None, {one.name: feeds[one.name] for one in inputs})
        tokens = np.concatenate([tokens, results[0][:, -1:].argmax(axis=-1)], axis=1)
        for name, value in zip(outputs[1:], results[1:], strict=True):
            if step == 0 or ".encoder." not in name:
                feeds[name.replace("present", "past_key_values")] = value
    return tokens[:, 1:]
