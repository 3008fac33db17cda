"""Writing the results of a run so that an interruption leaves the old files or none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import onnx_ir as ir

from onnx_tricks.errors import UsageError
from onnx_tricks.graph.disk import require_space, writing
from onnx_tricks.graph.external import external_locations
from onnx_tricks.graph.layout import DataLayout
from onnx_tricks.graph.plan import Output, Plan
from onnx_tricks.graph.save import save_model

__all__ = ["Staging"]

_PREFIX = ".onnx-tricks-"
_MODELS, _CARRIED = "models", "carried"
_CONFIG = Path("config.json")

# Files that others read too, even where a model keeps weights in them: carried along, never
# overwritten by weights, never removed with a model.
_SHARED_SUFFIXES = {".jinja", ".json", ".md", ".model", ".onnx", ".py", ".safetensors", ".txt"}


class Staging:
    """A hidden folder, on the disk of the destination, that results are written into first.

    Files lie in it under their final names, so that what is verified there is what is kept.
    `commit` moves them into place; leaving without it, for whatever reason, removes them.

    Example:
        >>> with Staging(plan) as staging:
        ...     for output in plan.outputs:
        ...         loaded = load_model(output.source)
        ...         staged = staging.save(loaded.model, output, loaded.layout)
        ...     staging.commit()
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._made: list[Path] = []
        self._staged: list[Path] = []
        self._entries: dict[str, Any] = {}

    def __enter__(self) -> Staging:
        """Make the staging folder, and the folder of the results if it is not there.

        Raises:
            UsageError: The destination cannot be written.
        """
        folder = self._plan.folder
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            with writing(folder):
                for path in reversed(missing):
                    path.mkdir()
                    self._made.append(path)
                self._root = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder))
        except BaseException:
            self._remove_made()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what was not committed."""
        shutil.rmtree(self._root, ignore_errors=True)
        self._remove_made()

    def save(self, model: ir.Model, output: Output, layout: DataLayout | None = None) -> Path:
        """Write a model into the staging folder, in place of an earlier attempt.

        Args:
            model: The model.
            output: Which of the plan's models it is.
            layout: How the source stored its weights; the data files are named in its style,
                unless a name is taken by a file of another model.

        Returns:
            The staged .onnx file.

        Raises:
            UsageError: The files cannot be written, or the disk has too little space.
        """
        target = output.target
        self._discard(target)
        if target.name in self._named_by_others(target):
            raise UsageError(f"{self._plan.folder / target} holds weights of another model")
        layout = layout or DataLayout()
        if output.source is not None:
            layout = layout.renamed(output.source.name, target.name)
        if any(self._is_taken(target, location) for location in layout.locations):
            layout = DataLayout((f"{target.name}.data",))
        staged = self._root / _MODELS / target
        with writing(staged):
            staged.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, staged, layout)
        self._staged.append(target)
        return staged

    def describe(self, key: str, entry: Mapping[str, Any]) -> None:
        """Have the folder's config.json, if there is one, say something of the results."""
        self._entries[key] = entry

    def _discard(self, target: Path) -> None:
        if target not in self._staged:
            return
        staged = self._root / _MODELS / target
        for location in external_locations(staged):
            (staged.parent / location).unlink(missing_ok=True)
        staged.unlink()
        self._staged.remove(target)

    def commit(self) -> None:
        """Move the staged files into place, with the input folder's other files.

        A model's .onnx file goes first and comes last, so that it never stands beside the data of
        another. Data files that only a replaced model used are removed.

        Raises:
            UsageError: A file cannot be written.
        """
        folder = self._plan.folder
        with writing(folder):
            carried = self._carry()
            if self._configure(known=_CONFIG in carried) and _CONFIG not in carried:
                carried.append(_CONFIG)
            for path in (*carried, *self._staged):
                if (folder / path).is_dir():
                    raise UsageError(f"{folder / path} is a folder, and a file is to go there")
            for path in carried:
                _move(self._root / _CARRIED / path, folder / path)
            for target in self._staged:
                self._replace(target)
            for output in self._plan.dropped:
                self._remove(output.target)
        self._made.clear()

    def _remove(self, target: Path) -> None:
        """Remove a model that another has taken the place of."""
        final = self._plan.folder / target
        if target in self._staged or not final.is_file():
            return
        own = external_locations(final) - self._named_by_others(target)
        final.unlink(missing_ok=True)
        _remove_data(final.parent, own)

    def _replace(self, target: Path) -> None:
        final, staged = self._plan.folder / target, self._root / _MODELS / target
        old, new = external_locations(final), external_locations(staged)
        if old or new:
            final.unlink(missing_ok=True)
        for location in sorted(new):
            _move(staged.parent / location, final.parent / location)
        _move(staged, final)
        _remove_data(final.parent, old - new - self._named_by_others(target))

    def _carry(self) -> list[Path]:
        """Copy the input folder's other files into the staging folder; their relative paths."""
        source = self._plan.carried
        if source is None:
            return []
        rewritten = set()
        for output in (*self._plan.outputs, *self._plan.dropped):
            assert output.source is not None
            rewritten.add(output.source)
            for location in external_locations(output.source):
                data = output.source.parent / location
                if data.suffix not in _SHARED_SUFFIXES:
                    rewritten.add(data)
        files = [path for path in _files(source) if path not in rewritten]
        require_space(self._root, sum(path.stat().st_size for path in files))
        carried = [path.relative_to(source) for path in files]
        for path, relative in zip(files, carried, strict=True):
            copy = self._root / _CARRIED / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        return carried

    def _configure(self, *, known: bool) -> bool:
        """Write config.json with what there is to say, if there is; `known`: it was carried."""
        target = self._root / _CARRIED / _CONFIG
        source = target if known else self._plan.folder / _CONFIG
        if not self._entries or not source.is_file():
            return False
        try:
            config = json.loads(source.read_text(encoding="utf-8"))
        except ValueError:
            return False
        if not isinstance(config, dict):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**config, **self._entries}, indent=2, ensure_ascii=False)
        target.write_text(f"{text}\n", encoding="utf-8")
        return True

    def _is_taken(self, target: Path, location: str) -> bool:
        """Whether a data file of that name would be, or stand in for, another's file."""
        name = PurePosixPath(location)
        final = self._plan.folder / target
        existing = final.parent / location
        return (
            name.suffix in _SHARED_SUFFIXES
            or (self._root / _MODELS / target.parent / location).exists()
            or location in self._named_by_others(target)
            or (
                existing.exists()
                and not name.name.startswith(target.stem)
                and location not in external_locations(final)
            )
        )

    def _named_by_others(self, target: Path) -> set[str]:
        """The data files of the models beside a target in the folder of the results."""
        final = self._plan.folder / target
        others = (path for path in final.parent.glob("*.onnx") if path.name != final.name)
        return {location for path in others for location in external_locations(path)}

    def _remove_made(self) -> None:
        for path in reversed(self._made):
            with contextlib.suppress(OSError):
                path.rmdir()


def _remove_data(folder: Path, locations: Iterable[str]) -> None:
    """Remove data files that no model reads any more."""
    for location in locations:
        data = folder / location
        if data.suffix not in _SHARED_SUFFIXES and data.is_file():
            data.unlink()


def _files(folder: Path) -> Iterator[Path]:
    """The regular files of a folder, behind links too; links to folders are not followed."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(_PREFIX))
        yield from (path for name in sorted(names) if (path := Path(parent, name)).is_file())


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
