"""Where results wait for whoever iterates: the newest one for live sources, all of them in order for files.

A slow reader of a live loop never holds the engine up, it merely sees fewer results; a slow reader of a file does.
"""

from __future__ import annotations

import threading
from collections import deque

from tinyusfm_runtime.live_result import DropPolicy, LiveResult


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
        """Hands a result over; with LOSSLESS it waits for a place, until the loop is closed."""
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
        """Lets nobody wait any more; what waits is thrown away."""
        with self._condition:
            self._closed = self._ended = True
            self.unseen += len(self._results)
            self._results.clear()
            self._condition.notify_all()


__all__ = ["Outbox"]
