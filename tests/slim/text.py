"""Real text for the demo model, and the error of a slim decoder on it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.interface import Interface, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.runtime.sessions import Array, Session
from onnx_tricks.verify.decoding import decode
from onnx_tricks.verify.inputs import Case, Step, empty_caches
from onnx_tricks.verify.narrow import narrow_caches, narrower
from onnx_tricks.verify.reference import raise_to_double
from onnx_tricks.verify.tally import Finding, Tally

PROMPT, STEPS = 512, 256


def source_text(index: int = 0) -> Array:
    """Bytes of Python source, which the demo model was trained to continue."""
    text = Path(textwrap.__file__).read_bytes()
    start = index * 1500
    return np.frombuffer(text[start : start + PROMPT + STEPS], dtype=np.uint8).astype(np.int64)


def long_case(interface: Interface, *, rows: int = 2, padded: bool = True) -> Case:
    """A prompt of 512 bytes and 256 steps; every other row padded on the left."""
    ids = np.stack([source_text(row) for row in range(rows)])
    valid = np.ones_like(ids, dtype=bool)
    if padded:
        valid[1::2, :100] = False
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
    return Case("text", rows, empty_caches(interface, rows), tuple(steps))


def errors(original: Path, slim: Path, **options: bool) -> dict[str, Finding]:
    """The errors of both models' logits against float64, by phase ("prompt", "step")."""
    model, result = load_model(original).model, load_model(slim).model
    before, after = read_interface(model), read_interface(result)
    case = long_case(before, **options)
    wide = load_model(original).model
    raise_to_double(wide)
    narrow = narrower(before, after)
    if narrow is not None:
        narrow_caches(model, narrow)
    runs = [
        decode(Session(wide, optimised=False), case, before.presents),
        decode(Session(original if narrow is None else model), case, before.presents),
        decode(Session(slim), case, after.presents, empty_caches(after, case.batch)),
    ]
    tally = Tally()
    for index, outputs in enumerate(zip(*runs, strict=True)):
        step = outputs[0][0]
        logits = [{"logits": values["logits"]} for _, values in outputs]
        tally.add("text", "step" if index else "prompt", step, *logits)
    return {finding.phase: finding for finding in tally.findings()}


def cache_type(path: Path) -> set[ir.DataType]:
    """The types of the cache inputs of a model."""
    return {value.dtype for value in read_interface(load_model(path).model).role("cache")}
