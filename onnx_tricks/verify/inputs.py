"""Build valid inputs: prompts of several lengths, batches with left padding, images, features."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from onnx_tricks.graph.interface import Input, Interface
from onnx_tricks.runtime.sessions import Array

__all__ = ["Case", "Step", "plans", "prompts", "text"]

# Sizes of dimensions of which only the name is known: small, and no two alike.
_ODD_SIZES = (33, 7, 5, 11, 13, 17, 19, 23)
_SOUND = 16_000  # samples in a second, as speech models take it
_MULTIPLES = (1, 4, 2, 8, 3, 9)


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
        apart: Whether its errors are judged by themselves, not together with those of others.
        again: Makes the same case of other numbers, from a seed above 0; None where that cannot be.
        of: Makes the same case of other tokens, [N], repeated where they are too few.
    """

    name: str
    batch: int
    caches: Mapping[str, Array]
    steps: tuple[Step, ...]
    apart: bool = False
    again: Callable[[int], Case] | None = None
    of: Callable[[Array], Case] | None = None


@dataclasses.dataclass(frozen=True)
class _Guess:
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
class _Shape:
    """Of a case: batch size, prompt length, lengths of later steps, left padding, its numbers."""

    batch: int
    prompt: int
    steps: tuple[int, ...] = ()
    padded: bool = False
    seed: int = 0


# The error that a rounded cache brings shows where there is much to remember, and averages out.
_LONG = (_Shape(1, 256, (1, 1, 1, 1, 8)), _Shape(2, 128, (1, 1, 8), padded=True))
_FULL = (_Shape(1, 7, (1, 1, 4)), _Shape(2, 33, (1, 1), padded=True), _Shape(2, 1, (1,)))
_PLANS = (
    _FULL,
    tuple(dataclasses.replace(shape, padded=False) for shape in _FULL),
    (_Shape(1, 7, (1, 1)), _Shape(1, 33, (1,)), _Shape(1, 1, (1,))),
    (_Shape(1, 1, (1, 1, 1)), _Shape(1, 1, (1,))),
    (_Shape(1, 4), _Shape(1, 1)),
    (_Shape(2, 16),),  # what Optimum traces a model with
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
    for shapes in (_LONG, *_PLANS) if long else _PLANS:
        fixed = tuple(dict.fromkeys(_fix(interface, shape) for shape in shapes))
        if not tokens:
            # The largest batch holds the cases of the others.
            fixed = (_Shape(max(s.batch for s in fixed), 1),)
        if fixed not in seen:
            seen.add(fixed)
            for guess in _guesses(interface):
                yield tuple(_Builder(interface, given, shape, guess).case() for shape in fixed)


def prompts(interface: Interface, given: Given, batch: int, tokens: int) -> Iterator[Case]:
    """Yield single runs of one batch; what else a model leaves open differs among them.

    Args:
        interface: The model's interface.
        given: As for `plans`.
        batch: Number of rows, where the model does not fix it.
        tokens: Length of the rows, where there are tokens and the model does not fix it.
    """
    shape = _fix(interface, _Shape(batch, tokens))
    for guess in _guesses(interface):
        yield _Builder(interface, given, shape, guess).case()


def text(interface: Interface, given: Given, ids: Array, steps: tuple[int, ...] = ()) -> Case:
    """Make a case of a text: a prompt, and its last tokens in steps.

    Args:
        interface: The interface of a model that takes tokens, and caches that may be empty.
        given: As for `plans`.
        ids: The tokens, [B, T].
        steps: Numbers of tokens, less than T together.
    """
    shape = _Shape(len(ids), ids.shape[1] - sum(steps), steps)
    builder = _Builder(interface, given, shape, next(_guesses(interface)), ids)
    return dataclasses.replace(builder.case(), name="text of its own", apart=True, again=None)


def _guesses(interface: Interface) -> Iterator[_Guess]:
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
            wave = len(value.dims) == 2
            lengths = (_SOUND,) * wave + (0, *interface.lengths) + (_SOUND,) * (not wave)
        elif value.role == "other" and value.dims in ((), (1,)):
            numbers = (0, _ODD_SIZES[0])
    marked = (True, False) if any(v.markers for v in interface.role("ids")) else (False,)
    for choice in itertools.product(images, lengths, multiples, numbers, marked):
        yield _Guess(*choice)


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

    def __init__(
        self,
        interface: Interface,
        given: Given,
        shape: _Shape,
        guess: _Guess,
        text: Array | None = None,
    ) -> None:
        self.interface = interface
        self.given = given
        self.shape = shape
        self.guess = guess
        self.text = text
        self.symbols: dict[str, int] = {}  # sizes by the names of dimensions
        self.unnamed = list(_ODD_SIZES)
        self.kept: dict[tuple[str, tuple[int, ...]], Array] = {}
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
        self.random = np.random.default_rng(case)

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
            for value in self.interface.role("ids"):
                self._name(value.dims[1:], (new,))
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
        return Case(name, shape.batch, caches, tuple(steps), again=self._again, of=self._of)

    def _again(self, seed: int) -> Case:
        shape = dataclasses.replace(self.shape, seed=seed)
        return _Builder(self.interface, self.given, shape, self.guess).case()

    def _of(self, tokens: Array) -> Case:
        rows, length = self.shape.batch, self.shape.prompt + sum(self.shape.steps)
        ids = np.resize(tokens, (rows, length))
        return _Builder(self.interface, self.given, self.shape, self.guess, ids).case()

    def _name(self, dims: Iterable[int | str | None], sizes: Iterable[int]) -> None:
        self.symbols |= {
            n: size for n, size in zip(dims, sizes, strict=False) if isinstance(n, str)
        }

    def _value(self, value: Input, valid: Array, new: int, index: int) -> Array:
        shape = self.shape
        given = self.given(value.name, shape.batch)
        if given is not None:
            return given
        if value.role == "ids" and self.text is not None:
            return self.text[:, : valid.shape[1]][:, -new:]
        if value.role == "ids":
            rows = shape.batch * self.guess.multiple
            ids = self.random.integers(0, value.limit or 2, (rows, new))
            if self.guess.marked:
                # At the end, where no padding is, and not next to each other.
                ends = range(2, new + 1, 2)
                for end, marker in zip(ends, value.markers, strict=False):
                    ids[:, -end] = marker
            return ids
        if value.role == "branch":
            return np.array([index > 0])
        if value.role == "positions":
            positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)[:, -new:]
            return positions if len(value.dims) == 2 else np.arange(valid.shape[1])[-new:]
        if value.role == "mask" and not self._masks_another(value, valid.shape[1]):
            return valid.astype(np.int64)
        dims = self._dims(value)
        if value.dtype == ir.DataType.BOOL or "mask" in value.name:
            return np.ones(dims, np.int64)
        if value.dtype.is_floating_point():
            # All steps of a case read the same states.
            key = value.name, dims
            if key not in self.kept:
                self.kept[key] = self.random.standard_normal(dims).astype(np.float32)
            array = self.kept[key]
            # What the model reads and what the float64 reference reads is the same number.
            return array.astype(np.float16) if value.dtype == ir.DataType.FLOAT16 else array
        if self.guess.number and value.dims in ((), (1,)):
            return np.full(dims, self.guess.number)
        numbers = self.random.integers(0, value.limit or 2, dims)
        # The far corner of a box comes after the near one.
        return np.sort(numbers) if len(dims) == 3 and value.dims[-1] == 4 else numbers

    def _masks_another(self, mask: Input, tokens: int) -> bool:
        """Whether a mask tells the padding of states or images, and not of so many tokens."""
        if isinstance(mask.dims[1], int) or not self.interface.role("ids"):
            return mask.dims[1] != tokens
        others = self.interface.role("other")
        named = {dim for value in others for dim in value.dims[1:] if isinstance(dim, str)}
        named -= {dim for value in self.interface.role("ids") for dim in value.dims}
        encoder = "encoder" in mask.name.replace("decoder", "")
        return encoder or mask.dims[1] in named

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
        if name in self.symbols:
            return self.symbols[name]
        if value.image is not None and axis:
            return value.image.channels if axis == 1 else self.guess.image[axis - 2]
        if "batch" in name or axis == 0:
            return self.shape.batch
        if self.guess.length and value.dtype.is_floating_point():
            return self.guess.length
        self.symbols[name] = self.unnamed.pop(0) if self.unnamed else _ODD_SIZES[1]
        return self.symbols[name]
