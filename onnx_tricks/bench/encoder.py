"""What an encoder hands over to the decoder that is timed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnx_tricks.bench.files import ENCODED, Files, is_crossed
from onnx_tricks.bench.workload import Settings
from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.runtime.sessions import Array, Session, SessionError
from onnx_tricks.verify.plans import prompts

__all__ = ["encode", "encoder_inputs"]

_FILE = "encoder_model.onnx"
_POSITIONS = 1500  # where neither a file nor the caller says how many


def encode(sides: Sequence[Files], positions: int | None) -> tuple[int, Array | None]:
    """Run the encoder beside one of the decoders, on one row.

    Args:
        sides: The models that are compared.
        positions: How many its output is to have; None for as many as it has.

    Returns:
        The number of positions, 0 where no model reads any; and the encoder's output [1, S, D],
        None where there is no encoder.
    """
    crossed = [side for side in sides if side.crossed]
    if not crossed:
        return 0, None
    for side in crossed:
        path = side.paths[0].with_name(_FILE)
        states = _run(path, positions or _POSITIONS) if path.is_file() else None
        if states is not None:
            length = positions or states.shape[1]
            return length, np.take(states, np.arange(length) % states.shape[1], axis=1)
    fixed = [one.dims[1] for side in crossed for one in side.inputs.values() if one.name == ENCODED]
    return positions or next((n for n in fixed if isinstance(n, int)), _POSITIONS), None


def encoder_inputs(files: Files, settings: Settings, states: Array | None) -> dict[str, Array]:
    """The inputs that come from an encoder, for one row.

    Args:
        files: The model that takes them.
        settings: Among them the number of positions.
        states: The encoder's output; random numbers when None.
    """
    given: dict[str, Array] = {}
    for one in filter(is_crossed, files.inputs.values()):
        if one.role == "mask":
            given[one.name] = np.ones((1, settings.encoder), np.int64)
        elif one.name == ENCODED:
            shape = (1, settings.encoder, *(d for d in one.dims[2:] if isinstance(d, int)))
            random = np.random.default_rng(0).standard_normal(shape, np.float32)
            given[one.name] = (random if states is None else states).astype(one.dtype.numpy())
    return given


def _run(path: Path, tokens: int) -> Array | None:
    """The first output of an encoder, if it runs on any inputs that can be made for it."""
    session = Session(path)
    interface = read_interface(load_model(path).model)
    for case in prompts(interface, lambda *_: None, 1, tokens):
        try:
            return next(iter(session.run(case.steps[0].feeds).values()))
        except SessionError:
            continue
    return None
