"""What can go wrong when files are written, in words."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from onnx_tricks.errors import UsageError

__all__ = ["require_space", "writing"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def require_space(folder: Path, nbytes: int) -> None:
    """Refuse to start writing what the disk cannot hold.

    Args:
        folder: An existing folder on the disk.
        nbytes: Bytes about to be written there.

    Raises:
        UsageError: The disk has fewer bytes left.
    """
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise UsageError(
            f"the disk is full: {nbytes} bytes are needed at {folder}, {free} are free"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report errors of the operating system as those of an output that cannot be written.

    Args:
        path: What is being written, for the message.

    Raises:
        UsageError: The body raised an OSError.
    """
    try:
        yield
    except OSError as error:
        # numpy states no errno when it could write only a part.
        if error.errno in _FULL or error.errno is None:
            raise UsageError(f"the disk is full: {path} cannot be written ({error})") from error
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
