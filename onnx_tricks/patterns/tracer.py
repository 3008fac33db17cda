"""Heads of queries, keys or values, traced to where they come from."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnx_tricks.patterns.dry_run import DryRun, Unknown
from onnx_tricks.patterns.given_heads import given_heads
from onnx_tricks.patterns.head_norm import HeadNorms
from onnx_tricks.patterns.head_path import Paths
from onnx_tricks.patterns.heads import Heads, Operand
from onnx_tricks.patterns.projected_heads import projected_heads
from onnx_tricks.patterns.quantised import quantised_behind

__all__ = ["Tracer"]


class Tracer:
    """Traces heads through one model.

    Attributes:
        run: The dry run of the model.
    """

    def __init__(self, model: ir.Model) -> None:
        """Prepare a model, whose shapes and types have been inferred."""
        self.run = DryRun(model)
        self._norms = HeadNorms(model)
        self._paths = Paths(self.run, self._norms)

    def trace_together(self, operands: Sequence[Operand]) -> list[Heads | str]:
        """Trace queries, keys and values, of which some may be what the others are made from.

        Args:
            operands: What is multiplied as heads.

        Returns:
            For each the heads, or what stands in the way.
        """
        found = [self._trace(one, self._paths) for one in operands]
        known = [one.projection for one in found if isinstance(one, Heads)]
        rows = {one.source for one in known if one is not None}
        if not rows or (len(rows) == 1 and None not in known and len(known) == len(found)):
            return found
        paths = Paths(self.run, self._norms, rows)
        return [self._trace(one, paths) for one in operands]

    def _trace(self, operand: Operand, paths: Paths) -> Heads | str:
        try:
            path = paths.back(operand.value)
            if isinstance(path, str):
                return quantised_behind(operand.value) or path
            read = projected_heads if path.projected else given_heads
            return read(self.run, operand, path)
        except Unknown as unknown:
            return str(unknown)
        except IndexError:
            return "the shapes on its way contradict each other"
