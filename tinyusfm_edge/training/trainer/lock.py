"""One run at a time in a folder.

A second one is refused, at once and with the reason.

A lock on a file, which dies with its process: a killed run leaves nothing to clean up. Where the system has no such
locks (Windows) nothing is checked. It does not know what runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tinyusfm_runtime.errors import InputError, OutputError

LOCK = ".run.lock"
"""The file in a run's folder."""


@contextlib.contextmanager
def one_run(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Holds a folder for one run.

    Args:
        folder: made if it is not there.
        name: of the lock's file in it.

    Raises:
        InputError: another run holds it.
        OutputError: the folder cannot be made or written to.
    """
    place = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _locked(place, folder)
    except OSError as error:
        raise OutputError(f"cannot make the run's folder {folder}: {error.strerror}") from error
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        # removed while it is held: whoever opened it meanwhile notices that the name has gone
        with contextlib.suppress(OSError):
            place.unlink()
        os.close(handle)


def _locked(place: Path, folder: Path) -> int:
    """An open file that stands under its name and is locked."""
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _take(handle, folder)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), place.stat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _take(handle: int, folder: Path) -> None:
    if os.name != "posix":
        return
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
        who = f"process {holder}" if holder.isdigit() else "another process"
        raise InputError(f"{folder} is in use by {who}: wait until it has ended, or choose another --out") from None


__all__ = ["LOCK", "one_run"]
