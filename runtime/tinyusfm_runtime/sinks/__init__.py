"""Where results go: one sink a file, the protocol they keep, and the unfinished file behind each.

``open_sink`` picks the plug-in by the word before the first colon (``jsonl:out.jsonl``,
``igtl://:18945``); ``deliver`` hands a live result to a sink in the way that it can take.

A file sink writes beside its goal and takes the goal's name only when it is closed without an
error, so a file that is there is whole. It knows no engine; it is handed frames and predictions,
and live results by those that tell a late answer from a good one.
"""

from __future__ import annotations

import inspect
import os
import re
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live_result import LiveResult, StateChange
from tinyusfm_runtime.session import Prediction


@runtime_checkable
class Sink(Protocol):
    """A context manager that takes results in order.

    Leaving the context without an error, or through KeyboardInterrupt, publishes what was written;
    leaving it through any other error leaves no file behind.
    """

    def __enter__(self) -> Sink: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def write(self, frame: Frame, prediction: Prediction) -> None: ...

    def close(self) -> None: ...


_Made = TypeVar("_Made", bound="WholeFile")


class WholeFile(ABC):
    """The context of a sink that leaves a whole file or none: what it wrote stays after no error and after Ctrl-C."""

    def __enter__(self: _Made) -> _Made:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, KeyboardInterrupt):
            self.close()
        else:
            self._discard()

    @abstractmethod
    def close(self) -> None:
        """Publishes what was written."""

    @abstractmethod
    def _discard(self) -> None:
        """Leaves no file behind."""


def open_sink(location: str, *, facts: Mapping[str, Any] | None = None, **options: Any) -> Sink:
    """Opens a place for results.

    Args:
        location: ``NAME:WHERE``, such as ``jsonl:out.jsonl``, ``csv:out.csv``, ``video:out.mp4``, ``igtl://:18945``,
            ``dicom:folder``, ``audit:log.jsonl``.
        facts: what the caller knows (bundle id, labels, rate, source file); a sink takes those it has an option for.
        **options: handed to the sink; one that it does not know is an error.

    Returns:
        The sink, a context manager.

    Raises:
        InputError: no sink of that name, or an option does not fit.
        OutputError: it cannot be opened for writing.
        MissingExtra: a library is missing.
    """
    name, colon, rest = location.partition(":")
    if not colon or name not in plugins.names("sinks"):
        known = ", ".join(plugins.names("sinks"))
        raise InputError(f"a sink is NAME:WHERE, such as jsonl:results.jsonl; the names here: {known}")
    opener: Callable[..., Sink] = plugins.load("sinks", name).open_sink
    known_options = inspect.signature(opener).parameters
    unknown = [key for key in options if key not in known_options]
    if unknown:
        takes = ", ".join(key for key in known_options if key != "location") or "none"
        raise InputError(f"the {name} sink has no option {unknown[0]!r}; its options: {takes}")
    offered = {key: value for key, value in (facts or {}).items() if key in known_options and value is not None}
    return opener(rest, **{**offered, **options})


def deliver(sink: Sink, result: LiveResult) -> None:
    """Hands over one live result.

    A sink with ``write_live`` gets all of it. Another one gets frame and prediction, unless there is none or it is
    not to be shown.

    Args:
        sink: any sink.
        result: what the loop made.

    Raises:
        OutputError: the sink cannot write.
    """
    write_live = getattr(sink, "write_live", None)
    if write_live is not None:
        cast("Callable[[LiveResult], None]", write_live)(result)
    elif result.prediction is not None and not result.withheld:
        sink.write(result.frame, result.prediction)


def announce(sink: Sink, change: StateChange) -> None:
    """Tells a sink of a change of state, if it listens (``on_state``).

    Args:
        sink: any sink.
        change: from what to what, and why.

    Raises:
        OutputError: the sink cannot write.
    """
    on_state = getattr(sink, "on_state", None)
    if on_state is not None:
        cast("Callable[[StateChange], None]", on_state)(change)


def shown(result: LiveResult) -> Prediction | None:
    """The prediction that may be shown to people: there is one, it is valid and not withheld; else None."""
    prediction = result.prediction
    return prediction if prediction is not None and prediction.valid and not result.withheld else None


def smoothed(result: LiveResult) -> dict[str, Any] | None:
    """What smoothing over time says beside the raw answer, for records; None where it was not asked for.

    Args:
        result: what the loop made.

    Returns:
        ``hc_mm`` (median of the last measurements, mm, or None), ``held`` (it stands in for one that is missing) with
        ``held_ms`` (age of the newest measurement in it), ``flicker`` and ``flicker_smoothed`` (1 - Dice with the mask
        before, without and with smoothing, or None). A withheld result keeps the flicker alone.
    """
    said = result.reading
    if said is None:
        return None
    tells = not result.withheld
    return {
        "hc_mm": said.hc_mm if tells else None,
        "held": said.held and tells,
        "held_ms": said.held_ms if tells and said.hc_mm is not None else None,
        "flicker": said.flicker,
        "flicker_smoothed": said.flicker_smoothed,
    }


def listen_address(location: str, default_port: int) -> tuple[str, int]:
    """Reads where a sink that serves shall listen.

    Args:
        location: ``//HOST:PORT``, ``HOST:PORT`` or ``:PORT``; an IPv6 address stands in brackets. An empty host is
            this machine alone (127.0.0.1), port 0 any that is free.
        default_port: where no port is given.

    Returns:
        Host and port.

    Raises:
        InputError: it cannot be read so.
    """
    match = re.fullmatch(r"(?://)?(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]*)(?::(\d{1,5}))?/?", location)
    port = default_port if match is None or match[2] is None else int(match[2])
    if match is None or port > 65535:
        raise InputError("where to listen is //HOST:PORT, such as //127.0.0.1:8765 or //:18945 for this machine alone")
    return match[1].strip("[]") or "127.0.0.1", port


class PendingFile:
    """A file under a temporary name beside its goal; ``publish`` renames it, ``discard`` removes it.

    Args:
        location: the goal.
        what: what is being written, for messages ("the overlay video").

    Raises:
        OutputError: the folder is missing, not writable, or the goal is a folder.
    """

    def __init__(self, location: str | Path, what: str) -> None:
        self.goal, self.what = Path(location), what
        if self.goal.is_dir():
            raise OutputError(f"cannot write {what}: a folder of that name is in the way")
        try:
            _sweep(self.goal)
            self.path = _temporary(self.goal)
            self.path.touch(exist_ok=False)
        except OSError as error:
            raise self.failed(error) from error

    def failed(self, error: OSError) -> OutputError:
        """The error to raise when writing went wrong; nothing is left behind."""
        self.discard()
        return OutputError(f"cannot write {self.what}: {error.strerror or type(error).__name__}")

    def publish(self) -> None:
        """Gives the file its name, on the disk for good.

        Raises:
            OutputError: the disk is full or the folder went away.
        """
        try:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            self.path.replace(self.goal)
        except OSError as error:
            raise self.failed(error) from error

    def discard(self) -> None:
        """Removes the temporary file, if it is there."""
        path = getattr(self, "path", None)
        if path is not None:
            path.unlink(missing_ok=True)


class PendingFolder:
    """A folder under a temporary name beside its goal; ``publish`` renames it, ``discard`` removes it.

    Args:
        location: the goal; nothing of that name may be there.
        what: what is being written, for messages.

    Raises:
        OutputError: something is in the way, or the folder above is missing or not writable.
    """

    def __init__(self, location: str | Path, what: str) -> None:
        self.goal, self.what = Path(location), what
        if os.path.lexists(self.goal):
            raise OutputError(f"cannot write {what}: something of that name is there already, give a new name")
        try:
            _sweep(self.goal)
            self.path = _temporary(self.goal)
            self.path.mkdir()
        except OSError as error:
            raise self.failed(error) from error

    def failed(self, error: OSError) -> OutputError:
        """The error to raise when writing went wrong; nothing is left behind."""
        self.discard()
        return OutputError(f"cannot write {self.what}: {error.strerror or type(error).__name__}")

    def publish(self) -> None:
        """Gives the folder its name, its files on the disk for good.

        Raises:
            OutputError: the disk is full, or something took the name meanwhile.
        """
        try:
            for path in self.path.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            self.path.rename(self.goal)
        except OSError as error:
            raise self.failed(error) from error

    def discard(self) -> None:
        """Removes the temporary folder, if it is there."""
        path = getattr(self, "path", None)
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)


def _temporary(goal: Path) -> Path:
    return goal.with_name(f".{goal.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _sweep(goal: Path) -> None:
    """Removes what killed runs left beside the goal."""
    pattern = re.compile(re.escape(f".{goal.name}.tmp-") + r"(\d+)-[0-9a-f]{8}")
    for entry in goal.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


__all__ = [
    "PendingFile",
    "PendingFolder",
    "Sink",
    "WholeFile",
    "announce",
    "deliver",
    "listen_address",
    "open_sink",
    "shown",
    "smoothed",
]
