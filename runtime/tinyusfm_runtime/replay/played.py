"""Played: a file that behaves like a transducer.

Each frame comes when it is due, ready or not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType

from tinyusfm_runtime.frame import Frame, FrameSource

DEFAULT_RATE_HZ = 25.0
"""Of files that carry no times."""
_LONGEST_STEP_NS = 2_000_000_000  # two frames further apart than this belong to different scenes
_BEHIND_NS = 1_000_000_000


class Played:
    """A source of frames at their own rate.

        Played(open_source("clip.mp4"))                                     # once, at its own rate
        Played(open_source("clip.mp4"), lambda: open_source("clip.mp4"), rate_hz=15)    # again and again

    Args:
        first: the source, not entered yet.
        again: opens it again for another round, or None to end.
        rate_hz: frames per second, or None for the source's own times.
    """

    def __init__(
        self,
        first: FrameSource,
        again: Callable[[], FrameSource] | None = None,
        rate_hz: float | None = None,
    ) -> None:
        self.first, self._again, self._rate_hz = first, again, rate_hz
        self._closed = threading.Event()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the file's source obeyed or neglected so far."""
        return tuple(getattr(self.first, "notes", ()))

    @property
    def doubts(self) -> tuple[str, ...]:
        """What in the file is incomplete or contradicts itself so far."""
        return tuple(getattr(self.first, "doubts", ()))

    def __enter__(self) -> Played:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def __iter__(self) -> Iterator[Frame]:
        source, seq, due_ns, before_ns = self.first, 0, time.monotonic_ns(), None
        while True:
            with source as frames:
                for frame in frames:
                    due_ns += self._step_ns(before_ns, frame.t_source_ns) if seq else 0
                    before_ns = frame.t_source_ns
                    if self._closed.wait(max(0.0, (due_ns - time.monotonic_ns()) / 1e9)):
                        return
                    # after a stall the pace begins again here instead of catching up
                    due_ns = max(due_ns, time.monotonic_ns() - _BEHIND_NS)
                    yield replace(frame, seq=seq, t_recv_ns=time.monotonic_ns(), t_source_ns=None)
                    seq += 1
            if self._again is None or seq == 0:
                return
            source = self._again()

    def _step_ns(self, before_ns: int | None, now_ns: int | None) -> int:
        usual_ns = round(1e9 / (self._rate_hz or DEFAULT_RATE_HZ))
        if self._rate_hz is not None or before_ns is None or now_ns is None:
            return usual_ns
        step_ns = now_ns - before_ns
        return step_ns if 0 < step_ns < _LONGEST_STEP_NS else usual_ns


__all__ = ["DEFAULT_RATE_HZ", "Played"]
