"""An inspection as data (`--json`) and as a table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnx_tricks.inspect.cost import first_layer
from onnx_tricks.inspect.dimensions import Dimensions
from onnx_tricks.inspect.inspection import Inspection, Trick
from onnx_tricks.inspect.traffic import Traffic

__all__ = ["print_inspection", "si", "to_dict", "verdict"]

_MUCH, _LITTLE = 1.1, 1.01
_MOST_REASONS = 3
_OF_OPERATORS = frozenset(("fold-norm", "defer-norm", "center-norm", "cancel-norm"))


def verdict(inspection: Inspection, trick: Trick) -> str:
    """Whether a trick is worth it, in a word or two.

    "yes" from a speed-up of 1.1 on in one of the batches, "a little" from 1.01 on, "hardly" below;
    "operators" for tricks of norms, which save operators and latency and hardly any bytes;
    "grows file" above the limit that `optimize` sets to growth; "no" where the trick does not
    apply.
    """
    if not trick.applies:
        return "no"
    if inspection.outgrows(trick):
        return "grows file"
    if trick.name in _OF_OPERATORS:
        return "operators"
    best = max(inspection.speedup(trick.traffic, batch) for batch in inspection.batches)
    if best >= _MUCH:
        return "yes"
    return "a little" if best >= _LITTLE else "hardly"


def to_dict(inspection: Inspection) -> dict[str, Any]:
    """The inspection as plain data. Counts are whole numbers; bytes are in the types of the model.

    Keys: ``input``; ``basis`` ("graph" or "config"); ``step``, the file that a decode step runs;
    ``dimensions`` or null; ``parameters`` and ``bytes`` of all files; ``context`` and ``batches``
    as reported; ``notes``; ``cache`` and ``reads`` today; ``tricks``; ``combined`` with ``cache``
    and ``reads`` after all that apply.

    ``cache``: ``values_per_token`` and ``bytes_per_token`` that one more token of the decoder
    takes, the same with ``cross_`` for the encoder, and ``bytes`` of one sequence at ``context``.
    ``reads``, for each batch: ``values_per_step``, ``values_per_token``, ``bytes_per_token``, and
    for a trick the ``speedup`` of a memory-bound system.

    A trick: ``name``, ``basis`` ("pass" or "estimate"), ``applies``, ``verdict``, ``count``,
    ``where``, ``skipped`` (``node`` and ``reason``), ``parameters`` and ``bytes`` (``before``,
    ``removed``, ``added``, ``after``), ``cache``, ``reads``, ``notes``; ``first_layer`` for
    precompute-first-layer, reads of what it replaces for each batch; ``otherwise``, what a trick
    that does not apply would remove in a model of these dimensions that qualified.
    """
    dims = inspection.dimensions
    return {
        "input": inspection.input,
        "basis": inspection.basis,
        "step": inspection.step,
        "dimensions": None if dims is None else dataclasses.asdict(dims),
        "parameters": inspection.stored.values,
        "bytes": inspection.stored.bytes,
        "context": inspection.context,
        "batches": list(inspection.batches),
        "notes": list(inspection.notes),
        "cache": _cache(inspection, inspection.traffic),
        "reads": _reads(inspection, inspection.traffic, today=True),
        "tricks": [_trick(inspection, trick) for trick in inspection.tricks],
        "combined": {
            "cache": _cache(inspection, inspection.combined),
            "reads": _reads(inspection, inspection.combined),
        },
    }


def print_inspection(inspection: Inspection, console: Console, *, verbose: bool = False) -> None:
    """Print verdicts and figures as a table, and refusals with their reasons."""
    console.print(_headline(inspection), highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("trick", no_wrap=True)
    table.add_column("worth it?", no_wrap=True)
    for name in ("file", "cache", *(f"batch\n{batch}" for batch in inspection.batches)):
        table.add_column(name, justify="right", no_wrap=True)
    for trick in inspection.tricks:
        if trick.applies:
            mark = "*" if trick.basis == "estimate" else ""
            grown = trick.growth.bytes / (inspection.stored.bytes or 1)
            row = (verdict(inspection, trick), _percent(grown), *_row(inspection, trick.traffic))
            table.add_row(trick.name + mark, *row)
    table.add_section()
    table.add_row("all of them", "", "", *_row(inspection, inspection.combined))
    console.print(table)
    for line in _lines(inspection, verbose):
        console.print(Text(line), soft_wrap=True)


def si(number: float, unit: str = "") -> str:
    """A number in three digits with a decimal prefix, as in "7.48 MB"."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * factor:
            return f"{_three_digits(number / factor)} {prefix}{unit}"
    return f"{_three_digits(number)} {unit}".rstrip()


def _three_digits(number: float) -> str:
    text = f"{number:.3g}"
    return f"{number:.0f}" if "e" in text else text


def _trick(inspection: Inspection, trick: Trick) -> dict[str, Any]:
    stored, removed, added = inspection.stored, trick.removed, trick.added
    result: dict[str, Any] = {
        "name": trick.name,
        "basis": trick.basis,
        "applies": trick.applies,
        "verdict": verdict(inspection, trick),
        "count": trick.count,
        "where": list(trick.where),
        "skipped": [dataclasses.asdict(skip) for skip in trick.skipped],
    }
    for key, unit in (("parameters", "values"), ("bytes", "bytes")):
        before, less, more = (getattr(one, unit) for one in (stored, removed, added))
        after = before - less + more
        result[key] = {"before": before, "removed": less, "added": more, "after": after}
    result["cache"] = _cache(inspection, trick.traffic)
    result["reads"] = _reads(inspection, trick.traffic)
    result["notes"] = list(trick.notes)
    result["first_layer"] = None
    if trick.name == "precompute-first-layer" and inspection.dimensions and trick.applies:
        reads = {one: first_layer(inspection.dimensions, one) for one in inspection.batches}
        result["first_layer"] = {
            str(batch): {"before": one.before, "after": one.after, "factor": one.before / one.after}
            for batch, one in reads.items()
            if one is not None
        } or None
    result["otherwise"] = None
    if trick.otherwise is not None:
        result["otherwise"] = {"parameters_removed": trick.otherwise.removed}
    return result


def _cache(inspection: Inspection, traffic: Traffic) -> dict[str, int]:
    own, cross = traffic.cache_per_token("self"), traffic.cache_per_token("cross")
    return {
        "values_per_token": own.values,
        "bytes_per_token": own.bytes,
        "cross_values_per_token": cross.values,
        "cross_bytes_per_token": cross.bytes,
        "bytes": traffic.cache(inspection.context).bytes,
    }


def _reads(
    inspection: Inspection, traffic: Traffic, *, today: bool = False
) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    for batch in inspection.batches:
        step = traffic.per_step(batch, inspection.context)
        result[str(batch)] = {
            "values_per_step": step.values,
            "values_per_token": round(step.values / batch),
            "bytes_per_token": round(step.bytes / batch),
        }
        if not today:
            speedup = inspection.speedup(traffic, batch)
            result[str(batch)]["speedup"] = round(speedup, 4)
    return result


def _headline(inspection: Inspection) -> str:
    stored, traffic = inspection.stored, inspection.traffic
    size = f"{si(stored.values)} weights, {si(stored.bytes, 'B')}"
    lines = [f"[bold]{escape(inspection.input)}[/bold]: {_layout(inspection.dimensions)}{size}"]
    weights = si((traffic.weights + traffic.experts * traffic.used).bytes, "B")
    line = f"a pass over the model reads {weights} of weights"
    if traffic.caches:
        line = f"a decode step reads {weights} of weights"
        cache = si(traffic.cache(inspection.context).bytes, "B")
        line += f", and for each sequence {cache} of cache at {inspection.context:,} tokens"
    return "\n".join([*lines, line])


def _layout(dims: Dimensions | None) -> str:
    if dims is None or not dims.model_type:
        return ""
    attention = dims.attention
    heads = f"{attention.heads} heads of {attention.head_width}"
    if attention.kv_heads != attention.heads:
        heads += f" ({attention.kv_heads} for keys and values)"
    layers = f"{dims.layers} layers"
    if dims.encoder:
        layers = f"{dims.encoder.layers} + {dims.layers} layers"
    return f"{dims.model_type}, {layers}, width {dims.width}, {heads}, {attention.position}; "


def _row(inspection: Inspection, traffic: Traffic) -> list[str]:
    before, after = (one.cache(inspection.context).bytes for one in (inspection.traffic, traffic))
    speedups = (inspection.speedup(traffic, batch) for batch in inspection.batches)
    return [_percent(after / (before or 1) - 1 if before else 0), *(f"{s:.2f}x" for s in speedups)]


def _percent(share: float) -> str:
    if abs(share) < 0.0005:
        return "~0" if share else "-"
    return f"{100 * share:+.1f} %" if abs(share) < 0.0995 else f"{100 * share:+.0f} %"


def _lines(inspection: Inspection, verbose: bool) -> list[str]:
    """What the table leaves out: what the columns mean, where tricks apply, why they do not."""
    speed = "batch N: speed-up of a pass over N tokens that memory bandwidth limits"
    if inspection.traffic.caches:
        speed = "batch N: speed-up of decoding N sequences where memory bandwidth is the limit, "
        speed += f"at {inspection.context:,} tokens of context"
    estimated = any(trick.basis == "estimate" and trick.applies for trick in inspection.tricks)
    no_pass = "; this version has no pass for it" if inspection.basis == "graph" else ""
    lines = [speed, f"* estimated from the dimensions{no_pass}"][: 1 + estimated]
    for trick in inspection.tricks:
        if trick.applies:
            lines.append(f"{trick.name}: {_details(inspection, trick, verbose)}")
        lines += _reasons(trick, None if verbose else _MOST_REASONS)
        if trick.otherwise is not None and inspection.stored.values:
            share = trick.otherwise.removed / inspection.stored.values
            notes = "".join(f"; {note}" for note in trick.otherwise.notes)
            lines.append(
                f"  without them it would remove {share:.0%} of the weights, "
                f"{1 / (1 - share):.2f}x at batch 1 and short context{notes}"
            )
    return lines + list(inspection.notes)


def _details(inspection: Inspection, trick: Trick, verbose: bool) -> str:
    parts = [", ".join(trick.where)]
    if trick.count is not None and not verbose:
        parts = [trick.where[0] if len(trick.where) == 1 else f"{trick.count} places"]
    for change, word in ((trick.removed, "fewer"), (trick.added, "more")):
        if change.values:
            parts.append(f"{change.values:,} weights {word} ({si(change.bytes, 'B')})")
    for kind, name in (("self", ""), ("cross", " encoder")):
        before, after = (
            one.cache_per_token(kind).values for one in (inspection.traffic, trick.traffic)
        )
        if before != after:
            parts.append(f"{before:,} -> {after:,} cached values per{name} token")
    return "; ".join([*parts, *trick.notes])


def _reasons(trick: Trick, most: int | None) -> list[str]:
    reasons = Counter(skip.reason for skip in trick.skipped)
    word = "skipped" if trick.applies else "not applicable"
    shown = [
        f"{trick.name} {word}{f' ({count} places)' if count > 1 else ''}: {reason}"
        for reason, count in reasons.items()
    ]
    if most is not None and len(shown) > most:
        shown[most:] = [f"{trick.name}: and {len(shown) - most} more (-v shows all)"]
    return shown
