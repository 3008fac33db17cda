"""Options that more than one command has, and how their text is read."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from onnx_tricks.errors import UsageError
from onnx_tricks.passes import (
    PASSES,
    FoldNorm,
    MergeSkipless,
    PrecomputeFirstLayer,
    SlimAttention,
)
from onnx_tricks.passes.fold_norm import SharedWeights
from onnx_tricks.passes.slim_attention import CacheType, Mode, Positions
from onnx_tricks.rewrite import Pass
from onnx_tricks.terminal.display import Display

__all__ = [
    "InputsOption",
    "NoVerifyOption",
    "PassOptions",
    "QuietOption",
    "ReportOption",
    "VerboseOption",
    "numbers",
    "takes_passes",
]

ReportOption = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Write the report as JSON.")
]
NoVerifyOption = Annotated[bool, typer.Option("--no-verify", help="Skip the proof.")]
InputsOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE.npz",
        help="Inputs of your own that the proof runs too: the arrays of one run by the names of "
        "the inputs, as numpy.savez writes them; caches that are left out are empty. May be given "
        "more than once.",
    ),
]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Show all reasons.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]


@dataclasses.dataclass(frozen=True)
class PassOptions:
    """Which passes a run has, and how: a field is an option of the command line."""

    passes: Annotated[str | None, typer.Option(metavar="A,B", help="Exactly these passes.")] = None
    enable: Annotated[
        str | None, typer.Option(metavar="A,B", help="Passes on top of the default ones.")
    ] = None
    skip: Annotated[str | None, typer.Option(metavar="A,B", help="Passes to leave out.")] = None
    shared_weights: Annotated[
        SharedWeights,
        typer.Option(help="fold-norm: what to do with a weight that the embedding reads too."),
    ] = FoldNorm.shared_weights
    max_growth: Annotated[
        float,
        typer.Option(metavar="PERCENT", help="precompute-first-layer: refuse to add more than."),
    ] = PrecomputeFirstLayer.max_growth
    merge_tolerance: Annotated[
        float,
        typer.Option(
            metavar="X", help="merge-skipless: how much more rounding may be felt, a factor."
        ),
    ] = MergeSkipless.tolerance
    slim_mode: Annotated[
        Mode, typer.Option(help="slim-attention: cache keys, or inputs, or whichever is smaller.")
    ] = SlimAttention.mode
    slim_tolerance: Annotated[
        float,
        typer.Option(
            metavar="X", help="slim-attention: error of values, in roundings of their own."
        ),
    ] = SlimAttention.tolerance
    cache_dtype: Annotated[
        CacheType, typer.Option(help="slim-attention: type of the cached states.")
    ] = SlimAttention.cache_dtype
    encoder_dtype: Annotated[
        CacheType, typer.Option(help="slim-attention: type in which encoder states enter.")
    ] = SlimAttention.encoder_dtype
    positions: Annotated[
        Positions, typer.Option(help="slim-attention: where positions of cached keys come from.")
    ] = SlimAttention.positions

    def selected(self, display: Display) -> dict[str, Any]:
        """The passes as `onnx_tricks.optimize` and `export` take them; one shows a bar."""
        slim = SlimAttention(
            self.slim_mode,
            self.slim_tolerance,
            cache_dtype=self.cache_dtype,
            positions=self.positions,
            encoder_dtype=self.encoder_dtype,
        )
        options: list[Pass] = [
            FoldNorm(self.shared_weights),
            MergeSkipless(self.merge_tolerance),
            slim,
            PrecomputeFirstLayer(max_growth=self.max_growth, bar=display.bar),
        ]
        return {
            "passes": _with_options(_names(self.passes), options),
            "enable": _with_options(_names(self.enable) or [], options) or (),
            "skip": _names(self.skip) or (),
        }


def takes_passes(command: Callable[..., None]) -> Callable[..., None]:
    """Replace a command's argument of type `PassOptions` by the options that its fields are."""
    fields = inspect.signature(PassOptions, eval_str=True).parameters
    parameters: list[inspect.Parameter] = []
    for one in inspect.signature(command, eval_str=True).parameters.values():
        if one.annotation is PassOptions:
            taken = one.name
            parameters += fields.values()
        else:
            parameters.append(one)

    @functools.wraps(command)
    def run(**given: Any) -> None:
        given[taken] = PassOptions(**{name: given.pop(name) for name in fields})
        command(**given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


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
