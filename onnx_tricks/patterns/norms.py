"""All norms of a model, in every spelling that exporters use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import onnx_ir as ir

from onnx_tricks.graph.constants import scalar
from onnx_tricks.patterns.decomposed_norm import decomposed_norm, multiplied_out_norm
from onnx_tricks.patterns.fused_norm import fused_norm
from onnx_tricks.patterns.interior import interior
from onnx_tricks.patterns.norm import FUSED_NORMS, Norm, OpaqueNorm, norm_entries
from onnx_tricks.patterns.product import skip_casts

__all__ = ["find_norms"]


def find_norms(model: ir.Model) -> Iterator[Norm | OpaqueNorm]:
    """Yield every norm of a model in execution order, inner graphs included."""
    outputs: set[ir.Value] = set()
    whole = {node: norm for node in model.graph.all_nodes() if (norm := multiplied_out_norm(node))}
    parts = {part for norm in whole.values() for part in interior(norm.output, norm.source)}
    for node in model.graph.all_nodes():
        found: Norm | OpaqueNorm | None = None
        if (node.domain, node.op_type) in FUSED_NORMS:
            found = fused_norm(node)
        elif node in whole:
            found = whole[node]
        elif node.domain == "" and node.op_type in ("Mul", "Div") and node not in parts:
            # A norm times a number is a reader of the norm, not one more norm.
            operands = [v for v in node.inputs if v is not None]
            if not any(skip_casts(v) in outputs for v in operands) or not any(
                map(scalar, operands)
            ):
                found = decomposed_norm(node)
        if found is not None:
            if isinstance(found, Norm):
                outputs.add(found.output)
                found = dataclasses.replace(found, entries=norm_entries(found))
            yield found
