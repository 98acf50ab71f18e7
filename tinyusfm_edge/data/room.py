"""Room on the disk for files that are mapped into memory.

A mapped file is sparse at first. Written on a full disk it raises no error: the process dies of SIGBUS. So its room is
taken before anything is written. It does not know what the files hold.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tinyusfm_runtime.errors import OutputError


def take_room(path: Path) -> None:
    """Takes the room that a sparse file says it has; its content stays.

    Where the file system cannot (and on macOS and Windows) nothing is done.

    Args:
        path: the file, of its whole size already.

    Raises:
        OutputError: no room; the file is removed.
    """
    allocate = getattr(os, "posix_fallocate", None)
    size = path.stat().st_size
    if allocate is None or not size:
        return
    try:
        with path.open("r+b") as file:
            allocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # a file system without this call
        path.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path.name}: no room for {size / 1e6:.0f} MB, free some and go on") from error


__all__ = ["take_room"]
