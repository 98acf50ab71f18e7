"""One process at a time writes into a cache folder.

The others wait and then find what it wrote.

A lock on a file, which dies with its process. It does not know what is written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tinyusfm_runtime.errors import OutputError


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Holds the folder's lock.

    Args:
        folder: made if it is not there.

    Raises:
        OutputError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OutputError(f"cannot write to the cache {folder}: {error.strerror}") from error
    try:
        if os.name == "posix":
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


__all__ = ["one_writer"]
