"""Slot: the newest frame between two threads, and counters that both may touch.

Whoever is late gets the newest frame and never a queue: a picture that waits is a picture that lies about now. It does
not know where frames come from or what is done with them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import Frame


class Counters:
    """Events by name, counted from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, int] = {}

    def add(self, name: str, count: int = 1) -> None:
        """Counts an event.

        Args:
            name: what happened, one word.
            count: how often, 0 or more.
        """
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + count

    def snapshot(self) -> Mapping[str, int]:
        """What was counted so far; a copy."""
        with self._lock:
            return dict(self._counts)


class FrameSlot:
    """Room for one frame: ``put`` overwrites, ``take`` waits, ``close`` ends the waiting."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """True after ``close``."""
        return self._closed

    def put(self, frame: Frame) -> bool:
        """Leaves a frame.

        Args:
            frame: any frame; the slot keeps it until it is taken or overwritten.

        Returns:
            True if it overwrote one that nobody had taken.
        """
        with self._changed:
            overtaken = self._frame is not None
            if not self._closed:
                self._frame = frame
                self._changed.notify()
            return overtaken

    def take(self) -> Frame | None:
        """Waits for a frame; None after ``close``."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._frame is not None)
            frame, self._frame = self._frame, None
            return None if self._closed else frame

    def close(self) -> None:
        """Wakes whoever waits; a frame that was not taken is gone."""
        with self._changed:
            self._closed, self._frame = True, None
            self._changed.notify_all()


class SlotSource:
    """The half of a live source that is the same for all that are fed by another thread.

    Attributes:
        notes: what a user should know about the source, one line each.
    """

    def __init__(self) -> None:
        self.slot = FrameSlot()
        self.tally = Counters()
        self.notes: tuple[str, ...] = ()
        self._contact_ns: int | None = None

    def __enter__(self) -> SlotSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        while (frame := self.slot.take()) is not None:
            yield frame

    @property
    def last_contact_ns(self) -> int | None:
        """``time.monotonic_ns`` of the last sign of life, or None before the first."""
        return self._contact_ns

    @property
    def counters(self) -> Mapping[str, int]:
        """``overtaken`` frames and what was refused, by reason."""
        return self.tally.snapshot()

    def close(self) -> None:
        """Ends the iteration; closing twice is harmless."""
        self.slot.close()


__all__ = ["Counters", "FrameSlot", "SlotSource"]
