"""Inputs that a user gives: arrays by the names of a model's inputs, one file for each run."""

from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnx_tricks.errors import UsageError
from onnx_tricks.graph.interface import Input, Interface, read_interface
from onnx_tricks.graph.load import load_model
from onnx_tricks.runtime.sessions import Array

__all__ = ["Inputs", "Sample", "read_samples", "share_out"]

_SHOWN = 4  # names of inputs in a message, of models with many caches

Inputs = str | os.PathLike[str] | Mapping[str, npt.ArrayLike]
"""Inputs for one run: a .npz file, or arrays by the names of the inputs."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """Given inputs for one run.

    Attributes:
        name: What a message calls it: the file.
        arrays: By the names of inputs.
    """

    name: str
    arrays: Mapping[str, Array]


def read_samples(given: Inputs | Sequence[Inputs | Sample]) -> list[Sample]:
    """Read what a user gives.

    Args:
        given: .npz files, mappings of arrays by input name, or one of these.

    Raises:
        UsageError: A file cannot be read, or does not hold arrays of numbers by name.
    """
    several = [given] if isinstance(given, (str, os.PathLike, Mapping)) else given
    return [_read(one, f"inputs[{index}]") for index, one in enumerate(several)]


def share_out(
    samples: Sequence[Sample], models: Mapping[str, Path | ir.Model]
) -> dict[str, list[Sample]]:
    """Give every sample to the models that it has inputs for.

    Caches need not be given: decoding then starts with empty ones. Of models of which one takes
    what another takes and more (a decoder's steps, and its prompt), it goes to that one.

    Args:
        samples: What was given.
        models: .onnx files, or models in memory, by what messages call them.

    Returns:
        For each model its samples: no other arrays than its inputs, in the types it declares.

    Raises:
        UsageError: A sample fits no model, holds what none takes, or has other types or sizes
            than the model declares.
    """
    interfaces = {
        name: read_interface(model if isinstance(model, ir.Model) else load_model(model).model)
        for name, model in models.items()
        if samples
    }
    shares: dict[str, list[Sample]] = {name: [] for name in models}
    for sample in samples:
        for name in _fitting(sample, interfaces):
            arrays = {
                value.name: _cast(sample.arrays[value.name], value, f"{sample.name}, for {name}")
                for value in interfaces[name].inputs
                if value.name in sample.arrays
            }
            shares[name].append(Sample(sample.name, arrays))
    return shares


def _read(given: Inputs | Sample, name: str) -> Sample:
    if isinstance(given, Sample):
        return given
    if not isinstance(given, (str, os.PathLike, Mapping)):
        kind = type(given).__name__
        raise UsageError(f"{name}: give a .npz file or a mapping of arrays, not {kind}")
    try:
        if isinstance(given, Mapping):
            return Sample(name, {str(key): np.asarray(array) for key, array in given.items()})
        name = os.fspath(given)
        return Sample(name, _load(name))
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"{name} cannot be read as arrays by the names of inputs, as numpy.savez writes "
            f"them: {error}"
        ) from error


def _load(path: str) -> dict[str, Array]:
    with Path(path).open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            raise ValueError("it holds one array, without a name")
        return {name: stored[name] for name in stored}


def _fitting(sample: Sample, interfaces: Mapping[str, Interface]) -> list[str]:
    """The names of the models that a sample is for."""
    lacking = {
        name: [value for value in _required(interface, sample) if value.name not in sample.arrays]
        for name, interface in interfaces.items()
    }
    used = {
        name: {value.name for value in interfaces[name].inputs} & sample.arrays.keys()
        for name, values in lacking.items()
        if not values
    }
    if not used:
        listed = "; ".join(f"{_listed(values)} of {name}" for name, values in lacking.items())
        raise UsageError(
            f"{sample.name} lacks inputs: {listed}. It holds {', '.join(sample.arrays) or 'none'}."
        )
    unknown = sample.arrays.keys() - set().union(*used.values())
    if unknown:
        names = ", ".join(used)
        taken = [value for name in used for value in interfaces[name].inputs]
        raise UsageError(
            f"{sample.name} holds {', '.join(sorted(unknown))}, which {names} does not take. It "
            f"takes {_listed(taken)}."
        )
    return [name for name, mine in used.items() if not any(mine < other for other in used.values())]


def _required(interface: Interface, sample: Sample) -> Iterator[Input]:
    """The inputs that a sample has to hold: all but caches that may be empty, and their switch."""
    past = not sample.arrays.keys().isdisjoint(interface.presents)
    for value in interface.inputs:
        may_be_empty = value.name in interface.presents and not value.fixed
        if value.role != "branch" and (past or not may_be_empty):
            yield value


def _cast(array: Array, value: Input, where: str) -> Array:
    """An array in the type that an input declares.

    Floating numbers are rounded: every model reads the same ones then. Others have to stay what
    they are.

    Raises:
        UsageError: It has another shape than declared, or numbers that the type does not hold.
    """
    found = (
        f"{where}: {value.name} is {array.dtype} {list(array.shape)}, declared is {_text(value)}"
    )
    # A scalar, and a shape that is not known, have no sizes alike.
    if value.dims and (
        array.ndim != len(value.dims)
        or any(isinstance(d, int) and d != n for d, n in zip(value.dims, array.shape, strict=True))
    ):
        raise UsageError(f"{found}: the shapes differ")
    if not array.size and value.role != "cache":
        raise UsageError(f"{found}: there are no numbers in it")
    if array.dtype.kind not in "biuf" or value.dtype == ir.DataType.STRING:
        raise UsageError(f"{found}: only arrays of numbers can be compared")
    with np.errstate(all="ignore"):
        cast = array.astype(value.dtype.numpy())
        if array.dtype.kind == "f" and value.dtype.is_floating_point():
            lost = np.isfinite(array) & ~np.isfinite(cast)
        else:
            lost = cast.astype(array.dtype) != array
    if lost.any():
        raise UsageError(f"{found}: {np.count_nonzero(lost)} numbers are not of that type")
    return cast


def _listed(values: Sequence[Input]) -> str:
    shown = [f"{value.name} ({_text(value)})" for value in values[:_SHOWN]]
    more = len(values) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _text(value: Input) -> str:
    """What a model declares of an input."""
    dims = ", ".join("?" if dim is None else str(dim) for dim in value.dims)
    return f"{value.dtype.name.lower()} [{dims}]"
