"""Source ``shm:NAME``: a ring of frames in POSIX shared memory.

It is written by the scanner's own process.

The layout and a writer in C are runtime/capi/tue_shm_ring.h and shm_writer.c. The reader takes the newest frame, counts
those it was too late for, and finds a writer restarted under the same name. A heartbeat without frames is a
probe that stands still; no heartbeat is a writer that died.

A writer on Linux wakes its readers at every frame; for one that does not it looks: seldom right after a frame, often
when the next one is due. It does not know who writes.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tinyusfm_runtime.errors import SourceError, UnsupportedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.sources._orientation import note_orientation
from tinyusfm_runtime.sources._source import PolledSource
from tinyusfm_runtime.sources._spacing import SpacingRule
from tinyusfm_runtime.transport.ring_wait import Waiter
from tinyusfm_runtime.transport.shm_ring import RingError, RingReader
from tinyusfm_runtime.transport.shm_writer import FOLDER, NAME

LOOK_S = (0.0005, 0.004)
"""Shortest and longest pause between two looks while frames come from a writer that does not wake; at 60 frames per
second this takes 1 % of a core."""
IDLE_LOOK_S = 0.01
"""Pause while none came for IDLE_NS; longest sleep at a ring whose writer wakes."""
IDLE_NS = 500_000_000
RENEWED_NS = 50_000_000
"""After so long without a frame it looks whether the name means another ring by now."""
DEAD_NS = 1_000_000_000
"""A ring whose heartbeat is older when it is found belongs to a writer that died."""
ABSENT_S = 0.03
"""Pause between two looks for a ring that is not there."""


def available() -> Availability:
    """Works where POSIX shared memory is a folder, which is Linux."""
    if sys.platform != "linux" or not FOLDER.is_dir():
        return Availability(usable=False, reason="POSIX shared memory is reached through /dev/shm, which is not here")
    return Availability(usable=True, reason="POSIX shared memory", extra=None)


def accepts(location: str) -> bool:
    """True for the scheme ``shm:``."""
    return location.startswith("shm:")


def open_source(
    location: str, *, spacing_mm: tuple[float, float] | None = None, orientation: str | None = None
) -> ShmSource:
    """Reads the name; the writer need not be there yet.

    Args:
        location: ``shm:NAME``.
        spacing_mm: (row, column) spacing that overrules the writer's, mm, or None.
        orientation: PLUS letters that overrule the writer's, or None.

    Returns:
        The source.

    Raises:
        SourceError: the name cannot be used.
        UnsupportedError: this machine has no /dev/shm.
    """
    name = location.removeprefix("shm:").removeprefix("//")
    if not NAME.fullmatch(name):
        raise SourceError("a shared-memory source is written shm:NAME with letters, digits, . _ and -")
    if not available().usable:
        raise UnsupportedError(f"shm: {available().reason}")
    return ShmSource(FOLDER / name, spacing_mm=spacing_mm, orientation=orientation)


class ShmSource(PolledSource):
    """A reader that works in the thread that iterates.

    ``close`` may come from any other. ``last_contact_ns`` is when the writer's heartbeat was last seen to move;
    ``counters`` hold what was refused, by reason, ``overtaken`` frames, ``torn`` reads and ``reconnects``.
    """

    def __init__(
        self, path: Path, *, spacing_mm: tuple[float, float] | None = None, orientation: str | None = None
    ) -> None:
        self._path, self.spacing_mm, self.orientation = path, spacing_mm, orientation
        super().__init__()
        self.status = f"waiting for a writer of the ring {path.name}"
        self._rule = SpacingRule(spacing_mm, self.findings)
        self._closed = threading.Event()
        self._file: int | None = None
        self._reader: RingReader | None = None
        self._waiter: Waiter | None = None
        self._rings = 0
        self._taken = self._seen = 0
        self._back: int | None = None
        self._heartbeat_ns = 0
        self._frame_ns = self._looked_ns = time.monotonic_ns()
        self._period_ns = 0

    def _refuse(self, error: RingError) -> None:
        self.tally.add(error.reason)
        if error.reason != "torn":  # a reader that came too late, and looks again
            self.findings.note(f"refused: {error}")
            self.status = f"the ring is there, but is refused: {error}"

    def close(self) -> None:
        """Ends the iteration within a few milliseconds; idempotent."""
        self._closed.set()
        self._release_if_idle()

    def __iter__(self) -> Iterator[Frame]:
        while not self._closed.is_set():
            with self._turn:
                frame = None if self._closed.is_set() else self._look()
            if frame is None:
                self._rest()
            else:
                yield frame
        with self._turn:
            self._release()

    def _rest(self) -> None:
        waiter = self._waiter
        wakes = waiter is not None and waiter.usable and not self._closed.is_set()
        if not (wakes and waiter is not None and waiter.wait(self._seen, IDLE_LOOK_S)):
            self._closed.wait(self._pause_s())

    def _pause_s(self) -> float:
        since_ns = time.monotonic_ns() - self._frame_ns
        if self._reader is None:
            return ABSENT_S
        if since_ns > IDLE_NS:
            return IDLE_LOOK_S
        return min(max((0.8 * self._period_ns - since_ns) / 1e9, LOOK_S[0]), LOOK_S[1])

    def _look(self) -> Frame | None:
        if self._reader is None and not self._attach():
            return None
        assert self._reader is not None
        try:
            number, heartbeat_ns = self._reader.state()
            self._seen = number
            now_ns = time.monotonic_ns()
            if heartbeat_ns != self._heartbeat_ns:
                self._heartbeat_ns = heartbeat_ns
                self._feel(heartbeat_ns, now_ns)
            if not self._taken and now_ns - heartbeat_ns > DEAD_NS:
                # the last image of a writer that died is not one of now
                self._taken = number
            if number < self._taken and number != self._back:
                # a writer only counts up; the newest image stays the newest
                self._back = number
                self.tally.add("generation")
            if number > self._taken:
                return self._take(number)
        except RingError as error:
            self._refuse(error)
            self._release()
        else:
            if now_ns - self._looked_ns > RENEWED_NS and now_ns - self._frame_ns > RENEWED_NS:
                self._looked_ns = now_ns
                self._come_over()
        return None

    def _feel(self, heartbeat_ns: int, now_ns: int) -> None:
        # both clocks are this machine's: a beat of the future is damage, an old one is that of a dead writer
        if heartbeat_ns > now_ns + 1_000_000_000:
            self.tally.add("heartbeat")
        else:
            self._contact_ns = max(self._contact_ns or 0, heartbeat_ns)

    def _take(self, number: int) -> Frame | None:
        assert self._reader is not None
        try:
            frame = self._reader.read(number)
        except RingError as error:
            self._refuse(error)
            if error.reason != "torn":
                self._taken = number
            return None
        late = number - self._taken - 1
        if self._taken and late > 0:
            self.tally.add("overtaken", late)
        now_ns = time.monotonic_ns()
        if self._taken:
            self._period_ns = int(
                0.8 * self._period_ns + 0.2 * min(now_ns - self._frame_ns, IDLE_NS) / max(late + 1, 1)
            )
        self._taken, self._frame_ns = number, now_ns
        self.status = "receiving"
        orientation = self.orientation or frame.orientation
        note_orientation(orientation, self.findings)
        spacing_mm = self._rule.of(frame.pixels.shape, frame.spacing_mm)
        if (spacing_mm, orientation) == (frame.spacing_mm, frame.orientation):
            return frame
        return replace(frame, spacing_mm=spacing_mm, orientation=orientation)

    def _attach(self) -> bool:
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            self._reader = RingReader(file)
        except RingError as error:
            os.close(file)
            self._refuse(error)
            return False
        self._file, self._taken, self._seen, self._heartbeat_ns = file, 0, 0, 0
        self._waiter = Waiter(file, self._reader.raw_header)
        self._rings += 1
        self.status = "the ring is there, waiting for the first frame"
        if self._rings > 1:
            self.tally.add("reconnects")
        return True

    def _come_over(self) -> None:
        """Unmaps a ring whose name is gone or means another one."""
        try:
            facts = self._path.lstat()
            same = self._reader is not None and self._reader.identity == (facts.st_dev, facts.st_ino)
        except OSError:
            same = False
        if not same:
            self._release()

    def _release(self) -> None:
        file, self._file, self._reader = self._file, None, None
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.close()
        if file is not None:
            os.close(file)


__all__ = [
    "ABSENT_S",
    "DEAD_NS",
    "IDLE_LOOK_S",
    "IDLE_NS",
    "LOOK_S",
    "RENEWED_NS",
    "ShmSource",
    "accepts",
    "available",
    "open_source",
]
