"""Build valid inputs: token ids, masks, positions, caches, images, features."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.interface import Input, Interface
from onnx_tricks.runtime.sessions import Array
from onnx_tricks.verify.cases import Case, Step

__all__ = ["Builder", "Given", "Guess", "Shape", "cached_tokens", "guesses"]

# Sizes of dimensions of which only the name is known: small, and no two alike.
_ODD_SIZES = (33, 7, 5, 11, 13, 17, 19, 23)
_SOUND = 16_000  # samples in a second, as speech models take it
_MULTIPLES = (1, 4, 2, 8, 3, 9)
_SINGLE: tuple[tuple[int, ...], ...] = ((), (1,))  # sizes of an input that is one number

Given = Callable[[str, int], "Array | None"]


@dataclasses.dataclass(frozen=True)
class Guess:
    """Of what a model leaves open and its names do not tell.

    Attributes:
        image: Height and width of images.
        length: Of series of numbers; 0 where any may do.
        multiple: Rows of ids by rows of anything else.
        number: What an input that is one integer holds; 0 where it may be any.
        marked: Whether ids that the model looks for are among the tokens.
    """

    image: tuple[int, int]
    length: int
    multiple: int
    number: int
    marked: bool


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a case: batch size, prompt length, lengths of later steps, left padding, its numbers."""

    batch: int
    prompt: int
    steps: tuple[int, ...] = ()
    padded: bool = False
    seed: int = 0


def guesses(interface: Interface) -> Iterator[Guess]:
    """Yield what to try for what a model leaves open, the most likely first."""
    images: tuple[tuple[int, int], ...] = ((0, 0),)
    lengths: tuple[int, ...] = (0,)
    multiples: tuple[int, ...] = (1,)
    numbers: tuple[int, ...] = (0,)
    for value in interface.inputs:
        if value.image is not None:
            images = value.image.sizes
        elif value.role == "ids" and "_x_" in str(value.dims[0]):
            multiples = _MULTIPLES
        elif value.dtype.is_floating_point() and not interface.role("ids"):
            if value.dims in _SINGLE:
                continue
            wave = len(value.dims) == 2
            # Samples lie along one axis: as many along two would be gigabytes.
            late = not wave and sum(not isinstance(dim, int) for dim in value.dims[1:]) < 2
            lengths = (_SOUND,) * wave + (0, *interface.lengths) + (_SOUND,) * late
        elif value.role == "other" and value.dims in _SINGLE:
            numbers = (0, _ODD_SIZES[0])
    marked = (True, False) if any(v.markers for v in interface.role("ids")) else (False,)
    for choice in itertools.product(images, lengths, multiples, numbers, marked):
        yield Guess(*choice)


def cached_tokens(value: Input, cache: Array) -> int:
    """How many tokens a cache holds.

    Args:
        value: What the model declares of it.
        cache: Its numbers.
    """
    if cache.ndim < 3 or value.buffer:
        return 0
    return int(cache.shape[value.growing])


def _context(interface: Interface) -> set[str]:
    """The names of axes for all tokens of the context, as masks [.., T, S] have them."""
    tokens = {dim for value in interface.role("ids") for dim in value.dims[1:]}
    others = [value for value in interface.inputs if value.role in ("mask", "other")]
    masks = [value for value in others if len(value.dims) > 1 and value.dims[-2] in tokens]
    states = {dim for value in interface.role("other") if value not in masks for dim in value.dims}
    found = {value.dims[-1] for value in masks} - tokens - states
    return {name for name in found if isinstance(name, str)}


class Builder:
    """Builds one case.

    Args:
        interface: The model's interface.
        given: Values that another model of the same export computes, by input name and batch
            size (the states of an encoder, filled caches); None where it has none.
        shape: Of the case.
        guess: Of what the model leaves open.
        text: The tokens, [B, T]; random ones where there is none.
    """

    def __init__(
        self,
        interface: Interface,
        given: Given,
        shape: Shape,
        guess: Guess,
        text: Array | None = None,
    ) -> None:
        self._interface = interface
        self._given = given
        self._shape = shape
        self._guess = guess
        self._text = text
        self._symbols: dict[str, int] = {}  # sizes by the names of dimensions
        self._unnamed = list(_ODD_SIZES)
        self._kept: dict[tuple[str, tuple[int, ...]], Array] = {}
        self._context = _context(interface)
        for value in interface.inputs:
            array = given(value.name, shape.batch)
            if array is not None:
                self._name(value.dims[1:], array.shape[1:])
            elif value.image is not None:
                self._name(value.dims[2:], guess.image)
            elif guess.length and value.dtype.is_floating_point():
                self._name(value.dims[1:], [guess.length] * len(value.dims))
        # Seeded by what the case is, so that equal cases of two runs hold equal numbers.
        case = shape.batch, shape.prompt, len(shape.steps), shape.seed
        self._random = np.random.default_rng(case)

    def case(self) -> Case:
        """The case; to be asked for once."""
        shape = self._shape
        caches = {v.name: self._cache(v) for v in self._interface.role("cache")}
        own = [v for v in self._interface.role("cache") if "encoder" not in v.name]
        # Where decoding continues some caches, the others are those of an encoder.
        own = [v for v in own if v.name in self._interface.presents] or own
        past = next((n for v in own if (n := cached_tokens(v, caches[v.name]))), 0)
        # A decoder whose caches another model fills goes on from there, token by token.
        lengths = (1,) * (1 + len(shape.steps)) if past else (shape.prompt, *shape.steps)
        padding = shape.prompt * 2 // 3 if shape.padded and not past else 0
        steps = []
        for index, new in enumerate(lengths):
            valid = np.ones((shape.batch, past + new), bool)
            valid[1::2, :padding] = False
            for value in self._interface.role("ids"):
                self._name(value.dims[1:], (new,))
            self._symbols |= dict.fromkeys(self._context, past + new)
            feeds = {
                value.name: self._value(value, valid, new, index)
                for value in self._interface.inputs
                if value.role != "cache"
            }
            steps.append(Step(feeds, valid if self._interface.role("ids") else None, new))
            past += new
        name = f"batch {shape.batch}"
        if self._interface.role("ids"):
            name += f", {shape.prompt} tokens" + (" with left padding" if padding else "")
        return Case(name, shape.batch, caches, tuple(steps), again=self._again, of=self._of)

    def _again(self, seed: int) -> Case:
        shape = dataclasses.replace(self._shape, seed=seed)
        return Builder(self._interface, self._given, shape, self._guess).case()

    def _of(self, tokens: Array) -> Case:
        rows, length = self._shape.batch, self._shape.prompt + sum(self._shape.steps)
        ids = np.resize(tokens, (rows, length))
        return Builder(self._interface, self._given, self._shape, self._guess, ids).case()

    def _name(self, dims: Iterable[int | str | None], sizes: Iterable[int]) -> None:
        self._symbols |= {
            n: size for n, size in zip(dims, sizes, strict=False) if isinstance(n, str)
        }

    def _value(self, value: Input, valid: Array, new: int, index: int) -> Array:
        shape = self._shape
        given = self._given(value.name, shape.batch)
        if given is not None:
            return given
        if value.role == "ids" and self._text is not None:
            return self._text[:, : valid.shape[1]][:, -new:]
        if value.role == "ids":
            rows = shape.batch * self._guess.multiple
            ids = self._random.integers(0, value.limit or 2, (rows, new))
            if self._guess.marked:
                # At the end, where no padding is, and not next to each other.
                ends = range(2, new + 1, 2)
                for end, marker in zip(ends, value.markers, strict=False):
                    ids[:, -end] = marker
            return ids
        if value.role == "branch":
            return np.array([index > 0])
        if value.role == "positions":
            return value.places(valid, new)
        if value.role == "mask" and not self._masks_another(value, valid.shape[1]):
            return valid.astype(np.int64)
        dims = self._dims(value)
        if value.dtype == ir.DataType.BOOL or "mask" in value.name:
            return np.ones(dims, np.int64)
        if value.dtype.is_floating_point() and value.dims in _SINGLE:
            return np.ones(dims, np.float32)  # a temperature, a penalty: nothing changes by it
        if value.dtype.is_floating_point():
            # All steps of a case read the same states.
            key = value.name, dims
            if key not in self._kept:
                self._kept[key] = self._random.standard_normal(dims).astype(np.float32)
            array = self._kept[key]
            # What the model reads and what the float64 reference reads is the same number.
            return array.astype(np.float16) if value.dtype == ir.DataType.FLOAT16 else array
        if self._guess.number and value.dims in _SINGLE:
            return np.full(dims, self._guess.number)
        numbers = self._random.integers(0, value.limit or 2, dims)
        # The far corner of a box comes after the near one.
        return np.sort(numbers) if len(dims) == 3 and value.dims[-1] == 4 else numbers

    def _masks_another(self, mask: Input, tokens: int) -> bool:
        """Whether a mask tells the padding of states or images, and not of so many tokens."""
        if isinstance(mask.dims[1], int) or not self._interface.role("ids"):
            return mask.dims[1] != tokens
        others = self._interface.role("other")
        named = {dim for value in others for dim in value.dims[1:] if isinstance(dim, str)}
        named -= {dim for value in self._interface.role("ids") for dim in value.dims}
        encoder = "encoder" in mask.name.replace("decoder", "")
        return encoder or mask.dims[1] in named

    def _cache(self, value: Input) -> Array:
        given = self._given(value.name, self._shape.batch)
        if given is not None:
            return given
        # An empty past is where decoding starts; a cache that nothing continues has to hold some.
        if value.name in self._interface.presents:
            dims = value.sized(self._shape.batch)
        else:
            sizes = value.sized(self._shape.batch, _ODD_SIZES[1])
            dims = [
                self._symbols.get(dim, size) if isinstance(dim, str) else size
                for dim, size in zip(value.dims, sizes, strict=True)
            ]
            self._name(value.dims, dims)
        return self._random.standard_normal(dims).astype(np.float32)

    def _dims(self, value: Input) -> tuple[int, ...]:
        return tuple(self._size(value, axis, dim) for axis, dim in enumerate(value.dims))

    def _size(self, value: Input, axis: int, dim: int | str | None) -> int:
        if isinstance(dim, int):
            return dim
        name = dim or f"{value.name}.{axis}"
        if name in self._symbols:
            return self._symbols[name]
        if value.image is not None and axis:
            return value.image.channels if axis == 1 else self._guess.image[axis - 2]
        if "batch" in name or axis == 0:
            return self._shape.batch
        if self._guess.length and value.dtype.is_floating_point():
            return self._guess.length
        self._symbols[name] = self._unnamed.pop(0) if self._unnamed else _ODD_SIZES[1]
        return self._symbols[name]
