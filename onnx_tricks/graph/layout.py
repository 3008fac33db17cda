"""How a model stores its weights, for writing the result likewise."""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath

__all__ = ["DataLayout"]


@dataclasses.dataclass(frozen=True)
class DataLayout:
    """How a model stores its weights: within the .onnx file, or in data files beside it.

    Attributes:
        locations: Names of the data files, relative to the model's folder; empty when the weights
            lie within the .onnx file.
        shard_bytes: The most that one of several data files holds.
    """

    locations: tuple[str, ...] = ()
    shard_bytes: int | None = None

    def renamed(self, old: str, new: str) -> DataLayout:
        """The layout of a model file `new`, in the naming style that model file `old` has.

        Data files that are named after the model (`model.onnx_data`, `model.data`) follow its
        name; others keep theirs.
        """
        return dataclasses.replace(
            self, locations=tuple(_renamed(name, old, new) for name in self.locations)
        )


def _renamed(location: str, old: str, new: str) -> str:
    path = PurePosixPath(location)
    for before, after in ((old, new), (PurePosixPath(old).stem, PurePosixPath(new).stem)):
        if path.name.startswith(before):
            return str(path.with_name(after + path.name.removeprefix(before)))
    return location
