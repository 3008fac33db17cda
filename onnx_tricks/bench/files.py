"""The files of a model that is to be timed, and what they take."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from onnx_tricks.bench.workload import Workload
from onnx_tricks.errors import ModelError
from onnx_tricks.graph.interface import Input, Interface, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.runtime.decoder import find_decoder

__all__ = ["ENCODED", "Files", "cache_shape", "find_files", "is_crossed"]

ENCODED = "encoder_hidden_states"
"""The input that takes an encoder's output."""


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a model that a run needs.

    Attributes:
        source: The file or folder that was given.
        paths: One file, or that of the prompt and that of the steps.
        interfaces: Theirs.
    """

    source: Path
    paths: tuple[Path, ...]
    interfaces: tuple[Interface, ...]

    @cached_property
    def inputs(self) -> dict[str, Input]:
        """All inputs by name."""
        return {one.name: one for interface in self.interfaces for one in interface.inputs}

    @property
    def ids(self) -> Input | None:
        """The input that takes tokens."""
        return next((one for one in self.inputs.values() if one.role == "ids"), None)

    @property
    def caches(self) -> list[Input]:
        """The inputs that take caches."""
        return [one for one in self.inputs.values() if one.role == "cache"]

    @property
    def decodes(self) -> bool:
        """Whether the model takes tokens and caches."""
        return self.ids is not None and bool(self.caches)

    @property
    def prompts(self) -> bool:
        """Whether it runs tokens behind caches that are empty, and fills all of them."""
        first = self.interfaces[0]
        return self.ids is not None and all(c.name in first.presents for c in first.role("cache"))

    @property
    def crossed(self) -> bool:
        """Whether it reads an encoder's output, or what was made of it."""
        return any(is_crossed(one) for one in self.inputs.values())

    def cache_bytes(self, work: Workload, encoder: int) -> int:
        """Bytes of the caches before a run, where an encoder has so many positions."""
        if not work.cached:
            return 0
        shapes = [(one.dtype, cache_shape(one, work, encoder)) for one in self.caches]
        return sum(math.prod(shape) * int(dtype.itemsize) for dtype, shape in shapes)

    def encoder_bytes(self, work: Workload, encoder: int) -> int:
        """Bytes of the encoder's output, where a run reads it."""
        for one in self.interfaces[-1 if work.cached else 0].inputs:
            if one.name == ENCODED and isinstance(one.dims[-1], int):
                return work.batch * encoder * one.dims[-1] * int(one.dtype.itemsize)
        return 0


def find_files(source: Path) -> Files:
    """Find what is to be run.

    Args:
        source: A .onnx file, or a folder with a decoder or with one .onnx file.

    Raises:
        ModelError: There is none, or it is broken.
    """
    if not source.exists():
        raise ModelError(f"{source}: there is no such file or folder")
    paths: Sequence[Path] = sorted(source.glob("*.onnx")) if source.is_dir() else [source]
    if len(paths) != 1:
        paths = find_decoder(source)
    interfaces = tuple(read_interface(load_model(path).model) for path in paths)
    return Files(source, tuple(paths), interfaces)


def is_crossed(like: Input) -> bool:
    """Whether an input is of the length of an encoder's output."""
    return "encoder" in like.name.replace("decoder", "")


def cache_shape(like: Input, work: Workload, encoder: int) -> tuple[int, ...]:
    """The shape of a cache before a run, where an encoder has so many positions."""
    length = encoder if is_crossed(like) else work.cached
    return tuple(like.sized(work.batch, length))
