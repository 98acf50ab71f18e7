"""Private files of this machine, such as caches.

Only their owner may write them, and no link is followed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinyusfm_runtime.atomic import rename_file, temporary_name
from tinyusfm_runtime.errors import InputError, TamperedError

CACHE_VARIABLE = "TINYUSFM_EDGE_CACHE"
"""Environment variable that names another cache folder, for building and for running."""


MAX_FILE_BYTES = 1 << 30
"""A larger file is no engine of a model for the edge."""
MOST_REPLACED = 100
"""So often a reader looks again for a file that a writer has just replaced."""


def default_root() -> Path:
    """The cache folder that the environment names.

    Raises:
        InputError: it names a relative path, or there is no home folder.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        if not Path(named).is_absolute():
            raise InputError(f"{CACHE_VARIABLE} must be an absolute path, not {named!r}")
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base and Path(base).is_absolute():  # the XDG specification ignores relative ones
        return Path(base) / "tinyusfm-edge"
    try:
        return Path.home() / ".cache" / "tinyusfm-edge"
    except RuntimeError as error:
        raise InputError(f"there is no home folder for the engine cache: set {CACHE_VARIABLE}") from error


def make_owned(root: Path, folder: Path) -> None:
    """Makes a folder of a cache for its owner only.

    Also those above it, from the cache's own on.

    Args:
        root: the cache's folder.
        folder: a folder below it.

    Raises:
        TamperedError: one of them is a link, belongs to somebody else, or others may write to it.
        OSError: no room, or no permission.
    """
    root.parent.mkdir(parents=True, exist_ok=True)
    below = folder.relative_to(root).parts
    for depth in range(len(below) + 1):
        place = root.joinpath(*below[:depth])
        with suppress(FileExistsError):
            os.mkdir(place, 0o700)  # noqa: PTH102  Path.mkdir would leave the mode to the umask for some of them
        _check_owner(place, os.lstat(place))


def _check_owner(place: Path, found: os.stat_result) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise TamperedError(f"{place.name!r} is a link")
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise TamperedError(f"{place.name!r} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TamperedError(f"{place.name!r} may be written to by others (chmod go-w mends it)")


def read_owned(path: Path) -> bytes:
    """Reads a plain file of ours once, following no link.

    Raises:
        TamperedError: it is none, or belongs to somebody else.
        OSError: it is not there, or cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    for _ in range(MOST_REPLACED):
        handle = os.open(path, flags)
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # a writer put another one in its place meanwhile: that one is read
    else:
        raise TamperedError(f"{path.name!r} is replaced without end")
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        _check_owner(path, found)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1 or found.st_size > MAX_FILE_BYTES:
            raise TamperedError(f"{path.name!r} is no plain file of ours")
        return file.read(found.st_size + 1)


def write_owned(path: Path, raw: bytes) -> None:
    """Writes a file whole or not at all, readable and writable by its owner only.

    Raises:
        OSError: no room, or no permission.
    """
    temporary = temporary_name(path)
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        rename_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def json_sha256(data: Mapping[str, Any]) -> str:
    """Hash of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


__all__ = [
    "CACHE_VARIABLE",
    "MAX_FILE_BYTES",
    "MOST_REPLACED",
    "default_root",
    "json_sha256",
    "make_owned",
    "read_owned",
    "write_owned",
]
