"""Queues before and behind the inference thread, with the accounting of frames.

``Inbox`` holds frames that wait for the engine: a slot of one for live sources (a newer frame replaces an older one), a
bounded queue for files (the source waits). One lock guards the places and the counts, so the counts balance at every
instant they are read, the frame inside the engine included. ``Outbox`` holds results for the consumer: the newest one
for live sources, all of them in order for files. It knows no engine, no time and no pixels.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.results import DropPolicy, DropReason, LiveCounters, LiveResult


class Inbox:
    """The slot or queue between the capture thread and the inference thread.

    Args:
        policy: NEWEST has one place, LOSSLESS ``places``.
        places: length of the queue of files.
    """

    def __init__(self, policy: DropPolicy, places: int = 4) -> None:
        self.policy = policy
        self._places = 1 if policy is DropPolicy.NEWEST else places
        self._waiting: deque[Frame] = deque()
        self._condition = threading.Condition()
        self._received = self._processed = self._in_engine = self._deepest = 0
        self._dropped: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._left_out = self._before_this = 0
        self._ended = self._closed = False

    @property
    def deepest(self) -> int:
        """Most frames that ever waited at once."""
        return self._deepest

    def put(self, frame: Frame) -> bool:
        """Hands a received frame over; with LOSSLESS it waits for a place.

        Returns:
            False if the loop was closed: the frame is booked as dropped.
        """
        with self._condition:
            self._received += 1
            # a frame that waits for a place is not booked twice: it counts as in the engine's way
            self._in_engine += 1
            while self.policy is DropPolicy.LOSSLESS and len(self._waiting) >= self._places and not self._closed:
                self._condition.wait()
            self._in_engine -= 1
            if self._closed:
                self._drop(DropReason.CLOSING)
                return False
            if len(self._waiting) >= self._places:
                self._waiting.popleft()
                self._drop(DropReason.OVERTAKEN)
            self._waiting.append(frame)
            self._deepest = max(self._deepest, len(self._waiting))
            self._condition.notify_all()
            return True

    def refuse(self, reason: DropReason) -> None:
        """Books a frame that was received and dropped on arrival."""
        with self._condition:
            self._received += 1
            self._drop(reason)

    def reject(self, reason: str) -> None:
        """Books something that was received and cannot be used."""
        with self._condition:
            self._received += 1
            self._rejected[reason] += 1
            self._left_out += 1

    def take(self, timeout_s: float) -> Frame | None:
        """The next frame, then in the engine until ``processed`` or ``unusable``.

        None if there is none yet.
        """
        with self._condition:
            if not self._waiting and not self._ended and not self._closed:
                self._condition.wait(timeout_s)
            if not self._waiting:
                return None
            frame = self._waiting.popleft()
            self._in_engine += 1
            # what was left out before this one; frames that are overtaken from now on are newer than it
            self._before_this, self._left_out = self._left_out, 0
            self._condition.notify_all()
            return frame

    def processed(self) -> int:
        """Books the frame in the engine as answered.

        Returns:
            How many frames were left out since the last one that was answered.
        """
        with self._condition:
            self._in_engine -= 1
            self._processed += 1
            return self._before_this

    def unusable(self, reason: str) -> None:
        """Books the frame in the engine as rejected."""
        with self._condition:
            self._in_engine -= 1
            self._rejected[reason] += 1
            self._left_out += self._before_this + 1

    def end(self) -> None:
        """The source has no more frames; what waits is still answered."""
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def close(self) -> None:
        """Drops what waits and wakes all waiters."""
        with self._condition:
            self._closed = self._ended = True
            while self._waiting:
                self._waiting.pop()
                self._drop(DropReason.CLOSING)
            self._condition.notify_all()

    @property
    def finished(self) -> bool:
        """True if no frame waits and none will come."""
        with self._condition:
            return self._ended and not self._waiting

    def counters(self, source: Mapping[str, int]) -> LiveCounters:
        """The frame accounting at this instant.

        Args:
            source: the source's own counters, copied into it.
        """
        with self._condition:
            return LiveCounters(
                received=self._received,
                processed=self._processed,
                dropped=dict(self._dropped),
                rejected=dict(self._rejected),
                waiting=len(self._waiting) + self._in_engine,
                source=dict(source),
            )

    def _drop(self, reason: DropReason) -> None:
        self._dropped[reason.value] += 1
        self._left_out += 1


class Outbox:
    """The slot or queue between the inference thread and the iterator.

    Args:
        policy: NEWEST keeps one result, LOSSLESS up to ``places``.
        places: length of the queue of files.

    Attributes:
        unseen: results that were replaced by newer ones before anybody took them.
    """

    def __init__(self, policy: DropPolicy, places: int = 4) -> None:
        self.unseen = 0
        self._policy = policy
        self._places = 1 if policy is DropPolicy.NEWEST else places
        self._results: deque[LiveResult] = deque()
        self._condition = threading.Condition()
        self._ended = self._closed = False

    def put(self, result: LiveResult) -> None:
        """Hands a result over.

        With LOSSLESS it waits for a place, until the loop is closed.
        """
        with self._condition:
            while self._policy is DropPolicy.LOSSLESS and len(self._results) >= self._places and not self._closed:
                self._condition.wait()
            if len(self._results) >= self._places:
                self._results.popleft()
                self.unseen += 1
            self._results.append(result)
            self._condition.notify_all()

    def take(self) -> LiveResult | None:
        """Waits for a result; None once there will be no more."""
        with self._condition:
            while not self._results and not self._ended:
                self._condition.wait()
            if not self._results:
                return None
            result = self._results.popleft()
            self._condition.notify_all()
            return result

    def end(self) -> None:
        """There are no more results; what waits may still be taken."""
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def close(self) -> None:
        """Wakes all waiters and discards what waits."""
        with self._condition:
            self._closed = self._ended = True
            self.unseen += len(self._results)
            self._results.clear()
            self._condition.notify_all()


__all__ = ["Inbox", "Outbox"]
