"""The way from the heads of an attention's result to one row of channels for each token."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnx_tricks.patterns.axes import Axes
from onnx_tricks.patterns.dry_run import DryRun, Unknown
from onnx_tricks.patterns.linear import Linear, find_linear

__all__ = ["find_merged"]

_VIEWS = frozenset("Cast Dropout Flatten Identity Reshape Squeeze Transpose Unsqueeze".split())
_MAX_NODES = 20


def find_merged(
    run: DryRun, context: ir.Value, axes: Axes, heads: int
) -> tuple[ir.Value | None, Linear | None]:
    """Find the heads of an attention merged into rows, and the linear layer that reads these.

    Args:
        run: The dry run of the model.
        context: Attention weights times values.
        axes: What its axes run over.
        heads: H.

    Returns:
        The value whose rows, one a token, hold the heads side by side, and the layer that alone
        reads it; None for what there is not.
    """
    value, merged = context, None
    for _ in range(_MAX_NODES):
        if _is_merged(run, context, value, axes, heads):
            merged = value
        reader = _only_reader(value)
        if reader is None or reader.op_type not in _VIEWS or reader.domain != "":
            break
        value = reader.outputs[0]
    reader = _only_reader(merged) if merged is not None else None
    linear = find_linear(reader, 0, -1) if reader is not None else None
    return merged, linear if isinstance(linear, Linear) else None


def _only_reader(value: ir.Value) -> ir.Node | None:
    readers = [one for one in value.consumers() if one.op_type not in ("Shape", "Size")]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _is_merged(run: DryRun, context: ir.Value, value: ir.Value, axes: Axes, heads: int) -> bool:
    """Whether rows of a value hold the heads side by side."""
    shape, found = run.shape(context), run.shape(value)
    if shape is None or found is None or len(found) not in (2, 3):
        return False
    if axes == ("b", "s", "hk"):
        shape, axes = (*shape[:2], heads, shape[2] // heads), ("b", "s", "h", "k")
    lead = axes[:-1]
    if len(shape) != len(lead) + 1 or found[-1] != heads * shape[-1]:
        return False
    labels = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    start = labels.reshape(run.shape(context) or shape)
    try:
        merged = run.replay(value, {context: start})
    except Unknown:
        return False
    # Factors of the leading axes, in the order of the axes.
    lengths = dict(zip("bhs", _lengths(shape, lead, heads), strict=True))
    letters = [letter for one in lead for letter in one]
    parts = [lengths[letter] for letter in letters]
    if int(np.prod(parts)) * shape[-1] != labels.size:
        return False
    split = labels.reshape(*parts, shape[-1])
    order = [letters.index(letter) for letter in "bsh" if letter in letters]
    straight = np.transpose(split, (*order, len(parts))).reshape(found)
    return bool(np.array_equal(straight, merged))


def _lengths(shape: tuple[int, ...], lead: tuple[str, ...], heads: int) -> tuple[int, int, int]:
    """Lengths of batch, heads and tokens."""
    batch = tokens = 1
    for length, letters in zip(shape, lead, strict=False):
        rest = length // heads if "h" in letters else length
        if "b" in letters:
            batch = rest
        elif "s" in letters:
            tokens = rest
    return batch, heads, tokens
