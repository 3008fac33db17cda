"""Which files a run reads and where its results go, decided before any work."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from onnx_tricks.errors import ModelError, UsageError
from onnx_tricks.graph.phases import PHASES, PROMPT

__all__ = ["Output", "Plan", "find_models", "make_plan"]

_HUB_FOLDER = "onnx"


@dataclasses.dataclass(frozen=True)
class Output:
    """One model of a run.

    Attributes:
        source: The .onnx file it is read from; None for a model that is in memory.
        target: Where the result goes, relative to the run's folder.
    """

    source: Path | None
    target: Path


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the results of a run go.

    Attributes:
        folder: The folder that results are written into; it need not exist yet.
        outputs: The models, in order.
        carried: The input folder whose other files go along; None where there is nothing to carry.
        dropped: Models of the input that do not go along: others take their place.
    """

    folder: Path
    outputs: tuple[Output, ...]
    carried: Path | None = None
    dropped: tuple[Output, ...] = ()

    def with_one_decoder(self, merged: Path) -> Plan:
        """The plan in which one decoder takes the place of those for prompt and steps.

        Args:
            merged: The file that it is made from.
        """
        phases = [o for o in self.outputs if o.target.name in PHASES]
        target = phases[0].target.with_name(PROMPT)
        others = tuple(o for o in self.outputs if o not in phases)
        return dataclasses.replace(
            self,
            outputs=(*others, Output(merged, target)),
            dropped=tuple(o for o in phases if o.source != merged or o.target != target),
        )


def find_models(source: Path) -> list[Path]:
    """The models of an input: the file itself, or the .onnx files of a folder, sorted by name.

    A folder's models lie in it or in its sub-folder `onnx`, as on the Hugging Face hub.

    Raises:
        ModelError: There is no such file or folder, or no model in it.
    """
    if not source.is_dir():
        if not source.exists():
            raise ModelError(f"{source}: there is no such file or folder")
        return [source]
    models = [
        path
        for folder in (source, source / _HUB_FOLDER)
        for path in sorted(folder.glob("*.onnx"))
        if path.is_file()
    ]
    if not models:
        raise ModelError(f"{source}: the folder holds no .onnx file")
    return models


def make_plan(source: Path | None, destination: str | os.PathLike[str]) -> Plan:
    """Decide where the results of a run go.

    Args:
        source: A model file, or a folder as Optimum and the genai builder write it, or None for a
            model in memory.
        destination: A file for a file and a folder for a folder; a file's result may also go into
            an existing folder, or one written with a trailing slash, under its own name.

    Raises:
        ModelError: The source is missing, or holds no model.
        UsageError: Source and destination do not go together.
    """
    path = Path(destination)
    models = [] if source is None else find_models(source)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise UsageError(f"{path} is neither a file nor a folder")
    if source is None or not source.is_dir():
        into_folder = path.is_dir() or os.fspath(destination).endswith(("/", os.sep))
        origin = None if source is None else models[0]
        if into_folder:
            return Plan(path, (Output(origin, Path(origin.name if origin else "model.onnx")),))
        return Plan(path.parent, (Output(origin, Path(path.name)),))
    if path.is_file() or (path.suffix == ".onnx" and not path.exists()):
        raise UsageError(f"{source} is a folder, so the output must be one too, not {path}")
    here, there = Path(os.path.realpath(source)), Path(os.path.realpath(path))
    if here != there and (here in there.parents or there in here.parents):
        raise UsageError(f"{path} and {source} lie within each other: choose an output elsewhere")
    outputs = tuple(Output(model, model.relative_to(source)) for model in models)
    return Plan(path, outputs, carried=None if here == there else source)
