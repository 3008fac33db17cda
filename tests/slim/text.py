"""Real text for the demo model, and the error of a slim decoder on it."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.interface import Interface, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.runtime.sessions import Array, Session
from onnx_tricks.verify.cases import Case, Step
from onnx_tricks.verify.decoding import decode
from onnx_tricks.verify.narrow import narrow_caches, narrower
from onnx_tricks.verify.reference import raise_to_double
from onnx_tricks.verify.tally import Finding, Tally

PROMPT, STEPS = 512, 256


def source_text(index: int = 0) -> Array:
    """Bytes of Python source, which the demo model was trained to continue."""
    text = Path(textwrap.__file__).read_bytes()
    start = index * 1500
    return np.frombuffer(text[start : start + PROMPT + STEPS], dtype=np.uint8).astype(np.int64)


def long_case(interface: Interface) -> Case:
    """A prompt of 512 bytes and 256 steps, in two rows; the second is padded on the left."""
    rows = 2
    ids = np.stack([source_text(row) for row in range(rows)])
    valid = np.ones_like(ids, dtype=bool)
    valid[1, :100] = False
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    steps = []
    for start, stop in [(0, PROMPT), *((p, p + 1) for p in range(PROMPT, PROMPT + STEPS))]:
        feeds = {
            "input_ids": ids[:, start:stop],
            "attention_mask": valid[:, :stop].astype(np.int64),
            "position_ids": positions[:, start:stop],
        }
        wanted = {v.name for v in interface.inputs}
        feeds = {name: array for name, array in feeds.items() if name in wanted}
        steps.append(Step(feeds, valid[:, :stop], stop - start))
    return Case("text", rows, interface.empty_caches(rows), tuple(steps))


def errors(
    original: Path, slim: Path, make_case: Callable[[Interface], Case] = long_case
) -> dict[str, Finding]:
    """The errors of both models' logits against float64, by phase ("prompt", "step")."""
    result = read_interface(load_model(slim).model)
    before = read_interface(load_model(original).model)
    case = make_case(before)
    runs = [
        _original(original, "wide", make_case),
        _original(original, narrower(before, result), make_case),
        _logits(Session(slim), case, result),
    ]
    tally = Tally()
    for index, (step, *logits) in enumerate(zip(case.steps, *runs, strict=True)):
        tally.add("text", "step" if index else "prompt", step, *({"logits": a} for a in logits))
    return {finding.phase: finding for finding in tally.findings()}


@functools.cache
def _original(
    path: Path, kind: ir.DataType | str | None, make_case: Callable[[Interface], Case]
) -> list[Array]:
    """The logits of an original: in float64, with caches of another type, or as it is."""
    model = load_model(path).model
    interface = read_interface(model)
    if isinstance(kind, ir.DataType):
        narrow_caches(model, kind)
    elif kind == "wide":
        raise_to_double(model)
    session = Session(model, optimised=kind != "wide")
    return _logits(session, make_case(interface), interface)


def _logits(session: Session, case: Case, interface: Interface) -> list[Array]:
    caches = interface.empty_caches(case.batch)
    return [outputs["logits"] for _, outputs in decode(session, case, interface.presents, caches)]


def cache_type(path: Path) -> set[ir.DataType]:
    """The types of the cache inputs of a model."""
    return {value.dtype for value in read_interface(load_model(path).model).role("cache")}
