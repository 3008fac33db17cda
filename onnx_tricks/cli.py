"""The command `onnx-tricks`. With `terminal`, alone in printing and exiting."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from onnx_tricks.bench import compare as run_compare
from onnx_tricks.bench import print_comparison
from onnx_tricks.bench import to_dict as comparison_data
from onnx_tricks.bench.workload import Provider
from onnx_tricks.errors import ParityError
from onnx_tricks.export import Dtype
from onnx_tricks.export import export as run_export
from onnx_tricks.inspect import inspect as run_inspect
from onnx_tricks.inspect.plot import plot_inspection
from onnx_tricks.inspect.report import print_inspection
from onnx_tricks.inspect.report import to_dict as inspection_data
from onnx_tricks.optimizer import optimize as run_optimize
from onnx_tricks.passes import PASSES
from onnx_tricks.report import Report, print_report, print_verification
from onnx_tricks.terminal.display import FAILED, Display, errors, write_json
from onnx_tricks.terminal.options import (
    InputsOption,
    NoVerifyOption,
    PassOptions,
    QuietOption,
    ReportOption,
    VerboseOption,
    numbers,
    takes_passes,
)
from onnx_tricks.verify import verify as run_verify

__all__ = ["app", "main"]

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
@takes_passes
def optimize(
    source: Annotated[str, typer.Argument(metavar="IN", help="A .onnx file, a folder, or 'demo'.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="A file or folder; may be IN.")],
    chosen: PassOptions,
    inputs: InputsOption = None,
    report: ReportOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report; write nothing.")] = False,
    no_verify: NoVerifyOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Optimise IN and write the result to OUT, once it is proven to compute the same."""

    def run(display: Display) -> Report:
        return run_optimize(
            source,
            output,
            **chosen.selected(display),
            verify=not no_verify,
            inputs=inputs or (),
            dry_run=dry_run,
            progress=display,
        ).report

    _carry_out(run, report, verbose, quiet)


@app.command()
@takes_passes
def export(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A folder with a checkpoint of Transformers.")
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A folder.")],
    task: Annotated[str, typer.Option(help="What for, as Optimum names it.")] = "auto",
    dtype: Annotated[Dtype, typer.Option(help="The type of the weights.")] = "fp32",
    *,
    chosen: PassOptions,
    report: ReportOption = None,
    no_verify: NoVerifyOption = False,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Export MODEL to ONNX with Optimum, optimise it, and write the result to OUT."""

    def run(display: Display) -> Report:
        return run_export(
            model,
            output,
            task=task,
            dtype=dtype,
            **chosen.selected(display),
            verify=not no_verify,
            progress=display,
        ).report

    _carry_out(run, report, verbose, quiet)


@app.command()
def verify(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE")],
    inputs: InputsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prove that CANDIDATE computes what REFERENCE computes: two files or two folders."""
    with errors(), Display(as_json):
        result = run_verify(reference, candidate, inputs=inputs or ())
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        print_verification(result, Console(), verbose=True)
    if result.status != "passed":
        raise typer.Exit(FAILED)


@app.command()
def bench(
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE", help="A .onnx file, a folder, or 'demo'.")
    ],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="Likewise.")],
    batch: Annotated[str, typer.Option(metavar="A,B", help="Rows that run together.")] = "1,8,32",
    cached: Annotated[
        str, typer.Option(metavar="A,B", help="Tokens in the caches of a decode step.")
    ] = "128,1024,4096",
    prompt: Annotated[
        str, typer.Option(metavar="A,B", help="Tokens of a prompt, or of a text without caches.")
    ] = "512",
    encoder: Annotated[
        int | None,
        typer.Option(metavar="N", help="Positions of an encoder's output, where it is open."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(metavar="N", help="Pairs of runs; by default, by the time.")
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", help="Time for each workload.")] = 2.0,
    threads: Annotated[int, typer.Option(metavar="N", help="0: ONNX Runtime chooses.")] = 0,
    provider: Annotated[Provider, typer.Option(help="Where the models run.")] = "cpu",
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Skip peak memory, which takes processes.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--json", metavar="FILE.json", help="Write JSON too.")
    ] = None,
) -> None:
    """Time CANDIDATE beside REFERENCE in ONNX Runtime: prompts and decode steps, in pairs."""
    with errors(), Display(quiet=False) as display:
        found = run_compare(
            reference,
            candidate,
            batch=numbers(batch, "--batch"),
            cached=numbers(cached, "--cached"),
            prompt=numbers(prompt, "--prompt"),
            encoder=encoder,
            rounds=rounds,
            seconds=seconds,
            threads=threads,
            provider=provider,
            memory=not no_memory,
            progress=display,
        )
    if report is not None:
        write_json(report, comparison_data(found))
    print_comparison(found, Console())


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
    with errors(), Display(as_json) as display:
        found = run_inspect(
            source, batches=numbers(batch, "--batch"), context=context, progress=display
        )
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


def _carry_out(
    run: Callable[[Display], Report], path: Path | None, verbose: bool, quiet: bool
) -> None:
    """Run, and show the report, that of a run whose proof failed too."""
    console = Console(quiet=quiet)
    with errors(), Display(quiet) as display:
        try:
            done = run(display)
        except ParityError as error:
            if error.report is not None:
                _finish(error.report, path, console, verbose)
            raise
    _finish(done, path, console, verbose)


def _finish(done: Report, path: Path | None, console: Console, verbose: bool) -> None:
    if path is not None:
        write_json(path, done.to_dict())
    print_report(done, console, verbose=verbose)
