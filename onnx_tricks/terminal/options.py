"""Options that more than one command has, and how their text is read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from onnx_tricks.errors import UsageError
from onnx_tricks.passes import PASSES
from onnx_tricks.passes.fold_norm import SharedWeights
from onnx_tricks.passes.slim_attention import CacheType, Mode, Positions
from onnx_tricks.rewrite import Pass

__all__ = [
    "CacheTypeOption",
    "EnableOption",
    "EncoderTypeOption",
    "MaxGrowthOption",
    "MergeToleranceOption",
    "NoVerifyOption",
    "PassesOption",
    "PositionsOption",
    "QuietOption",
    "ReportOption",
    "SharedWeightsOption",
    "SkipOption",
    "SlimModeOption",
    "SlimToleranceOption",
    "VerboseOption",
    "numbers",
    "selected",
]

PassesOption = Annotated[str | None, typer.Option(metavar="A,B", help="Exactly these passes.")]
EnableOption = Annotated[
    str | None, typer.Option(metavar="A,B", help="Passes on top of the default ones.")
]
SkipOption = Annotated[str | None, typer.Option(metavar="A,B", help="Passes to leave out.")]
SharedWeightsOption = Annotated[
    SharedWeights,
    typer.Option(help="fold-norm: what to do with a weight that the embedding reads too."),
]
MaxGrowthOption = Annotated[
    float,
    typer.Option(metavar="PERCENT", help="precompute-first-layer: refuse to add more than."),
]
MergeToleranceOption = Annotated[
    float,
    typer.Option(metavar="X", help="merge-skipless: how much more rounding may be felt, a factor."),
]
SlimModeOption = Annotated[
    Mode, typer.Option(help="slim-attention: cache keys, or inputs, or whichever is smaller.")
]
SlimToleranceOption = Annotated[
    float,
    typer.Option(metavar="X", help="slim-attention: error of values, in roundings of their own."),
]
CacheTypeOption = Annotated[
    CacheType, typer.Option("--cache-dtype", help="slim-attention: type of the cached states.")
]
EncoderTypeOption = Annotated[
    CacheType,
    typer.Option("--encoder-dtype", help="slim-attention: type in which encoder states enter."),
]
PositionsOption = Annotated[
    Positions, typer.Option(help="slim-attention: where positions of cached keys come from.")
]
ReportOption = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Write the report as JSON.")
]
NoVerifyOption = Annotated[bool, typer.Option("--no-verify", help="Skip the proof.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Show all reasons.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]


def numbers(text: str, option: str) -> list[int]:
    """Read whole numbers that commas part.

    Args:
        text: What was given; may be empty.
        option: The name of the option, for the message.

    Raises:
        UsageError: It holds something else.
    """
    try:
        return [int(name) for name in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"{option} takes whole numbers, as in 1,16,256, not {text!r}") from None


def selected(
    passes: str | None, enable: str | None, skip: str | None, options: list[Pass]
) -> dict[str, Any]:
    """Which passes a run has, as `optimize` and `export` take it.

    Args:
        passes: Names of exactly the passes wanted; None for the default set.
        enable: Names of passes on top of those.
        skip: Names of passes to leave out.
        options: The passes that have options, with those of the command line.
    """
    return {
        "passes": _with_options(_names(passes), options),
        "enable": _with_options(_names(enable) or [], options) or (),
        "skip": _names(skip) or (),
    }


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [name.strip() for name in text.split(",") if name.strip()]


def _with_options(names: list[str] | None, options: list[Pass]) -> list[str | Pass] | None:
    """Pass names, or the default set, as objects that carry the options of the command line."""
    known = {one.name: one for one in options}
    if names is None:
        return [known.get(one.name, one.name) for one in PASSES if one.default]
    return [known.get(name, name) for name in names]
