"""The survey as a page: docs/coverage.md."""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence

from tests.coverage.principles import NO_CACHE, PRINCIPLES, principle
from tests.coverage.survey import Cell, Outcome

__all__ = ["defects", "page"]

_PASSES = ("fold-norm", "precompute-first-layer", "slim-attention")
_LETTERS = dict(zip(PRINCIPLES, string.ascii_letters, strict=False))
_HEAD = """# Coverage

What each trick does to each family of models, as each exporter writes it. `make coverage` exports
tiny models with random weights, runs the tricks on every export, runs the results, and writes this
page. Errors are relative, in the Euclidean norm, of all outputs on prompts and on steps behind
them, against the same model in PyTorch in float64; a result may have twice the error of the export
it was made from. Counts are sites rewritten of sites found. `merge-skipless` and `defer-norm` are
left out: no family here is without skip connections, and deferring a division changes no number of
them.
"""
_COLUMNS = ("family", "norms", "error", *_PASSES, "cache", "all tricks")


def page(cells: Sequence[Cell]) -> str:
    """Write the page.

    Args:
        cells: In the order of the rows.
    """
    return "\n".join((_HEAD, *_summary(cells), *_reasons(), *_tables(cells), *_missing(cells)))


def defects(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield what is wrong: answers, crashes, and sites missed for no reason of principle."""
    for cell in cells:
        where = f"{cell.family} {cell.exporter}"
        for name, one in cell.tricks.items():
            if one.problem:
                yield f"{where} {name}: {one.problem}"
            for trick in _PASSES:
                for reason in _reasons_of(one, trick):
                    if principle(trick, reason) is None:
                        yield f"{where} {name}: {trick} skipped a site: {reason}"
        if cell.tricks and "all" in cell.tricks and not cell.tricks["all"].problem:
            yield from (f"{where}: {text}" for text in _unseen(cell))


def _unseen(cell: Cell) -> Iterator[str]:
    """What no pass says a word of."""
    outcome = cell.tricks.get("fold-norm") or cell.tricks["all"]
    sites = _found(outcome, "fold-norm")
    if sites < cell.norms:
        yield f"fold-norm sees {sites} norms where PyTorch runs {cell.norms}"
    if outcome.cache[0] and not _found(cell.tricks["all"], "slim-attention"):
        yield "slim-attention sees no layer"


def _found(outcome: Outcome, trick: str) -> int:
    return outcome.applied.get(trick, 0) + len(outcome.skipped.get(trick, ()))


def _summary(cells: Sequence[Cell]) -> Iterator[str]:
    surveyed = [cell for cell in cells if not cell.missing]
    families = {cell.family for cell in surveyed}
    problems = sum(bool(one.problem) for cell in surveyed for one in cell.tricks.values())
    yield (
        f"{len(surveyed)} exports of {len(families)} families: {problems} wrong answers, crashes "
        "and models that do not run.\n"
    )
    yield "| trick | sites rewritten | families where it applies | wherever it can |"
    yield "|---|---:|---:|---:|"
    for trick in _PASSES:
        results = [(cell.family, _result(cell, trick)) for cell in surveyed]
        sites = sum(one.applied.get(trick, 0) for _, one in results)
        applies = {family for family, one in results if one.applied.get(trick)}
        missed = {family for family, one in results if _missed(one, trick)}
        whole = len(applies - missed) / (len(applies | missed) or 1)
        yield f"| {trick} | {sites} | {len(applies)} | in {whole:.0%} of the families |"
    yield ""


def _missed(outcome: Outcome, trick: str) -> bool:
    """Whether a site was left out for no reason of principle."""
    return any(principle(trick, reason) is None for reason in _reasons_of(outcome, trick))


def _reasons_of(outcome: Outcome, trick: str) -> list[str]:
    reasons = outcome.skipped.get(trick, [])
    if trick == "slim-attention" and not outcome.cache[0]:
        return [NO_CACHE] * len(reasons)
    return reasons


def _reasons() -> Iterator[str]:
    yield "## Where a trick cannot apply\n"
    yield "Letters behind counts say why sites are left as they are.\n"
    yield "| | trick | reason |\n|---|---|---|"
    for one, letter in _LETTERS.items():
        yield f"| {letter} | {one.trick} | {one.sentence} |"
    yield ""


def _tables(cells: Sequence[Cell]) -> Iterator[str]:
    surveyed = (cell for cell in cells if not cell.missing)
    for exporter, group in itertools.groupby(surveyed, key=lambda cell: cell.exporter):
        yield f"## Exported by {exporter}\n"
        yield f"| {' | '.join(_COLUMNS)} |\n|---|{'---:|' * (len(_COLUMNS) - 1)}"
        yield from (f"| {' | '.join(_row(cell))} |" for cell in group)
        yield ""


def _row(cell: Cell) -> Iterator[str]:
    everything = cell.tricks["all"]
    yield cell.family
    yield str(cell.norms)
    yield f"{everything.before:.1e}"
    for trick in _PASSES:
        outcome = _result(cell, trick)
        letters = Counter(_letter(trick, one) for one in _reasons_of(outcome, trick))
        text = f"{outcome.applied.get(trick, 0)}/{_found(outcome, trick)}"
        text += "".join(f" {letter}" for letter in sorted(letters))
        alone = trick in cell.tricks and outcome.applied.get(trick)
        yield text + (f" ({outcome.after:.1e})" if alone else "")
    before, after = everything.cache
    yield "" if not before else f"{before} → {after}"
    yield everything.problem or f"{everything.after:.1e}"


def _result(cell: Cell, trick: str) -> Outcome:
    """The run of a trick alone, or that of all."""
    return cell.tricks.get(trick) or cell.tricks["all"]


def _letter(trick: str, reason: str) -> str:
    known = principle(trick, reason)
    return "?" if known is None else _LETTERS[known]


def _missing(cells: Sequence[Cell]) -> Iterator[str]:
    yield "## Not surveyed\n"
    yield "Families that an exporter does not write, or writes so that the file itself is wrong.\n"
    yield "| exporter | reason | families |\n|---|---|---|"
    groups: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if cell.missing:
            groups.setdefault((cell.exporter, _brief(cell)), []).append(cell.family)
    for (exporter, reason), families in groups.items():
        yield f"| {exporter} | {reason} | {', '.join(families)} |"


def _brief(cell: Cell) -> str:
    """A reason without the name of the family and what breaks a table."""
    text = re.sub(r"\x1b?\[\d+m", "", cell.missing).replace("|", "/").replace("\n", " ")
    if "custom or unsupported architecture" in text or "does not know models like" in text:
        return "does not know the architecture"
    return text[:120]
