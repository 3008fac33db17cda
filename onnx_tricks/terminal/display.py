"""What a command shows while it works, what it leaves, and how it fails."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import typer
from rich.console import Console
from tqdm import tqdm

from onnx_tricks.errors import ModelError, TricksError, UsageError

__all__ = ["FAILED", "Display", "errors", "write_json"]

FAILED, _BAD = 1, 2
"""Exit statuses: the proof failed; the call or its input is wrong."""


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Turn the errors of the package into a message and an exit status."""
    try:
        yield
    except TricksError as error:
        print(f"onnx-tricks: {error}", file=sys.stderr)
        bad = isinstance(error, (ModelError, UsageError))
        raise typer.Exit(_BAD if bad else FAILED) from None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a report to a file, or end with a message."""
    with errors():
        try:
            path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"the report cannot be written: {error}") from error


class Display:
    """What the run is doing, on a terminal's stderr; silence anywhere else.

    Args:
        quiet: Whether to be silent on a terminal too.
    """

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
        """Say what the run is doing now."""
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
