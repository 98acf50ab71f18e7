"""Where results go: one sink a file, the protocol they keep, and the unfinished file behind each.

A sink writes beside its goal and takes the goal's name only when it is closed without an error,
so a file that is there is whole. It knows no engine; it is handed frames and predictions.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live_result import LiveResult
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


def open_sink(location: str, **options: Any) -> Sink:
    """Opens a sink that is named outright.

    Args:
        location: ``NAME:PLACE``, such as ``jsonl:out.jsonl``.
        **options: handed to the sink.

    Raises:
        InputError: no sink of that name.
        OutputError: it cannot be written.
        MissingExtra: a library is missing.
    """
    name, colon, place = location.partition(":")
    if not colon or name not in plugins.names("sinks"):
        there = ", ".join(plugins.names("sinks"))
        raise InputError(f"a sink is written NAME:PLACE, such as jsonl:out.jsonl; sinks here: {there}")
    sink: Sink = plugins.load("sinks", name).open_sink(place, **options)
    return sink


def deliver(sink: Sink, result: LiveResult) -> None:
    """Hands a live result to a sink; one that only knows predictions gets those that may be shown.

    Raises:
        OutputError: it cannot be written.
    """
    write_live = getattr(sink, "write_live", None)
    if write_live is not None:
        write_live(result)
    elif result.prediction is not None and not result.withheld:
        sink.write(result.frame, result.prediction)


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
            self.path = self.goal.with_name(f".{self.goal.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
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


def _sweep(goal: Path) -> None:
    """Removes what killed runs left beside the goal."""
    pattern = re.compile(re.escape(f".{goal.name}.tmp-") + r"(\d+)-[0-9a-f]{8}")
    for entry in goal.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            entry.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def wants_file(error: BaseException | None) -> bool:
    """True if a context that ends so should keep its file: no error, or the user pressed Ctrl-C."""
    return error is None or isinstance(error, KeyboardInterrupt)


__all__ = ["PendingFile", "Sink", "deliver", "open_sink", "wants_file"]
