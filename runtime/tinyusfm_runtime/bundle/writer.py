"""Publishing a bundle: all of it appears at once, or nothing does.

The files are written into a hidden sibling of the target, flushed to the disk together with their
folders, opened and verified there as any reader would, and only then given the target's name: by a
plain rename where nothing stands, by an exchange of the two names (Linux ``renameat2`` with
RENAME_EXCHANGE) where an older bundle stands. Killed at any moment, the old bundle or the new one
is there. What a killed run leaves under a hidden name is swept by the next one.

It does not know what the files mean, and it replaces nothing that is not a bundle.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from tinyusfm_runtime.atomic import fsync_folder, held_folder, reason, temporary_name
from tinyusfm_runtime.atomic import sweep as sweep_beside
from tinyusfm_runtime.bundle.manifest import (
    DRIFT_FILE,
    MANIFEST_NAME,
    Artefact,
    Manifest,
    check_paths,
    file_entry,
    manifest_bytes,
)
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import BundleError, InputError, OutputError
from tinyusfm_runtime.spec import ModelSpec

_RENAME_EXCHANGE = 2  # linux/fs.h
_SYSCALL = {"x86_64": 316, "aarch64": 276, "riscv64": 276, "armv7l": 382, "i686": 353}  # renameat2, asm/unistd.h
_AT_FDCWD = -100  # linux/fcntl.h
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def write_bundle(
    path: str | Path,
    *,
    spec: ModelSpec,
    artefacts: Sequence[Artefact],
    weights_sha256: str,
    calibration_id: str | None,
    tools: Mapping[str, str],
    files: Mapping[str, bytes],
    created_utc: str | None = None,
    device_class: str | None = None,
    security_version: int | None = None,
    trace: Mapping[str, str] | None = None,
) -> Path:
    """Publishes a bundle.

    It takes the place of an older bundle of the same path if there is one.

    Args:
        path: the bundle's folder to be; its parents are made.
        spec: the model.
        artefacts: ways to run it, best first; their ``files`` carry ``file_entry`` of the bytes in ``files``.
        weights_sha256: hash of the float weights file.
        calibration_id: id of the calibration set, or None.
        tools: tool -> version.
        files: path relative to the bundle -> content, of everything but the manifest.
        created_utc: time of making, ISO 8601, UTC; now, if None.
        device_class: kind of device that the bundle is meant for, or None for any.
        security_version: counted up from release to release, or None.
        trace: stage -> hash (hex) of what went in, or None.

    Returns:
        The absolute path of the published bundle.

    Raises:
        OutputError: no room, no permission, something else stands there, or the file system cannot exchange
            two names; nothing is left behind and what stood there still stands.
        BundleError: the parts do not make a bundle.
    """
    entries = {name: file_entry(content) for name, content in files.items()}
    check_paths(entries)
    manifest = Manifest(
        spec=spec,
        artefacts=tuple(artefacts),
        weights_sha256=weights_sha256,
        calibration_id=calibration_id,
        tools=dict(tools),
        created_utc=created_utc or datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        files=entries,
        drift=DRIFT_FILE if DRIFT_FILE in entries else None,
        device_class=device_class,
        security_version=security_version,
        trace=trace,
    )
    return publish_folder(path, {**files, MANIFEST_NAME: manifest_bytes(manifest)})


def publish_folder(path: str | Path, files: Mapping[str, bytes]) -> Path:
    """Publishes the files of a bundle, manifest included.

    Args:
        path: the bundle's folder to be.
        files: path relative to it -> content.

    Returns:
        The absolute path.

    Raises:
        OutputError, BundleError: as in ``write_bundle``.
    """
    target = _absolute(path)
    with _clear_errors(target), _made_parents(target.parent):
        sweep(target)
        _refuse_foreign(target)
        temporary = temporary_name(target)
        try:
            temporary.mkdir()
            with held_folder(temporary):
                _write_tree(temporary, files)
                Bundle.open(temporary, on_device=False)  # what cannot be opened is not published
                _swap_in(temporary, target)
        finally:
            # after an exchange the older bundle stands under the temporary name
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def sweep(path: str | Path) -> list[Path]:
    """Removes what killed runs left beside a bundle.

    A temporary counts as left over when no process holds its lock and the process that made it is
    gone (or it is older than ten minutes, since process ids come round again).

    Args:
        path: the bundle's folder.

    Returns:
        What was removed.
    """
    try:
        return sweep_beside(_absolute(path))
    except OSError:
        return []


def _absolute(path: str | Path) -> Path:
    """The folder itself.

    Parents are resolved, a link in the last place is not followed.
    """
    folder = Path(path)
    return folder.resolve() if folder.name in ("", "..") else folder.parent.resolve() / folder.name


def _write_tree(root: Path, files: Mapping[str, bytes]) -> None:
    folders = {root}
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        folders.update(parent for parent in file.parents if parent.is_relative_to(root))
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        with os.fdopen(handle, "wb", buffering=0) as out:
            view = memoryview(content)
            while view:
                view = view[out.write(view) :]
            os.fsync(handle)
    for folder in sorted(folders, reverse=True):
        fsync_folder(folder)


def _swap_in(temporary: Path, target: Path) -> None:
    for _ in range(10):  # somebody else may publish or remove the same bundle between two steps
        try:
            if os.path.lexists(target):
                _refuse_foreign(target)
                _exchange(temporary, target)
            else:
                temporary.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                continue
            raise
        fsync_folder(target.parent)
        return
    raise OutputError(f"{target} is being written by somebody else; wait for that and export again")


def _exchange(left: Path, right: Path) -> None:
    try:
        _renameat2(os.fsencode(left), os.fsencode(right), _RENAME_EXCHANGE)
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
        raise OutputError(
            f"{right} exists and this file system cannot exchange two folders at once, so the export refuses to "
            "overwrite it: remove it first or write elsewhere"
        ) from error


def _renameat2(left: bytes, right: bytes, flags: int) -> None:
    """The system call, by glibc's wrapper where there is one, else by number."""
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    libc = ctypes.CDLL(None, use_errno=True)
    at = ctypes.c_int(_AT_FDCWD)
    arguments = (at, ctypes.c_char_p(left), at, ctypes.c_char_p(right), ctypes.c_uint(flags))
    if hasattr(libc, "renameat2"):
        result = libc.renameat2(*arguments)
    elif platform.machine() in _SYSCALL:
        result = libc.syscall(ctypes.c_long(_SYSCALL[platform.machine()]), *arguments)
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _refuse_foreign(target: Path) -> None:
    """Only a bundle, or an empty folder, may be replaced."""
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise OutputError(f"{target} exists and is not a bundle: it is not overwritten")
    if not (target / MANIFEST_NAME).is_file() and any(target.iterdir()):
        raise OutputError(f"{target} is a folder with other things in it: it is not overwritten")


@contextlib.contextmanager
def _clear_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {reason(error)}") from error
    except InputError as error:  # the temporary vanished while it was verified
        raise BundleError(f"{target} could not be verified before publishing: {error}") from error


@contextlib.contextmanager
def _made_parents(folder: Path) -> Iterator[None]:
    """Makes missing parents, and takes them away again if what follows fails."""
    missing = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


__all__ = ["publish_folder", "sweep", "write_bundle"]
