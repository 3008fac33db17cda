"""Which cases a model is run on: prompts of several lengths, batches with left padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from onnx_tricks.graph.interface import Interface
from onnx_tricks.runtime.sessions import Array
from onnx_tricks.verify.cases import Case
from onnx_tricks.verify.inputs import Builder, Given, Shape, guesses

__all__ = ["plans", "prompts", "text"]

# The error that a rounded cache brings shows where there is much to remember, and averages out.
_LONG = (Shape(1, 256, (1,) * 8), Shape(2, 128, (1,) * 4, padded=True))
_FULL = (Shape(1, 7, (1, 1, 4)), Shape(2, 33, (1, 1), padded=True), Shape(2, 1, (1,)))
_PLANS = (
    _FULL,
    tuple(dataclasses.replace(shape, padded=False) for shape in _FULL),
    (Shape(1, 7, (1, 1)), Shape(1, 33, (1,)), Shape(1, 1, (1,))),
    (Shape(1, 1, (1, 1, 1)), Shape(1, 1, (1,))),
    (Shape(1, 4), Shape(1, 1)),
    (Shape(2, 16),),  # what Optimum traces a model with
    (Shape(1, 1),),
)


def plans(interface: Interface, given: Given, *, long: bool = False) -> Iterator[tuple[Case, ...]]:
    """Yield sets of cases, from the richest to the simplest that a model may ask for.

    Args:
        interface: The model's interface.
        given: Values that another model of the same export computes, by input name and batch
            size (the states of an encoder, filled caches); None where it has none.
        long: Whether to begin with prompts of hundreds of tokens.
    """
    tokens = bool(interface.role("ids"))
    seen = set()
    for shapes in (_LONG, *_PLANS) if long else _PLANS:
        fixed = tuple(dict.fromkeys(_fix(interface, shape) for shape in shapes))
        if not tokens:
            # The largest batch holds the cases of the others.
            fixed = (Shape(max(s.batch for s in fixed), 1),)
        if fixed not in seen:
            seen.add(fixed)
            for guess in guesses(interface):
                yield tuple(Builder(interface, given, shape, guess).case() for shape in fixed)


def prompts(interface: Interface, given: Given, batch: int, tokens: int) -> Iterator[Case]:
    """Yield single runs of one batch; what else a model leaves open differs among them.

    Args:
        interface: The model's interface.
        given: As for `plans`.
        batch: Number of rows, where the model does not fix it.
        tokens: Length of the rows, where there are tokens and the model does not fix it.
    """
    shape = _fix(interface, Shape(batch, tokens))
    for guess in guesses(interface):
        yield Builder(interface, given, shape, guess).case()


def text(interface: Interface, given: Given, ids: Array, steps: tuple[int, ...] = ()) -> Case:
    """Make a case of a text: a prompt, and its last tokens in steps.

    Args:
        interface: The interface of a model that takes tokens, and caches that may be empty.
        given: As for `plans`.
        ids: The tokens, [B, T].
        steps: Numbers of tokens, less than T together.
    """
    shape = Shape(len(ids), ids.shape[1] - sum(steps), steps)
    builder = Builder(interface, given, shape, next(guesses(interface)), ids)
    return dataclasses.replace(builder.case(), name="text of its own", apart=True, again=None)


def _fix(interface: Interface, shape: Shape) -> Shape:
    """Fit the shape of a case to what the model declares."""
    for value in interface.inputs:
        axis = value.rows if value.role == "cache" else 0
        rows = value.dims[axis] if value.dims else None
        if isinstance(rows, int) and value.role in ("ids", "mask", "cache"):
            shape = dataclasses.replace(shape, batch=rows)
        second = value.dims[1] if len(value.dims) > 1 else None
        if isinstance(second, int) and value.role == "ids":
            steps = (second,) * len(shape.steps)
            shape = dataclasses.replace(shape, prompt=second, steps=steps)
    can_pad = interface.left_padding and bool(interface.role("mask"))
    steps = shape.steps if interface.presents else ()
    return dataclasses.replace(shape, padded=shape.padded and can_pad, steps=steps)
