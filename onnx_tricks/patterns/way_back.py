"""Going back through a graph: what only arranges numbers, and which value was computed last."""

from __future__ import annotations

import onnx_ir as ir

from onnx_tricks.patterns.dry_run import DryRun

__all__ = ["VIEWS", "take_latest"]

VIEWS = frozenset(
    "Cast Dropout Expand Flatten Gather GatherND Identity Reshape Slice Split Squeeze Tile "
    "Transpose Unsqueeze".split()
)
"""Operators that arrange the numbers of their first input, repeat them, or pick some."""


def take_latest(run: DryRun, values: set[ir.Value]) -> ir.Node | None:
    """Take the value that is computed last out of some.

    Returns:
        The node that computes it; None where no node computes any of them.
    """

    def place(value: ir.Value) -> int:
        node = value.producer()
        return -1 if node is None else run.order[node]

    latest = max(values, key=place, default=None)
    values.discard(latest)
    return None if latest is None else latest.producer()
