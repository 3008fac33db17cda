"""The least time that attention to an encoder can take on the machine at hand, and what it takes.

`whisper.py` uses it to say how fast decoding could be at most.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from operator_cpu import product

__all__ = ["CrossAttention", "Rates", "attention_shares", "measure_rates"]

_OPERATOR = "SlimCrossAttention"
_SIDE = 1024
_RUNS = 7

Array = np.ndarray[Any, np.dtype[Any]]


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a machine is at best.

    Attributes:
        products: Multiplications and additions a second, in ONNX Runtime's MatMul, float32.
        bytes: Bytes of the states that are read in a second, from memory or wherever they stay.
    """

    products: float
    bytes: float

    def __str__(self) -> str:
        return f"MatMul {self.products / 1e9:.0f} GMAC/s, reading {self.bytes / 1e9:.0f} GB/s"


@dataclasses.dataclass(frozen=True)
class CrossAttention:
    """The attention of all layers of a decoder to the same states [B, S, D]."""

    layers: int
    heads: int
    states: Array

    def least_seconds(self, new: int, rates: Rates) -> float:
        """For a run with so many new tokens: the states are read once a layer, scored and added."""
        rows, length, width = self.states.shape
        products = rows * new * (2 * self.heads * length * width + 2 * width * width)
        return self.layers * max(products / rates.products, self.states.nbytes / rates.bytes)


def measure_rates(states: Array, threads: int) -> Rates:
    """Best of a few runs, with so many threads."""
    multiply = product(threads, _SIDE)
    parts = np.array_split(states.reshape(-1), threads)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:

        def read() -> float:
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            return time.perf_counter() - start

        reading = min(read() for _ in range(_RUNS))
    return Rates(_SIDE**3 / min(multiply() for _ in range(_RUNS)), states.nbytes / reading)


def attention_shares(write: Callable[[Any], object], options: Any) -> tuple[float, float]:
    """Say what part of a prompt's time, and of the steps', is attention to the encoder.

    Args:
        write: Opens a session with the options that it is given, runs a prompt and some steps, and
            lets go of the session.
        options: ONNX Runtime's session options.
    """
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        write(options)
        gc.collect()  # a session that ends writes its profile
        (file,) = Path(folder).iterdir()
        events = sorted(json.loads(file.read_text()), key=lambda event: event["ts"])
    spent: list[tuple[float, float]] = []  # microseconds in the operator, and in all, of each run
    for event in events:
        if event["name"] == "model_run":
            spent.append((0, event["dur"]))
        elif event.get("args", {}).get("op_name") == _OPERATOR and "kernel" in event["name"]:
            attention, whole = spent[-1]
            spent[-1] = attention + event["dur"], whole
    prompt, *steps = spent
    attention, whole = map(sum, zip(*steps, strict=True))
    return prompt[0] / prompt[1], attention / whole
