"""What the inputs of layers look like: rows of them, from text that the model makes up itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnx_tricks.errors import TricksError
from onnx_tricks.graph.interface import Interface, read_interface
from onnx_tricks.runtime.sessions import Session

__all__ = ["sample_inputs"]

Array = np.ndarray[Any, np.dtype[Any]]
_BATCH, _STEPS, _SEED = 8, 64, 0


def sample_inputs(model: ir.Model, values: Sequence[ir.Value]) -> list[Array] | None:
    """Let a decoder write text, token by token, and keep what some of its values are meanwhile.

    Text of its own is what a model expects to read, as far as anyone can tell without data.

    Args:
        model: The decoder; unchanged after the call.
        values: Values of its main graph, [B, T, D] or [B T, D].

    Returns:
        For each value rows [N, D], float64; None where the model does not run here by itself.
    """
    interface = read_interface(model)
    ids, outputs = interface.role("ids"), list(model.graph.outputs)
    others = [v for v in interface.inputs if v.role not in _KNOWN]
    if len(ids) != 1 or others or not interface.presents or not outputs:
        return None
    model.graph.outputs.extend(v for v in dict.fromkeys(values) if v not in outputs)
    try:
        session = Session(model, optimised=False)
        rows = _write(session, interface, outputs[0].name or "", [v.name or "" for v in values])
    except TricksError:
        return None
    finally:
        model.graph.outputs[len(outputs) :] = []  # `del` would leave them marked as outputs
    return rows


_KNOWN = frozenset(("ids", "mask", "positions", "cache"))


def _write(
    session: Session, interface: Interface, logits: str, names: Sequence[str]
) -> list[Array]:
    random = np.random.default_rng(_SEED)
    rows: list[list[Array]] = [[] for _ in names]
    caches: dict[str, Array] = {**interface.empty_caches(_BATCH)}
    (ids,) = interface.role("ids")
    tokens = random.integers(0, ids.limit or 2, (_BATCH, 1))
    for step in range(_STEPS):
        feeds: dict[str, Array] = {**caches, ids.name: tokens}
        feeds |= {v.name: np.ones((_BATCH, step + 1)) for v in interface.role("mask")}
        for value in interface.role("positions"):
            feeds[value.name] = value.places(np.ones((_BATCH, step + 1), bool), 1)
        results = session.run(feeds)
        caches = {past: results[present] for past, present in interface.presents.items()}
        for kept, name in zip(rows, names, strict=True):
            array = results[name]
            kept.append(array.reshape(-1, array.shape[-1]).astype(np.float64))
        tokens = _choose(results[logits][:, -1].astype(np.float64), random)
    return [np.concatenate(kept) for kept in rows]


def _choose(logits: Array, random: np.random.Generator) -> Array:
    """One token for each row, drawn by its probability: Gumbel noise and the largest."""
    drawn: Array = np.argmax(logits + random.gumbel(size=logits.shape), axis=1)[:, None]
    return drawn
