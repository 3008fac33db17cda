"""The command `onnx-tricks`. Alone in printing and exiting."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from onnx_tricks.errors import ModelError, ParityError, TricksError, UsageError
from onnx_tricks.optimizer import optimize as run_optimize
from onnx_tricks.passes import PASSES, FoldNorm
from onnx_tricks.passes.fold_norm import SharedWeights
from onnx_tricks.report import Report, print_report, print_verification
from onnx_tricks.rewrite import Pass
from onnx_tricks.verify import verify as run_verify

__all__ = ["main"]

_FAILED, _BAD = 1, 2

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


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
    passes: Annotated[str | None, typer.Option(metavar="A,B", help="Exactly these passes.")] = None,
    enable: Annotated[
        str | None, typer.Option(metavar="A,B", help="Passes on top of the default ones.")
    ] = None,
    skip: Annotated[str | None, typer.Option(metavar="A,B", help="Passes to leave out.")] = None,
    shared_weights: Annotated[
        SharedWeights,
        typer.Option(help="fold-norm: what to do with a weight that the embedding reads too."),
    ] = FoldNorm.shared_weights,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the report as JSON.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report; write nothing.")] = False,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the proof.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show all reasons.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Optimise IN and write the result to OUT, once it is proven to compute the same."""
    console = Console(quiet=quiet)
    options: list[Pass] = [FoldNorm(shared_weights=shared_weights)]
    with _errors(), _progress(quiet) as progress:
        try:
            done = run_optimize(
                source,
                output,
                passes=_with_options(_names(passes), options),
                enable=_with_options(_names(enable) or [], options) or (),
                skip=_names(skip) or (),
                verify=not no_verify,
                dry_run=dry_run,
                progress=progress,
            ).report
        except ParityError as error:
            if error.report is not None:
                _finish(error.report, report, console, verbose)
            raise
    _finish(done, report, console, verbose)


@app.command()
def verify(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove that CANDIDATE computes what REFERENCE computes: two files or two folders."""
    with _errors(), _progress(as_json):
        result = run_verify(reference, candidate)
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print_verification(result, Console(), verbose=True)
    if result.status != "passed":
        raise typer.Exit(_FAILED)


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


def _with_options(names: list[str] | None, options: list[Pass]) -> list[str | Pass] | None:
    """Pass names, or the default set, as objects that carry the options of the command line."""
    known = {one.name: one for one in options}
    if names is None:
        return [known.get(one.name, one.name) for one in PASSES if one.default]
    return [known.get(name, name) for name in names]


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


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """What the run is doing, on a terminal's stderr; silence anywhere else."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status("starting") as status:
        yield status.update
