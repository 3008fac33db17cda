"""Bytes read per token against the length of the context, before and after each trick."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

from onnx_tricks.errors import UsageError
from onnx_tricks.inspect.inspection import Inspection
from onnx_tricks.inspect.report import si
from onnx_tricks.inspect.traffic import Traffic

__all__ = ["plot_inspection"]

_FORMATS = (".png", ".svg")
_SHORTEST, _POINTS = 16, 65
_VISIBLE = 1.01  # lines closer than this to another one say nothing
_MOST_PANELS = 3
_LEAST_SPAN = 3.0  # of the axis of bytes, so that flat lines look flat
_GAP = 0.1  # least distance of two labels, as a share of the axis
# Told apart by people with any colour vision (Okabe and Ito).
_COLOURS = {
    "slim-attention": "#0072B2",
    "precompute-first-layer": "#D55E00",
    "merge-skipless": "#009E73",
}
_OTHER = "#CC79A7"


class _Line(NamedTuple):
    """One line of a panel."""

    label: str
    traffic: Traffic
    colour: str
    style: str = "-"


def plot_inspection(inspection: Inspection, path: Path) -> None:
    """Draw what a decode step reads for each token against the context, a panel for each batch.

    Args:
        inspection: What to draw; its context is where the lines end.
        path: A .png or .svg file.

    Raises:
        UsageError: matplotlib is not installed, the file cannot be written, or the model has no
            cache that grows with the context.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"--plot {path}: the name of a plot ends in {' or '.join(_FORMATS)}")
    if not inspection.traffic.caches:
        raise UsageError(
            f"--plot: {inspection.input} keeps no key/value cache, so what it reads for a token "
            "does not depend on the context"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('--plot needs matplotlib: pip install "onnx-tricks[plot]"') from error
    batches = inspection.batches[:_MOST_PANELS]
    figure = Figure(figsize=(0.8 + 3.6 * len(batches), 4.4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(batches), squeeze=False)[0]
    drawn: set[str] = set()
    for panel, batch in zip(panels, batches, strict=True):
        lines = _lines(inspection, batch)
        drawn |= {line.label for line in lines}
        _draw(panel, inspection, lines, batch)
    panels[0].set_ylabel("bytes read per generated token")
    figure.suptitle(_title(inspection), x=0.01, ha="left", fontsize=11, fontweight="bold")
    hidden = [t.name for t in inspection.tricks if inspection.joins(t) and t.name not in drawn]
    note = "Speed-ups: at the right end, where memory bandwidth is the limit"
    if hidden:
        note += f"\nLess than 1 % and not drawn: {', '.join(hidden)}"
    figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color="#555555")
    try:
        figure.savefig(path)
    except OSError as error:
        raise UsageError(f"--plot {path}: cannot be written: {error}") from error


def _contexts(inspection: Inspection) -> list[int]:
    last = max(inspection.context, 2 * _SHORTEST)
    ratio = last / _SHORTEST
    return [round(_SHORTEST * ratio ** (i / (_POINTS - 1))) for i in range(_POINTS)]


def _lines(inspection: Inspection, batch: int) -> list[_Line]:
    """Today, the tricks that can be told from it, and all together where that is more than each."""
    contexts = _contexts(inspection)

    def best(traffic: Traffic) -> float:
        return max(inspection.speedup(traffic, batch, tokens) for tokens in contexts)

    tricks = [trick for trick in inspection.tricks if inspection.joins(trick)]
    lines = [
        _Line(trick.name, trick.traffic, _COLOURS.get(trick.name, _OTHER))
        for trick in tricks
        if best(trick.traffic) >= _VISIBLE
    ]
    together = best(inspection.combined)
    if len(lines) > 1 and all(together >= _VISIBLE * best(line.traffic) for line in lines):
        lines.append(_Line("all of them", inspection.combined, "#000000", "--"))
    return [_Line("today", inspection.traffic, "#555555"), *lines]


def _draw(panel: Any, inspection: Inspection, lines: list[_Line], batch: int) -> None:
    contexts = _contexts(inspection)
    curves = [
        [line.traffic.per_step(batch, tokens).bytes / batch for tokens in contexts]
        for line in lines
    ]
    for line, reads in zip(lines, curves, strict=True):
        width = 2.6 if line.label == "today" else 1.7
        panel.plot(contexts, reads, line.style, color=line.colour, linewidth=width, clip_on=False)
    lowest = [min(reads) for reads in zip(*curves, strict=True)]
    panel.fill_between(contexts, lowest, curves[0], color="#0072B2", alpha=0.07, linewidth=0)
    low, high = min(lowest), max(curves[0])
    middle, span = math.sqrt(low * high), max(high / low, _LEAST_SPAN) * 1.5
    low, high = middle / math.sqrt(span), middle * math.sqrt(span)
    _scale(panel, contexts, low, high)
    panel.set_title(f"batch {batch}", loc="left", fontsize=10)
    panel.set_xlabel("tokens of context", fontsize=9)
    heights = [math.log(reads[-1] / low) / math.log(high / low) for reads in curves]
    for line, height in zip(lines, _spread(heights), strict=True):
        text = line.label
        if text != "today":
            text += f"\n{inspection.speedup(line.traffic, batch):.2f}x"
        panel.annotate(text, (1.03, height), xycoords="axes fraction", va="center",
                       fontsize=8, color=line.colour, annotation_clip=False)  # fmt: skip


def _scale(panel: Any, contexts: list[int], low: float, high: float) -> None:
    """Logarithmic axes with units."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_ylim(low, high)
    panel.set_xlim(contexts[0], contexts[-1])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda number, _: si(number, "B")))
    panel.yaxis.set_minor_formatter(NullFormatter())
    # Powers of two, every second one where they would crowd, with the last at the end.
    last = math.floor(math.log2(contexts[-1]))
    step = 1 if last <= 9 else 2 if last <= 13 else 3
    panel.xaxis.set_major_locator(FixedLocator([2**n for n in range(last, 3, -step)]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda number, _: _binary(number)))
    panel.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)


def _spread(heights: list[float]) -> list[float]:
    """Heights of labels, moved apart just so far that they do not overlap."""
    order = sorted(range(len(heights)), key=lambda index: -heights[index])
    placed = list(heights)
    for above, below in itertools.pairwise(order):
        placed[below] = min(placed[below], placed[above] - _GAP)
    return placed


def _title(inspection: Inspection) -> str:
    dims = inspection.dimensions
    name = Path(inspection.input)
    shown = name.parent.name if name.name == "config.json" and name.parent.name else name.name
    family = f" ({dims.model_type})" if dims and dims.model_type else ""
    return f"{shown}{family}: what a decode step reads"


def _binary(number: float) -> str:
    return f"{number / 1024:g}k" if number >= 1024 else f"{number:g}"
