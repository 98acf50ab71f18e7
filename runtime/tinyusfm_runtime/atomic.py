"""Everything that is written to disk: whole files and folders, growing records.

A *whole* file or folder is written under a hidden name beside its goal, flushed to the disk together with the folder it
lies in, and renamed; killed at any moment, the old one or the new one is there. What a killed run leaves under a hidden
name is swept by the next one, or kept under a visible name where it can be of use (``recover``). A *record* is appended
to where it belongs, line by line, so that nothing is lost with the process that writes it.

A rename happens over regular files only: a link is followed to the file it means, a pipe or a device is written through
by records and by ``write_file`` and refused by the rest, and everything else is refused. It knows no formats.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tinyusfm_runtime.errors import OutputError

SYNC_EVERY_S = 1.0  # a power cut takes this much of a record at most
MAX_LINE_BYTES = 1 << 20  # a file whose last line is longer is no record of ours
_STALE_S = 600  # an unlocked temporary of this age is stale even if its process id is in use again
_OPEN_ALREADY = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")
_log = logging.getLogger(__name__)


def reason(error: OSError) -> str:
    """Why the system refused, in words that say what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no room left ({error.strerror or 'no space'}): free some or write elsewhere"
    if error.errno == errno.EFBIG:
        return "a file would be larger than this process may write"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "no permission; write elsewhere or change the folder's rights"
    if error.errno == errno.EROFS:
        return "the file system is read-only; write elsewhere"
    if error.errno == errno.ENOTDIR:
        return "a part of the path is a file, not a folder"
    if error.errno == errno.ENXIO:
        return "nobody reads the pipe: start its reader first"
    if error.errno == errno.EPIPE:
        return "the reader of the pipe went away"
    return error.strerror or type(error).__name__


def fsync_folder(folder: Path) -> None:
    """Forces the names in a folder onto the disk.

    Raises:
        OSError: it cannot be opened, or the disk fails.
    """
    handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(handle)


def fsync_file(path: Path) -> None:
    """Forces a file's content onto the disk, whoever wrote it.

    Raises:
        OSError: it cannot be opened, or the disk is full or fails.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(goal: Path) -> Path:
    """A hidden name beside a goal; it tells who made it, so that it can be swept."""
    return goal.with_name(f".{goal.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def rename_file(temporary: Path, goal: Path) -> None:
    """Gives a finished file its name; content and name are then on the disk.

    Args:
        temporary: a file in the goal's folder.
        goal: nothing, or a regular file that it takes the place of.

    Raises:
        OSError: the disk is full, the folder went away, or something that is no regular file is in the way.
    """
    fsync_file(temporary)
    if os.path.lexists(goal) and not stat.S_ISREG(os.lstat(goal).st_mode):
        raise OSError(errno.EEXIST, "something that is no regular file is in the way")
    temporary.replace(goal)
    fsync_folder(goal.parent)


def rename_folder(temporary: Path, goal: Path) -> None:
    """Gives a finished folder its name; everything in it is then on the disk.

    Args:
        temporary: a folder beside the goal.
        goal: a name that nothing has, or an empty folder's.

    Raises:
        OSError: the disk is full, or something took the name.
    """
    for folder, _, names in os.walk(temporary, topdown=False):
        for name in names:
            fsync_file(Path(folder) / name)
        fsync_folder(Path(folder))
    temporary.rename(goal)
    fsync_folder(goal.parent)


def write_file(path: str | Path, content: bytes, what: str | None = None, *, mode: int = 0o644) -> None:
    """Writes a file, whole or not at all; into a pipe or a device it writes through.

    Args:
        path: the goal; a link is followed.
        content: all of it.
        what: what is being written, for messages; None takes the path.
        mode: the file's permissions.

    Raises:
        OutputError: no folder, no permission, no room, or something is in the way; nothing is left behind.
    """
    named = _named(what, path)
    try:
        if _is_channel(path):
            _write_through(path, content)
            return
        goal = Path(path).resolve()
    except OSError as error:
        raise OutputError(f"cannot write {named}: {reason(error)}") from error
    pending = PendingFile(goal, named)
    try:
        with pending.path.open("wb") as stream:
            stream.write(content)
        pending.path.chmod(mode)
    except OSError as error:
        raise pending.failed(error) from error
    except BaseException:
        pending.discard()
        raise
    pending.publish()


def _named(what: str | None, location: str | Path) -> str:
    """What is written and where, as typed."""
    return str(location) if what is None else what if str(location) in what else f"{what} {location}"


class PendingFile:
    """A file under a temporary name beside its goal.

    ``publish`` renames it, ``discard`` removes it.

    Args:
        location: the goal; a link is followed.
        what: what is being written, for messages ("the overlay video").
        recover: keep what killed runs left there, under a name of its own, instead of removing it.

    Attributes:
        goal: the file it will be.
        path: the file to write to.
        recovered: what was kept.

    Raises:
        OutputError: the folder is missing or not writable, or the goal is no regular file.
    """

    def __init__(self, location: str | Path, what: str, *, recover: bool = False) -> None:
        self.what, self._lock = _named(what, location), -1
        try:
            self.goal = Path(location).resolve()
            if os.path.lexists(self.goal):
                refuse_irregular(self.goal, self.what)
            self.recovered = sweep(self.goal, recover=recover)
            self.path = temporary_name(self.goal)
            self._lock = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
            hold(self._lock)
        except OSError as error:
            raise self.failed(error) from error

    def failed(self, error: OSError) -> OutputError:
        """The error to raise when writing went wrong; nothing is left behind."""
        self.discard()
        return OutputError(f"cannot write {self.what}: {reason(error)}")

    def publish(self) -> None:
        """Gives the file its name, forced onto the disk.

        Raises:
            OutputError: the disk is full, the folder went away, or something is in the way.
        """
        try:
            rename_file(self.path, self.goal)
        except OSError as error:
            raise self.failed(error) from error
        self._let_go()

    def discard(self) -> None:
        """Removes the temporary file, or leaves it to the next sweep if it cannot."""
        path = getattr(self, "path", None)
        if path is not None:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        handle, self._lock = self._lock, -1
        if handle >= 0:
            os.close(handle)


class PendingFolder:
    """A folder under a temporary name beside its goal.

    ``publish`` renames it, ``discard`` removes it.

    Args:
        location: the goal; nothing of that name may be there.
        what: what is being written, for messages.
        recover: keep what killed runs left there, under a name of its own, instead of removing it.

    Attributes:
        goal: the folder it will be.
        path: the folder to write to.
        recovered: what was kept.

    Raises:
        OutputError: something is in the way, or the folder above is missing or not writable.
    """

    def __init__(self, location: str | Path, what: str, *, recover: bool = False) -> None:
        self.goal, self.what = Path(location).absolute(), _named(what, location)
        if os.path.lexists(self.goal):
            raise OutputError(f"cannot write {self.what}: something of that name is there already, give a new name")
        try:
            self.recovered = sweep(self.goal, recover=recover)
            self.path = temporary_name(self.goal)
            self.path.mkdir()
        except OSError as error:
            raise self.failed(error) from error

    def failed(self, error: OSError) -> OutputError:
        """The error to raise when writing went wrong; nothing is left behind."""
        self.discard()
        return OutputError(f"cannot write {self.what}: {reason(error)}")

    def publish(self) -> None:
        """Gives the folder its name, its files forced onto the disk.

        Raises:
            OutputError: the disk is full, or something took the name meanwhile.
        """
        try:
            if os.path.lexists(self.goal):
                raise OSError(errno.EEXIST, "something took the name meanwhile")
            rename_folder(self.path, self.goal)
        except OSError as error:
            raise self.failed(error) from error

    def discard(self) -> None:
        """Removes the temporary folder, if it is there."""
        path = getattr(self, "path", None)
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)


class RecordFile:
    """A file that lines are appended to, in its final place from the start.

    Every line is handed to the system at once.

    What is there already stays in front. A line that a killed writer left unfinished is cut, and ``cut_bytes`` says so.
    A link is followed, a pipe or a device is written through. One writer at a time: the file is locked.

    Args:
        location: the file.
        what: what is being written, for messages ("the JSON lines file").
        fits: called with the first line of what is there, without its end, and whether that line is complete; returns
            whether lines of ours may follow it.

    Attributes:
        goal: the file itself.
        kept_bytes: what was there before.
        cut_bytes: length of an unfinished line that was cut.

    Raises:
        OutputError: it cannot be opened, another run writes it, or what is there is something else.
    """

    def __init__(self, location: str | Path, what: str, fits: Callable[[bytes, bool], bool]) -> None:
        self.what, self._kind, self.cut_bytes, self.kept_bytes = _named(what, location), what, 0, 0
        self._turn = threading.Lock()
        self._synced_s = time.monotonic()
        self._handle: int | None = None
        try:
            self.goal = Path(location).resolve()
            fresh = not os.path.lexists(self.goal)
            self._handle = _open_to_append(location, self.goal, what)
            self._regular = stat.S_ISREG(os.fstat(self._handle).st_mode) and not _is_channel(location)
            if self._regular:
                with contextlib.suppress(OSError):  # a folder that may be written to and not be read
                    sweep(self.goal, recover=True)
                self._take_over(fits)
            if fresh and self._regular:
                fsync_folder(self.goal.parent)
        except BaseException as error:
            self._let_go()
            if isinstance(error, OSError):
                raise OutputError(f"cannot write {self.what}: {reason(error)}") from error
            raise

    @property
    def closed(self) -> bool:
        """True after ``close``."""
        return self._handle is None

    def append(self, line: bytes, *, sync: bool = False) -> None:
        """Appends whole lines, from any thread.

        Args:
            line: with its end.
            sync: force it onto the disk now, not within ``SYNC_EVERY_S``.

        Raises:
            OutputError: no room, or the reader of the pipe went away; the lines before are still there.
        """
        with self._turn:
            if self._handle is None:
                raise OutputError(f"cannot write {self.what}: it is closed")
            before = os.fstat(self._handle).st_size if self._regular else 0
            try:
                view = memoryview(line)
                while view:
                    view = view[os.write(self._handle, view) :]
                if self._regular and (sync or time.monotonic() - self._synced_s > SYNC_EVERY_S):
                    os.fsync(self._handle)
                    self._synced_s = time.monotonic()
            except OSError as error:
                if self._regular:
                    with contextlib.suppress(OSError):  # half a line would be in the way of the next
                        os.ftruncate(self._handle, before)
                raise OutputError(f"cannot write {self.what}: {reason(error)}") from error

    def close(self) -> None:
        """Forces everything onto the disk. Idempotent.

        Raises:
            OutputError: the disk fails.
        """
        with self._turn:
            if self._handle is None:
                return
            try:
                if self._regular:
                    os.fsync(self._handle)
            except OSError as error:
                raise OutputError(f"cannot write {self.what}: {reason(error)}") from error
            finally:
                self._let_go()

    def _take_over(self, fits: Callable[[bytes, bool], bool]) -> None:
        """Locks the file, checks that it is a record and cuts an unfinished last line."""
        assert self._handle is not None
        if not hold(self._handle):
            raise OutputError(f"cannot write {self.what}: another run is writing it")
        size = os.fstat(self._handle).st_size
        if not size:
            return
        first, end, _ = os.pread(self._handle, MAX_LINE_BYTES, 0).partition(b"\n")
        tail_at = max(0, size - MAX_LINE_BYTES)
        whole = tail_at + os.pread(self._handle, size - tail_at, tail_at).rfind(b"\n") + 1
        if not fits(first.removesuffix(b"\r"), bool(end)) or (tail_at and whole == tail_at):
            raise OutputError(f"cannot write {self.what}: a file with other things in it is there, give a new name")
        if whole < size:
            os.ftruncate(self._handle, whole)
            _log.warning("%s: a killed run had left half a line, %d bytes; it was cut", self._kind, size - whole)
        self.kept_bytes, self.cut_bytes = whole, size - whole

    def _let_go(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def check_writable(place: Path, what: str) -> None:
    """Looks whether something could be written there, before slow work starts.

    The writing itself may still fail.

    Args:
        place: what is to be written.
        what: what it is, for messages.

    Raises:
        OutputError: a file is in the way, or the nearest folder that exists may not be written to.
    """
    nearest = next(folder for folder in place.absolute().parents if os.path.lexists(folder))
    if not nearest.is_dir():
        raise OutputError(f"cannot write {_named(what, place)}: a part of its path is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {_named(what, place)}: no permission in its folder")


def refuse_irregular(goal: Path, what: str) -> None:
    """Checks that what stands at a goal is a regular file.

    Raises:
        OutputError: it is a folder, a device, a pipe, a socket or a broken link.
        OSError: it cannot be looked at.
    """
    mode = os.lstat(goal).st_mode
    if stat.S_ISDIR(mode):
        raise OutputError(f"cannot write {what}: a folder of that name is in the way")
    if not stat.S_ISREG(mode):
        raise OutputError(f"cannot write {what}: a device, pipe or link of that name is in the way")


def sweep(goal: Path, *, recover: bool = False) -> list[Path]:
    """Removes what killed runs left beside a goal under hidden names.

    A temporary counts as left over when no process holds its lock and the process that made it is gone (or it is older
    than ten minutes, since process ids come round again).

    Args:
        goal: what they wanted to write.
        recover: keep what has content: it becomes ``NAME.recovered-N.SUFFIX`` beside the goal.

    Returns:
        What was removed, or with ``recover`` the new names of what was kept.

    Raises:
        OSError: the folder cannot be read.
    """
    pattern = re.compile(re.escape(f".{goal.name}.tmp-") + r"(\d{1,10})-[0-9a-f]{8}")
    done = []
    for entry in sorted(goal.parent.iterdir()):
        match = pattern.fullmatch(entry.name)
        if not match or entry.is_symlink() or not _is_stale(entry, int(match[1])):
            continue
        if recover and (kept := _kept(entry, goal)) is not None:
            _log.warning("what a killed run had written was kept: %s", kept.name)
            done.append(kept)
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                entry.unlink(missing_ok=True)
        if not recover and not os.path.lexists(entry):
            done.append(entry)
    return done


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Holds a lock that dies with the process; a sweep leaves the folder alone."""
    handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        hold(handle)
        yield
    finally:
        os.close(handle)


def hold(handle: int, *, wait: bool = False, shared: bool = False) -> bool:
    """Locks an open file or folder until it is closed or the process ends.

    Args:
        handle: its descriptor.
        wait: until whoever holds it lets go.
        shared: others may hold it too, as long as nobody holds it alone.

    Returns:
        False if another process holds it; True also where this file system or system has no locks.
    """
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _kept(entry: Path, goal: Path) -> Path | None:
    """The new name of a leftover with content; None if empty or not renamed."""
    has_content = any(entry.iterdir()) if entry.is_dir() else entry.stat().st_size > 0
    for number in range(1, 1000) if has_content else ():
        kept = goal.with_name(f"{goal.stem}.recovered-{number}{goal.suffix}")
        if not os.path.lexists(kept):
            with contextlib.suppress(OSError):
                entry.rename(kept)
                return kept
    return None


def _is_stale(entry: Path, pid: int) -> bool:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        handle = os.open(entry, flags)
    except OSError:
        return not is_alive(pid)
    try:
        age_s = time.time() - os.fstat(handle).st_mtime
        return hold(handle) and (age_s > _STALE_S or not is_alive(pid))
    finally:
        os.close(handle)


def is_alive(pid: int) -> bool:
    """Whether a process of that number is there; True where the system does not say."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _is_channel(place: str | Path) -> bool:
    """Whether bytes are sent into a place.

    A pipe, a character device, or a file that this process has open already.
    """
    if str(place).startswith(_OPEN_ALREADY):
        return True
    try:
        mode = Path(place).stat().st_mode
    except FileNotFoundError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _write_through(place: str | Path, content: bytes) -> None:
    handle = _open_channel(place)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(handle, view) :]
    finally:
        os.close(handle)


def _open_channel(place: str | Path) -> int:
    """A pipe or device, open for writing; a pipe that nobody reads is refused."""
    flags = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    handle = os.open(place, flags | getattr(os, "O_CLOEXEC", 0))
    os.set_blocking(handle, True)
    return handle


def _open_to_append(place: str | Path, goal: Path, what: str) -> int:
    if _is_channel(place):
        return _open_channel(place)
    if os.path.lexists(goal):
        refuse_irregular(goal, what)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    handle = os.open(goal, flags | getattr(os, "O_NONBLOCK", 0), 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):  # exchanged between two steps
        os.close(handle)
        raise OSError(errno.EEXIST, "something that is no regular file is in the way")
    return handle


__all__ = [
    "MAX_LINE_BYTES",
    "SYNC_EVERY_S",
    "PendingFile",
    "PendingFolder",
    "RecordFile",
    "check_writable",
    "fsync_file",
    "fsync_folder",
    "held_folder",
    "hold",
    "is_alive",
    "reason",
    "refuse_irregular",
    "rename_file",
    "rename_folder",
    "sweep",
    "temporary_name",
    "write_file",
]
