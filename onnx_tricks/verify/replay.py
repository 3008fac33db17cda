"""Cases of given inputs: what counts in them, and the like with other rounding errors."""

from __future__ import annotations

import dataclasses
import functools

import ml_dtypes
import numpy as np

from onnx_tricks.graph.interface import Input, Interface
from onnx_tricks.runtime.sessions import Array
from onnx_tricks.verify.cases import Case, Step
from onnx_tricks.verify.given import Sample
from onnx_tricks.verify.inputs import cached_tokens

__all__ = ["holds_past", "replay"]

_NUDGE = 8  # units in the last place: enough for every rounding behind to fall anew


def replay(sample: Sample, interface: Interface) -> Case:
    """Make a case of given inputs: one run, judged by itself.

    Args:
        sample: Inputs that fit the model.
        interface: The model's interface.
    """
    given = {
        v.name: (v, sample.arrays[v.name]) for v in interface.inputs if v.name in sample.arrays
    }
    batch = _batch(list(given.values()))
    caches = {
        name: given[name][1] if name in given else empty
        for name, empty in interface.empty_caches(batch).items()
    }
    feeds = {name: array for name, (_, array) in given.items() if name not in caches}
    for value in interface.role("branch"):
        feeds.setdefault(value.name, np.array([holds_past(sample, interface)]))
    valid = _valid(sample, interface)
    ids = [feeds[value.name].shape[1] for value in interface.role("ids")]
    new = ids[0] if ids else 0 if valid is None else valid.shape[1]
    step = Step(feeds, valid, new)
    again = functools.partial(_again, sample, interface, step)
    return Case(sample.name, batch, caches, (step,), apart=True, again=again)


def holds_past(sample: Sample, interface: Interface) -> bool:
    """Whether caches of a sample that decoding continues hold tokens."""
    given = sample.arrays
    own = [v for v in interface.inputs if v.name in interface.presents and v.name in given]
    return any(cached_tokens(value, given[value.name]) for value in own)


def _batch(given: list[tuple[Input, Array]]) -> int:
    """The number of rows: that of the tokens, where there are some."""
    order = sorted(given, key=lambda pair: pair[0].role != "ids")
    axes = [(array, v.rows if v.role == "cache" else 0) for v, array in order]
    return next((array.shape[axis] for array, axis in axes if array.ndim > axis), 1)


def _valid(sample: Sample, interface: Interface) -> Array | None:
    """Which positions hold tokens, where one mask of the model's own text tells."""
    masks = [
        sample.arrays[value.name].astype(bool)
        for value in interface.role("mask")
        if "attention_mask" in value.name and not value.dtype.is_floating_point()
        if "encoder" not in value.name.replace("decoder", "")
    ]
    # Of the texts of an encoder and a decoder no mask knows both.
    return masks[0] if len(masks) == 1 and masks[0].any() else None


def _again(sample: Sample, interface: Interface, step: Step, seed: int) -> Case:
    """The same inputs to within their own rounding, and the same tokens in another order.

    The ratio of two errors over few numbers is chance, and given inputs have no other seeds. All
    that is redrawn here is how everything behind them is rounded.
    """
    random = np.random.default_rng(seed)
    arrays = dict(sample.arrays)
    for value in interface.inputs:
        if value.name not in arrays:
            continue
        array = arrays[value.name]
        if value.dtype.is_floating_point():
            eps = float(ml_dtypes.finfo(array.dtype).eps)
            factor = 1 + _NUDGE * eps * random.uniform(-1, 1, array.shape)
            arrays[value.name] = (array.astype(np.float64) * factor).astype(array.dtype)
        elif value.role == "ids":
            arrays[value.name] = _reordered(array, step, random)
    return dataclasses.replace(replay(Sample(sample.name, arrays), interface), again=None)


def _reordered(ids: Array, step: Step, random: np.random.Generator) -> Array:
    """The tokens of every row in another order; padding stays where it is."""
    result = ids.copy()
    for row, tokens in enumerate(result):
        places = np.arange(ids.shape[1])
        if step.valid is not None and step.valid[:, -step.new :].shape == ids.shape:
            places = np.flatnonzero(step.valid[row, -step.new :])
        tokens[places] = random.permutation(tokens[places])
    return result
