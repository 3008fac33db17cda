"""The command `onnx-tricks`. Alone in printing and exiting."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Self

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from onnx_tricks.errors import ModelError, ParityError, TricksError, UsageError
from onnx_tricks.export import Dtype
from onnx_tricks.export import export as run_export
from onnx_tricks.inspect import inspect as run_inspect
from onnx_tricks.inspect.plot import plot_inspection
from onnx_tricks.inspect.report import print_inspection
from onnx_tricks.inspect.report import to_dict as inspection_data
from onnx_tricks.optimizer import optimize as run_optimize
from onnx_tricks.passes import PASSES, FoldNorm, PrecomputeFirstLayer, SlimAttention
from onnx_tricks.passes.fold_norm import SharedWeights
from onnx_tricks.passes.slim_attention import CacheType, Mode, Positions
from onnx_tricks.report import Report, print_report, print_verification
from onnx_tricks.rewrite import Pass
from onnx_tricks.verify import verify as run_verify

__all__ = ["main"]

_FAILED, _BAD = 1, 2

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


# Options that more than one command has.
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
PositionsOption = Annotated[
    Positions, typer.Option(help="slim-attention: where positions of cached keys come from.")
]
ReportOption = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Write the report as JSON.")
]
NoVerifyOption = Annotated[bool, typer.Option("--no-verify", help="Skip the proof.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Show all reasons.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=lambda on: _show_version(on), is_eager=True),
    ] = False,
) -> None:
    """Rewrite the weights of transformer ONNX models, exactly: the same function, fewer numbers."""


@app.command()
def optimize(
    source: Annotated[str, typer.Argument(metavar="IN", help="A .onnx file, a folder, or 'demo'.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A file or folder; may be IN.")],
    passes: PassesOption = None,
    enable: EnableOption = None,
    skip: SkipOption = None,
    shared_weights: SharedWeightsOption = FoldNorm.shared_weights,
    max_growth: MaxGrowthOption = PrecomputeFirstLayer.max_growth,
    slim_mode: SlimModeOption = SlimAttention.mode,
    slim_tolerance: SlimToleranceOption = SlimAttention.tolerance,
    cache_dtype: CacheTypeOption = SlimAttention.cache_dtype,
    positions: PositionsOption = SlimAttention.positions,
    report: ReportOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report; write nothing.")] = False,
    no_verify: NoVerifyOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Optimise IN and write the result to OUT, once it is proven to compute the same."""

    def run(display: _Display) -> Report:
        options: list[Pass] = [
            FoldNorm(shared_weights),
            SlimAttention(slim_mode, slim_tolerance, None, cache_dtype, positions),
            PrecomputeFirstLayer(max_growth=max_growth, bar=display.bar),
        ]
        return run_optimize(
            source,
            output,
            **_selected(passes, enable, skip, options),
            verify=not no_verify,
            dry_run=dry_run,
            progress=display,
        ).report

    _carry_out(run, report, verbose, quiet)


@app.command()
def export(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder with a checkpoint of Transformers.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A folder.")],
    task: Annotated[str, typer.Option(help="What for, as Optimum names it.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="The type of the weights.")] = "fp32",
    passes: PassesOption = None,
    enable: EnableOption = None,
    skip: SkipOption = None,
    shared_weights: SharedWeightsOption = FoldNorm.shared_weights,
    max_growth: MaxGrowthOption = PrecomputeFirstLayer.max_growth,
    slim_mode: SlimModeOption = SlimAttention.mode,
    slim_tolerance: SlimToleranceOption = SlimAttention.tolerance,
    cache_dtype: CacheTypeOption = SlimAttention.cache_dtype,
    positions: PositionsOption = SlimAttention.positions,
    report: ReportOption = None,
    no_verify: NoVerifyOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Export MODEL to ONNX with Optimum, optimise it, and write the result to OUT."""

    def run(display: _Display) -> Report:
        options: list[Pass] = [
            FoldNorm(shared_weights),
            SlimAttention(slim_mode, slim_tolerance, None, cache_dtype, positions),
            PrecomputeFirstLayer(max_growth=max_growth, bar=display.bar),
        ]
        return run_export(
            model,
            output,
            task=task,
            dtype=dtype,
            **_selected(passes, enable, skip, options),
            verify=not no_verify,
            progress=display,
        ).report

    _carry_out(run, report, verbose, quiet)


@app.command()
def verify(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove that CANDIDATE computes what REFERENCE computes: two files or two folders."""
    with _errors(), _Display(as_json):
        result = run_verify(reference, candidate)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print_verification(result, Console(), verbose=True)
    if result.status != "passed":
        raise typer.Exit(_FAILED)


@app.command()
def inspect(
    source: Annotated[
        str,
        typer.Argument(metavar="IN", help="A .onnx file, a folder, a config.json, or 'demo'."),
    ],
    batch: Annotated[
        str, typer.Option(metavar="A,B", help="Sequences that are decoded together.")
    ] = "1,16,256",
    context: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens of context; the model's longest by default."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw bytes read against context: .png or .svg."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show all reasons.")] = False,
) -> None:
    """Tell what each trick would remove, add and save in IN; nothing is written."""
    with _errors(), _Display(as_json) as display:
        found = run_inspect(source, batches=_numbers(batch), context=context, progress=display)
        if plot is not None:
            plot_inspection(found, plot)
    if as_json:
        print(json.dumps(inspection_data(found), indent=2))
    else:
        print_inspection(found, Console(), verbose=verbose)


@app.command("list")
def list_passes() -> None:
    """List the passes."""
    table = Table("pass", "default", "what it does")
    for one in PASSES:
        table.add_row(one.name, "yes" if one.default else "no", one.summary)
    Console().print(table)


def main() -> None:
    """Entry point of the console script."""
    # A polite kill unwinds like Ctrl-C, so that nothing half-written stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"onnx-tricks {version('onnx-tricks')}")
        raise typer.Exit


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in text.split(",")]
    except ValueError:
        raise UsageError(f"--batch takes whole numbers, as in 1,16,256, not {text!r}") from None


def _selected(
    passes: str | None, enable: str | None, skip: str | None, options: list[Pass]
) -> dict[str, Any]:
    """Which passes a run has, as `optimize` and `export` take it."""
    return {
        "passes": _with_options(_names(passes), options),
        "enable": _with_options(_names(enable) or [], options) or (),
        "skip": _names(skip) or (),
    }


def _with_options(names: list[str] | None, options: list[Pass]) -> list[str | Pass] | None:
    """Pass names, or the default set, as objects that carry the options of the command line."""
    known = {one.name: one for one in options}
    if names is None:
        return [known.get(one.name, one.name) for one in PASSES if one.default]
    return [known.get(name, name) for name in names]


def _carry_out(
    run: Callable[[_Display], Report], path: Path | None, verbose: bool, quiet: bool
) -> None:
    """Run, and show the report, that of a run whose proof failed too."""
    console = Console(quiet=quiet)
    with _errors(), _Display(quiet) as display:
        try:
            done = run(display)
        except ParityError as error:
            if error.report is not None:
                _finish(error.report, path, console, verbose)
            raise
    _finish(done, path, console, verbose)


def _finish(done: Report, path: Path | None, console: Console, verbose: bool) -> None:
    if path is not None:
        with _errors():
            try:
                path.write_text(json.dumps(done.to_dict(), indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise UsageError(f"the report cannot be written: {error}") from error
    print_report(done, console, verbose=verbose)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Turn the errors of the package into a message and an exit status."""
    try:
        yield
    except TricksError as error:
        print(f"onnx-tricks: {error}", file=sys.stderr)
        bad = isinstance(error, (ModelError, UsageError))
        raise typer.Exit(_BAD if bad else _FAILED) from None


class _Display:
    """What the run is doing, on a terminal's stderr; silence anywhere else."""

    def __init__(self, quiet: bool) -> None:
        console = Console(stderr=True)
        shown = console.is_terminal and not quiet
        self._status = console.status("starting") if shown else None

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)

    @contextlib.contextmanager
    def bar(self, tokens: int) -> Iterator[Callable[[int], object]]:
        """A bar for a table over the vocabulary; the function that it yields counts tokens."""
        if self._status is None:
            yield lambda _: None
            return
        self._status.stop()
        with tqdm(total=tokens, desc="first layer", unit="tok", leave=False) as bar:
            yield bar.update
        self._status.start()
