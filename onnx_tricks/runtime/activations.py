"""What values inside a model are on seeded inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.errors import TricksError
from onnx_tricks.graph.interface import Input, read_interface
from onnx_tricks.runtime.sessions import Session

__all__ = ["observe"]

_Array = np.ndarray[Any, np.dtype[Any]]
_BATCH, _TOKENS, _SEED = 2, 16, 0


def observe(model: ir.Model, values: Sequence[ir.Value]) -> dict[ir.Value, _Array] | None:
    """Run a text model once, on seeded tokens and empty caches, and look at values inside it.

    Args:
        model: The model; unchanged after the call.
        values: Values of its main graph.

    Returns:
        What each of them is; None where the model asks for more than tokens, or does not run.
    """
    interface, outputs = read_interface(model), list(model.graph.outputs)
    random = np.random.default_rng(_SEED)
    feeds = {one.name: _feed(one, random) for one in interface.inputs}
    wanted = list(dict.fromkeys(values))
    model.graph.outputs.extend(one for one in wanted if one not in outputs)
    try:
        found = Session(model, optimised=False).run(
            {name: array for name, array in feeds.items() if array is not None}
        )
    except TricksError:
        return None
    finally:
        model.graph.outputs[len(outputs) :] = []  # `del` would leave them marked as outputs
    return {one: found[one.name or ""] for one in wanted}


def _feed(one: Input, random: np.random.Generator) -> _Array | None:
    if one.role == "ids":
        return random.integers(0, one.limit or 2, (_BATCH, _TOKENS))
    if one.role == "mask":
        return np.ones((_BATCH, _TOKENS), np.int64)
    if one.role == "positions":
        return one.places(np.ones((_BATCH, _TOKENS), bool), _TOKENS)
    if one.role == "cache":
        return np.zeros(one.sized(_BATCH))
    return None
