"""Heads that are an input of the graph, as those of an encoder in later steps are."""

from __future__ import annotations

import numpy as np

from onnx_tricks.patterns.axes import complete, read_axes
from onnx_tricks.patterns.cache import Cache
from onnx_tricks.patterns.dry_run import DryRun
from onnx_tricks.patterns.head_path import Path, scale_between
from onnx_tricks.patterns.heads import Heads, Operand

__all__ = ["given_heads"]


def given_heads(run: DryRun, operand: Operand, path: Path) -> Heads | str:
    """Read heads whose path ends where no node computes them; or say what stands in the way.

    Args:
        run: The dry run of the model.
        operand: What is multiplied as heads.
        path: The way back from it.

    Raises:
        Unknown: An operator on the way is not known.
    """
    source = path.end
    shape = run.shape(source)
    if not source.is_graph_input():
        return f"{source.name!r} is a constant"
    if shape is None or path.appended is not None or path.norms or path.rotary:
        return f"{source.name!r} is an input that is changed before it is multiplied"
    labels = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    sent = run.replay(operand.value, {**path.given, source: labels})
    found = operand.unpack(sent)
    index = np.unravel_index(found.astype(np.int64), shape)
    # The operand tells what the axes of the input stand for: [..., tokens, channels].
    letters: dict[int, str] = {}
    for axis, coordinate in enumerate(index):
        moved = read_axes({"x": coordinate})
        places = [place - found.ndim for place, one in enumerate(moved) if one]
        if len(places) > 1:
            return f"{source.name!r} is arranged in a way that cannot be told"
        if places and places[0] >= -2:
            letters[axis] = {-2: "s", -1: "k"}[places[0]]
    rest = [axis for axis in range(len(shape)) if axis not in letters]
    letters |= dict(zip(rest, "bh", strict=False))
    axes = tuple(letters.get(axis, "") for axis in range(len(shape)))
    coordinates = dict(zip(axes, index, strict=True))
    none = np.zeros_like(index[0])
    heads, batch = (coordinates.get(letter, none) for letter in "hb")
    lines, rows = (one.reshape(-1, *one.shape[-2:])[:, 0, 0] for one in (heads, batch))
    scale = scale_between(run, operand.value, source)
    if scale is None:
        return f"{source.name!r} is an input that is changed before it is multiplied"
    direct = np.unravel_index(sent.astype(np.int64), shape)
    return Heads(
        operand.value,
        axes=complete(read_axes(dict(zip(axes, direct, strict=True)))),
        lead=complete(read_axes(coordinates))[:-2],
        order=lines[rows == 0],
        state=source,
        state_axes=axes,
        state_order=np.arange(int(heads.max()) + 1),
        scale=scale,
        head_width=int(coordinates.get("k", none).max()) + 1,
        cache=Cache(source, None, source, None, None, axes, axes),
        input=source,
    )
