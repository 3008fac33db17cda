"""External data: the files beside a model that hold its weights."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx

from onnx_tricks.errors import ModelError
from onnx_tricks.graph.protobuf import read_proto

__all__ = ["DataFiles", "external_locations", "location_of"]


class DataFiles:
    """The data files that a model names, looked up within its own folder.

    A location is a name in the model's folder, and what the user has put there under that name is
    followed: the cache of the Hugging Face hub holds links to files elsewhere. The name itself may
    not lead out of the folder, nor may the folders on its way be links that do.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        self._found: dict[str, tuple[Path, int]] = {}

    def find(self, location: str) -> tuple[Path, int]:
        """The file behind a location, links resolved, and its size in bytes.

        Raises:
            ModelError: The location leaves the model's folder, or there is no such regular file.
        """
        if location not in self._found:
            self._found[location] = self._find(location)
        return self._found[location]

    def _find(self, location: str) -> tuple[Path, int]:
        if not _stays_inside(location):
            raise ModelError(
                f"external data location {location!r} is not a path within the model's folder"
            )
        folder = Path(os.path.realpath(self.model.parent))
        named = self.model.parent / location
        try:
            parent = Path(os.path.realpath(named.parent))
            path = Path(os.path.realpath(named))
            status = path.stat()
        except OSError as error:
            raise ModelError(
                f"external data file {str(named)!r} cannot be read ({error.strerror}); it belongs "
                f"beside {self.model.name}"
            ) from error
        if not parent.is_relative_to(folder):
            raise ModelError(
                f"external data location {location!r} leads through a link out of the model's "
                "folder"
            )
        if not stat.S_ISREG(status.st_mode):
            raise ModelError(f"external data file {str(named)!r} is not a regular file")
        if path == Path(os.path.realpath(self.model)):
            raise ModelError(f"external data location {location!r} is the model file itself")
        return path, status.st_size


def location_of(tensor: onnx.TensorProto) -> str:
    """The location of a tensor's external data; empty if it has none."""
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), "")


def external_locations(model: Path) -> frozenset[str]:
    """The data files that a model file names within its folder; none if it cannot be read."""
    try:
        proto = read_proto(model)
    except ModelError:
        return frozenset()
    bodies = (proto.graph, *proto.functions)
    named = {location_of(tensor) for body in bodies for tensor in _tensors(body)}
    return frozenset(location for location in named if _stays_inside(location))


def _tensors(body: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.TensorProto]:
    if isinstance(body, onnx.GraphProto):
        yield from body.initializer
    for node in body.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from _tensors(graph)


def _stays_inside(location: str) -> bool:
    # Both path syntaxes are judged everywhere: a model is refused or read alike on every system.
    paths = (PurePosixPath(location), PureWindowsPath(location))
    return (
        location.isprintable()
        and bool(paths[0].name)
        and not any(path.anchor or ".." in path.parts for path in paths)
    )
