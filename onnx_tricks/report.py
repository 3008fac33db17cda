"""What a run did, as data (`--report`) and as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from onnx_tricks.graph.sizes import Sizes
from onnx_tricks.rewrite import PassResult, Skip
from onnx_tricks.verify import Verification

__all__ = ["PassReport", "Report", "print_report", "print_verification"]

_MOST_REASONS = 8


@dataclasses.dataclass
class PassReport:
    """What one pass did to all files of a run."""

    name: str
    applied: int = 0
    skipped: list[Skip] = dataclasses.field(default_factory=list)
    details: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def add(self, result: PassResult, prefix: str = "") -> None:
        """Count in what the pass did to one file."""
        self.applied += result.count
        self.skipped += [Skip(f"{prefix}{skip.node}", skip.reason) for skip in result.skipped]
        for site in result.applied:
            self.details += [{**row, "node": f"{prefix}{row['node']}"} for row in site.details()]
        self.seconds += result.seconds


@dataclasses.dataclass
class Report:
    """What a run did.

    Attributes:
        input: The input as given; empty for a model in memory.
        output: Where the result was written; None when it was not.
        seconds: Wall time of the whole run.
        peak_rss_bytes: The most memory the process ever held.
        passes: What each pass did.
        before: Sizes of the input.
        after: Sizes of the result.
        verification: Whether the result computes what the input computes.
    """

    input: str
    output: str | None
    passes: list[PassReport]
    before: Sizes
    after: Sizes
    verification: Verification
    seconds: float = 0.0
    peak_rss_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, with the keys that `--report` promises."""
        pairs = {
            field.name: {
                "before": getattr(self.before, field.name),
                "after": getattr(self.after, field.name),
            }
            for field in dataclasses.fields(Sizes)
        }
        if pairs["cache_values_per_token"]["before"] is None:
            pairs["cache_values_per_token"] = None  # type: ignore[assignment]
        return {
            "input": self.input,
            "output": self.output,
            "seconds": round(self.seconds, 3),
            "peak_rss_bytes": self.peak_rss_bytes,
            "passes": [dataclasses.asdict(one) for one in self.passes],
            **pairs,
            "verification": self.verification.to_dict(),
        }


def print_report(report: Report, console: Console, *, verbose: bool = False) -> None:
    """Print a report as tables: passes, refusals with reasons, sizes, verification."""
    console.print(_passes(report), _refusals(report, verbose), _sizes(report), sep="\n")
    if verbose:
        for one in report.passes:
            if one.details:
                console.print(_details(one))
    print_verification(report.verification, console, verbose=verbose)
    console.print(
        f"{report.seconds:.1f} s, peak memory {report.peak_rss_bytes / 2**20:,.0f} MiB; "
        + (f"written to {escape(report.output)}" if report.output else "nothing written"),
        highlight=False,
        soft_wrap=True,
    )


def print_verification(result: Verification, console: Console, *, verbose: bool = False) -> None:
    """Print the outcome of a verification in a line or two."""
    colour = {"passed": "green", "failed": "red"}.get(result.status, "yellow")
    line = f"[{colour}]verification {result.status}[/{colour}]"
    if result.error_before is not None and result.error_after is not None:
        line += (
            f": error {result.error_after:.2e} (original {result.error_before:.2e}) against "
            f"{result.reference}, {_counted(result)}"
        )
    console.print(line, highlight=False, soft_wrap=True)
    if result.message and (verbose or result.status != "passed" or result.reference == "sites"):
        console.print(escape(result.message), highlight=False, soft_wrap=True)


def _counted(result: Verification) -> str:
    unit = "region" if result.reference == "sites" else "case"
    given = f" ({result.given} given)" if result.given else ""
    return f"{result.cases} {unit}{'' if result.cases == 1 else 's'}{given}"


def _passes(report: Report) -> RenderableType:
    table = Table("pass")
    for name in ("applied", "skipped", "seconds"):
        table.add_column(name, justify="right")
    for one in report.passes:
        table.add_row(one.name, str(one.applied), str(len(one.skipped)), f"{one.seconds:.2f}")
    return table


def _details(report: PassReport) -> RenderableType:
    names = list(dict.fromkeys(name for row in report.details for name in row))
    table = Table(*(name.replace("_", " ") for name in names), title=report.name)
    for row in report.details:
        table.add_row(*(escape(str(row.get(name, ""))) for name in names))
    return table


def _refusals(report: Report, verbose: bool) -> RenderableType:
    lines: list[Text] = []
    for one in report.passes:
        shown = one.skipped if verbose else one.skipped[:_MOST_REASONS]
        lines += [Text(f"{one.name} skipped {skip.node}: {skip.reason}") for skip in shown]
        if len(shown) < len(one.skipped):
            lines.append(Text(f"... and {len(one.skipped) - len(shown)} more (-v shows all)"))
    return Group(*lines)


def _sizes(report: Report) -> RenderableType:
    table = Table("")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for field in dataclasses.fields(Sizes):
        before, after = (getattr(one, field.name) for one in (report.before, report.after))
        if before is not None and after is not None:
            name = field.name.replace("_", " ")
            table.add_row(name, f"{before:,}", f"{after:,}", f"{after - before:+,}")
    return table
