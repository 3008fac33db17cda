"""What other files of an export compute for a model: encoder states, filled caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from onnx_tricks.graph.interface import read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.runtime.sessions import Array, Session, SessionError
from onnx_tricks.verify.decoding import decode
from onnx_tricks.verify.plans import plans

__all__ = ["Siblings"]

# Attention to an encoder is the same function at every length; a short one is quicker.
_ENCODER_POSITIONS = 64
_PAST = "past_key_values."


class Siblings:
    """Runs the files beside a model, each once.

    Args:
        path: The .onnx file whose inputs are wanted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outputs: dict[str, dict[str, Array]] = {}

    def __call__(self, name: str, batch: int) -> Array | None:
        """Return a value for an input, or None where no file beside the model computes it.

        Args:
            name: The name of the input.
            batch: The number of rows.
        """
        value = None
        if name == "encoder_hidden_states":
            value = self._run("encoder_model.onnx").get("last_hidden_state")
            value = None if value is None else value[:, :_ENCODER_POSITIONS]
        elif name.startswith(_PAST) and self._path.name == "decoder_with_past_model.onnx":
            value = self._run("decoder_model.onnx").get(name.replace(_PAST, "present."))
        return None if value is None else np.resize(value, (batch, *value.shape[1:]))

    def _run(self, file: str) -> dict[str, Array]:
        path = self._path.with_name(file)
        if file == self._path.name or not path.is_file():
            return {}
        if file not in self._outputs:
            self._outputs[file] = _first_outputs(path)
        return self._outputs[file]


def _first_outputs(path: Path) -> dict[str, Array]:
    """Run a model on the first prompt of its richest cases that work."""
    try:
        session = Session(path)
    except SessionError:
        return {}
    for cases in plans(read_interface(load_model(path).model), Siblings(path)):
        largest = max(cases, key=lambda case: case.batch * case.steps[0].new)
        try:
            return next(decode(session, largest, {}))[1]
        except SessionError:
            continue
    return {}
