"""A comparison as data (`--json`) and as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnx_tricks.bench.results import Comparison, Measurement

__all__ = ["print_comparison", "to_dict"]

_MB, _HUNDRED = 1e6, 100


def to_dict(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data.

    Keys: ``reference`` and ``candidate``, paths; ``machine``; ``threads`` (0: as ONNX Runtime
    chooses), ``provider``; ``encoder_positions``, 0 where no encoder's output is read;
    ``workloads``; ``refused``, those that a model does not run: ``kind``, ``batch``, ``new``,
    ``cached``, ``model`` and ``reason``.

    A workload: ``kind`` ("step", "prompt" or "forward"), ``batch``, ``new`` and ``cached`` tokens
    of a row; ``pairs``; ``speedup``, reference by candidate, pair by pair: ``median``, and the
    quartiles ``low`` and ``high``; for ``reference`` and ``candidate`` each ``milliseconds`` (the
    median), ``cache_bytes``, ``encoder_bytes``, ``caches`` ("prompt" or "random": what filled
    them; "" where there are none) and ``peak_bytes`` or null.
    """
    settings = comparison.settings
    return {
        "reference": str(comparison.reference),
        "candidate": str(comparison.candidate),
        "machine": comparison.machine,
        "threads": settings.threads,
        "provider": settings.provider,
        "encoder_positions": settings.encoder,
        "workloads": [_workload(one) for one in comparison.measurements],
        "refused": [
            {
                "kind": one.workload.kind,
                **dataclasses.asdict(one.workload),
                "model": one.model,
                "reason": one.reason,
            }
            for one in comparison.refusals
        ],
    }


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the comparison as a table: reference → candidate, throughout."""
    settings, machine = comparison.settings, comparison.machine
    _line(console, f"{comparison.reference} → {comparison.candidate}")
    _line(
        console,
        f"ONNX Runtime {machine['onnxruntime']} on {settings.provider}, "
        f"threads: {settings.threads or 'as it chooses'}; "
        f"{machine['processor']}, {machine['cores']} cores; our operators: {machine['operators']}",
    )
    peaks = any(_peaks(one) != (None, None) for one in comparison.measurements)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("workload", no_wrap=True)
    titles = ["batch", "ms", "times faster", "cache MB", "peak MB"]
    for title in titles if peaks else titles[:-1]:
        table.add_column(title, justify="right", no_wrap=True)
    for one in comparison.measurements:
        table.add_row(*_row(one, peaks=peaks))
    console.print(table)
    for line in _notes(comparison):
        _line(console, line)


def _line(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)


def _row(one: Measurement, *, peaks: bool) -> list[str]:
    speedup, caches = one.speedup, (one.reference.cache_bytes, one.candidate.cache_bytes)
    row = [
        str(one.workload),
        str(one.workload.batch),
        _arrow([1e3 * seconds for seconds in one.seconds]),
        f"{speedup.median:.2f} ({speedup.low:.2f}-{speedup.high:.2f})",
        _arrow([size / _MB for size in caches]) if any(caches) else "-",
    ]
    if peaks:
        row.append(_arrow([None if size is None else size / _MB for size in _peaks(one)]))
    return row


def _peaks(one: Measurement) -> tuple[int | None, int | None]:
    return one.reference.peak_bytes, one.candidate.peak_bytes


def _arrow(numbers: Sequence[float | None]) -> str:
    """Two numbers, in three digits."""
    shown = ("?" if n is None else f"{n:.0f}" if n >= _HUNDRED else f"{n:.3g}" for n in numbers)
    return " → ".join(shown)


def _notes(comparison: Comparison) -> list[str]:
    """What a reader of the table should know."""
    notes = ["times faster: median of pairs (quartiles); above 1, the candidate is faster"]
    measured = comparison.measurements
    for name in ("reference", "candidate"):
        random = {m.workload.cached for m in measured if getattr(m, name).caches == "random"}
        if random:
            lengths = ", ".join(f"{length:,}" for length in sorted(random))
            notes.append(f"the caches of the {name} hold random numbers at {lengths} tokens")
    if comparison.settings.encoder:
        positions = comparison.settings.encoder
        notes.append(f"the encoder's output, {positions:,} positions, is not among the caches")
    refused: dict[tuple[str, str, str], list[str]] = {}
    for one in comparison.refusals:
        key = str(one.workload), one.model, one.reason
        refused.setdefault(key, []).append(str(one.workload.batch))
    notes += [
        f"{work}, batch {', '.join(batches)}: the {model} does not run it: {reason}"
        for (work, model, reason), batches in refused.items()
    ]
    return notes


def _workload(one: Measurement) -> dict[str, Any]:
    sides = zip(
        ("reference", "candidate"), (one.reference, one.candidate), one.seconds, strict=True
    )
    return {
        "kind": one.workload.kind,
        **dataclasses.asdict(one.workload),
        "pairs": len(one.times),
        "speedup": dataclasses.asdict(one.speedup),
        **{
            name: {"milliseconds": 1e3 * seconds, **dataclasses.asdict(side)}
            for name, side, seconds in sides
        },
    }
