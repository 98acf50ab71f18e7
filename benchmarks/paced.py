"""A probe without a probe: frames at a rate, for a time or until it is closed. For soaks and tests of the live loop.

Frames that could not be given in time are not made up for, as a real probe does not wait either. It knows no loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np

from tinyusfm_runtime.frame import Frame


class PacedSource:
    """A live source that shows some frames in turn.

    Args:
        rate_hz: frames per second.
        frames: shown in turn.
        seconds: how long, None until closed.
        leak_bytes: memory kept forever with every frame: the control that a leak detector must catch.

    Attributes:
        sent: frames given so far.
        entered: how often it was entered.
        left: how often it was left.
        closed: how often it was closed.
    """

    def __init__(
        self, rate_hz: float, frames: Sequence[Frame], seconds: float | None = None, leak_bytes: int = 0
    ) -> None:
        self.period_s, self.frames, self.seconds = 1 / rate_hz, frames, seconds
        self.sent = self.entered = self.left = self.closed = 0
        self._contact_ns: int | None = None
        self._stop = threading.Event()
        self._leak_bytes = leak_bytes
        self._leaked: list[np.ndarray] = []

    @property
    def last_contact_ns(self) -> int | None:
        """``time.monotonic_ns`` of the last frame."""
        return self._contact_ns

    @property
    def counters(self) -> Mapping[str, int]:
        """Nothing is ever refused."""
        return {}

    def close(self) -> None:
        """Ends the iteration."""
        self.closed += 1
        self._stop.set()

    def __enter__(self) -> PacedSource:
        self.entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.left += 1

    def __iter__(self) -> Iterator[Frame]:
        begin = due = time.monotonic()
        while self.seconds is None or due - begin < self.seconds:
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            now_ns = self._contact_ns = time.monotonic_ns()
            frame = self.frames[self.sent % len(self.frames)]
            if self._leak_bytes:
                self._leaked.append(np.ones(self._leak_bytes, np.uint8))
            self.sent += 1
            yield replace(frame, seq=self.sent, t_source_ns=now_ns, t_recv_ns=now_ns)
            due = max(due + self.period_s, time.monotonic() - self.period_s)
