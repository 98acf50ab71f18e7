"""Slot: the newest frame between two threads.

Whoever is late gets the newest frame and never a queue: a queued frame is a stale frame. It does
not know where frames come from or what is done with them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tinyusfm_runtime.sources._source import LinkedSource

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import Frame


class FrameSlot:
    """Room for one frame.

    ``put`` overwrites, ``take`` waits, ``close`` ends the waiting.
    """

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


class SlotSource(LinkedSource):
    """The common half of live sources that another thread feeds.

    ``counters`` hold ``overtaken`` frames and what was refused, by reason.

    Attributes:
        slot: where the newest frame waits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.slot = FrameSlot()

    def refuse(self, reason: str, hint: str) -> None:
        """Counts something that cannot be used; the first of each kind becomes a note.

        Args:
            reason: one word to count it by.
            hint: what was wrong and how to mend it, one line.
        """
        self.tally.add(reason)
        self.findings.note(f"refused: {hint}")

    def __iter__(self) -> Iterator[Frame]:
        while (frame := self.slot.take()) is not None:
            yield frame

    def close(self) -> None:
        """Ends the iteration; idempotent."""
        self.slot.close()


__all__ = [
    "FrameSlot",
    "SlotSource",
]
