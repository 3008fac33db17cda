"""Build valid inputs: prompts of several lengths, batches with left padding, images, features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.interface import Input, Interface
from onnx_tricks.runtime.sessions import Array

__all__ = ["Case", "Step", "plans", "prompts"]

# Sizes of dimensions of which only the name is known: small, and no two alike.
_ODD_SIZES = (33, 7, 5, 11, 13, 17, 19, 23)


@dataclasses.dataclass(frozen=True)
class Step:
    """One run of a model.

    Attributes:
        feeds: Inputs by name, without the caches.
        valid: Which positions hold tokens and not padding, [B, past + new], bool; None for
            models without tokens.
        new: Number of positions that are new in this step.
    """

    feeds: Mapping[str, Array]
    valid: Array | None = None
    new: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and the steps that decode after it, or a single run.

    Attributes:
        name: What a message calls it.
        batch: Number of rows.
        caches: What the caches hold before the first step, by input name.
        steps: The runs, in order.
    """

    name: str
    batch: int
    caches: Mapping[str, Array]
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Of a case: batch size, prompt length, lengths of later steps, left padding."""

    batch: int
    prompt: int
    steps: tuple[int, ...] = ()
    padded: bool = False


_SOUND = 16_000  # samples in a second, as speech models take it

# The error that a rounded cache brings shows where there is much to remember, and averages out.
_LONG = (
    _Shape(1, 256, (1,) * 8),
    _Shape(2, 128, (1,) * 4, padded=True),
    _Shape(1, 7, (1, 1, 4)),
)
_FULL = (_Shape(1, 7, (1, 1, 4)), _Shape(2, 33, (1, 1), padded=True), _Shape(2, 1, (1,)))
_PLANS = (
    _FULL,
    tuple(dataclasses.replace(shape, padded=False) for shape in _FULL),
    (_Shape(1, 7, (1, 1)), _Shape(1, 33, (1,)), _Shape(1, 1, (1,))),
    (_Shape(1, 1, (1, 1, 1)), _Shape(1, 1, (1,))),
    (_Shape(1, 4), _Shape(1, 1)),
    (_Shape(1, 1),),
)

Given = Callable[[str, int], "Array | None"]


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
    for size in _sizes(interface):
        for shapes in (_LONG, *_PLANS) if long else _PLANS:
            fixed = tuple(dict.fromkeys(_fix(interface, shape) for shape in shapes))
            if not tokens:
                # The largest batch holds the cases of the others.
                fixed = (_Shape(max(s.batch for s in fixed), 1),)
            if (fixed, size) not in seen:
                seen.add((fixed, size))
                yield tuple(_Builder(interface, given, s, size).case() for s in fixed)


def prompts(interface: Interface, given: Given, batch: int, tokens: int) -> Iterator[Case]:
    """Yield single runs of one batch; what else a model leaves open differs among them.

    Args:
        interface: The model's interface.
        given: As for `plans`.
        batch: Number of rows, where the model does not fix it.
        tokens: Length of the rows, where there are tokens and the model does not fix it.
    """
    shape = _fix(interface, _Shape(batch, tokens))
    for size in _sizes(interface):
        yield _Builder(interface, given, shape, size).case()


def _sizes(interface: Interface) -> tuple[int, ...]:
    """What to try where only the name of a dimension is known: images, sounds; 0 is a small one."""
    return (0,) if interface.role("ids") else (*interface.image_sizes, _SOUND)


def _fix(interface: Interface, shape: _Shape) -> _Shape:
    """Fit the shape of a case to what the model declares."""
    for value in interface.inputs:
        first = value.dims[0] if value.dims else None
        if isinstance(first, int) and value.role in ("ids", "mask", "cache"):
            shape = dataclasses.replace(shape, batch=first)
        second = value.dims[1] if len(value.dims) > 1 else None
        if isinstance(second, int) and value.role == "ids":
            shape = dataclasses.replace(shape, prompt=second, steps=())
    can_pad = interface.left_padding and bool(interface.role("mask"))
    steps = shape.steps if interface.presents else ()
    return dataclasses.replace(shape, padded=shape.padded and can_pad, steps=steps)


class _Builder:
    """Builds one case."""

    def __init__(self, interface: Interface, given: Given, shape: _Shape, size: int) -> None:
        self.interface = interface
        self.given = given
        self.shape = shape
        self.size = size
        self.symbols: dict[str, int] = {}
        # Seeded by what the case is, so that equal cases of two runs hold equal numbers.
        self.random = np.random.default_rng((shape.batch, shape.prompt, len(shape.steps)))

    def case(self) -> Case:
        shape = self.shape
        caches = {v.name: self._cache(v) for v in self.interface.role("cache")}
        filled = {n: a for n, a in caches.items() if a.shape[2:3] != (0,) and "encoder" not in n}
        past = next((a.shape[2] for a in filled.values() if a.ndim > 2), 0)
        # A decoder whose caches another model fills goes on from there, token by token.
        lengths = (1,) * (1 + len(shape.steps)) if past else (shape.prompt, *shape.steps)
        padding = shape.prompt * 2 // 3 if shape.padded and not past else 0
        steps = []
        for index, new in enumerate(lengths):
            valid = np.ones((shape.batch, past + new), bool)
            valid[1::2, :padding] = False
            feeds = {
                value.name: self._value(value, valid, new, index)
                for value in self.interface.inputs
                if value.role != "cache"
            }
            steps.append(Step(feeds, valid if self.interface.role("ids") else None, new))
            past += new
        name = f"batch {shape.batch}"
        if self.interface.role("ids"):
            name += f", {shape.prompt} tokens" + (" with left padding" if padding else "")
        return Case(name, shape.batch, caches, tuple(steps))

    def _value(self, value: Input, valid: Array, new: int, index: int) -> Array:
        shape = self.shape
        given = self.given(value.name, shape.batch)
        if given is not None:
            return given
        if value.role == "ids":
            return self.random.integers(0, value.limit or 2, (shape.batch, new))
        if value.role == "branch":
            return np.array([index > 0])
        if value.role == "positions":
            positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)[:, -new:]
            return positions if len(value.dims) == 2 else np.arange(valid.shape[1])[-new:]
        if value.role == "mask":
            encoder = "encoder" in value.name.replace("decoder", "")
            dims = self._dims(value)
            return np.ones(dims, np.int64) if encoder else valid.astype(np.int64)
        dims = self._dims(value)
        if value.dtype.is_floating_point():
            array = self.random.standard_normal(dims).astype(np.float32)
            # What the model reads and what the float64 reference reads is the same number.
            return array.astype(np.float16) if value.dtype == ir.DataType.FLOAT16 else array
        if value.dtype == ir.DataType.BOOL or "mask" in value.name:
            return np.ones(dims, np.int64)
        return self.random.integers(0, value.limit or 2, dims)

    def _cache(self, value: Input) -> Array:
        given = self.given(value.name, self.shape.batch)
        if given is not None:
            return given
        # An empty past is where decoding starts; a cache that nothing continues has to hold some.
        length = 0 if value.name in self.interface.presents else _ODD_SIZES[1]
        dims = [d if isinstance(d, int) else length for d in value.dims]
        return self.random.standard_normal([self.shape.batch, *dims[1:]]).astype(np.float32)

    def _dims(self, value: Input) -> tuple[int, ...]:
        return tuple(self._size(value, axis, dim) for axis, dim in enumerate(value.dims))

    def _size(self, value: Input, axis: int, dim: int | str | None) -> int:
        if isinstance(dim, int):
            return dim
        name = dim or f"{value.name}.{axis}"
        if "batch" in name or axis == 0:
            return self.shape.batch
        if len(value.dims) == 4 and axis == 1:
            return 3  # colours
        if len(value.dims) == 4 and self.size < _SOUND:
            return self.size or _ODD_SIZES[0]
        if len(value.dims) < 4 and self.size == _SOUND:
            return _SOUND
        if name not in self.symbols:
            self.symbols[name] = _ODD_SIZES[len(self.symbols) % len(_ODD_SIZES)]
        return self.symbols[name]
