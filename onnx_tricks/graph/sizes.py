"""What a model costs: parameters, bytes, nodes, numbers kept per token of context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import onnx_ir as ir

from onnx_tricks.graph.constants import stored_tensor
from onnx_tricks.graph.interface import read_interface

__all__ = ["Sizes", "measure"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one model.

    Attributes:
        parameters: Elements of all floating-point constants.
        bytes: Bytes of all constants, as stored.
        nodes: Operators at every depth, without Constant nodes.
        cache_values_per_token: Numbers that the cache inputs hold for one token of one sequence;
            None where the model has no cache of known layout.
    """

    parameters: int
    bytes: int
    nodes: int
    cache_values_per_token: int | None

    def __add__(self, other: Sizes) -> Sizes:
        """Sizes of two files of one model."""
        caches = [c for c in (self.cache_values_per_token, other.cache_values_per_token) if c]
        return Sizes(
            self.parameters + other.parameters,
            self.bytes + other.bytes,
            self.nodes + other.nodes,
            # The files of a decoder (prompt, step, both merged) keep one and the same cache.
            max(caches, default=None),
        )


def measure(model: ir.Model) -> Sizes:
    """Measure a model; no weight is read."""
    tensors = list(_tensors(model))
    return Sizes(
        parameters=sum(t.size for t in tensors if t.dtype.is_floating_point()),
        bytes=sum(t.nbytes for t in tensors),
        nodes=sum(node.op_type != "Constant" for node in model.graph.all_nodes()),
        cache_values_per_token=_cache_values(model),
    )


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            if (
                node.op_type == "Constant"
                and (tensor := stored_tensor(node.outputs[0])) is not None
            ):
                yield tensor


def _cache_values(model: ir.Model) -> int | None:
    total = 0
    for cache in read_interface(model).role("cache"):
        if len(cache.dims) < 3 or cache.fixed:
            continue
        # What is left of [batch, heads, tokens, width] without the two axes that grow.
        grown = cache.rows, cache.growing
        rest = [dim for axis, dim in enumerate(cache.dims) if axis not in grown]
        known = [dim for dim in rest if isinstance(dim, int)]
        if len(known) < len(rest):
            return None
        total += math.prod(known)
    return total or None
