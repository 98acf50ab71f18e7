"""Sources for tests of the live loop: one whose frames the test pushes by hand, and one that paces itself."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.phantom import make_phantom


def pictures(count: int = 16, height: int = 96, width: int = 128) -> list[Frame]:
    """Phantoms, all different."""
    return [make_phantom(seed, height=height, width=width).frame for seed in range(count)]


def wait_until(true: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Waits for something to become true; what it was."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(0.005)
    raise AssertionError(f"nothing came of it within {timeout_s} s")


class HandSource:
    """A live source that gives what the test pushes, and counts as alive when the test says so."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.count: dict[str, int] = {}
        self.contact_ns: int | None = None
        self.entered = self.left = self.closed = 0

    def push(self, *items: Any) -> None:
        for item in items:
            self.items.put(item)

    def keep_alive(self) -> None:
        self.contact_ns = time.monotonic_ns()

    @property
    def last_contact_ns(self) -> int | None:
        return self.contact_ns

    @property
    def counters(self) -> Mapping[str, int]:
        return self.count

    def close(self) -> None:
        self.closed += 1
        self.items.put(None)

    def __enter__(self) -> HandSource:
        self.entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.left += 1

    def __iter__(self) -> Iterator[Frame]:
        while (item := self.items.get()) is not None:
            if isinstance(item, Exception):
                raise item
            self.contact_ns = time.monotonic_ns()
            yield item


class PacedSource(HandSource):
    """A probe without a probe: frames at a rate for a time, or until it is closed; late ones are not made up for.

    Args:
        rate_hz: frames a second.
        frames: shown in turn.
        seconds: how long, None until closed.
        leak_bytes: kept for ever with every frame: the control of leak detectors.
    """

    def __init__(
        self, rate_hz: float, frames: Sequence[Frame], seconds: float | None = None, leak_bytes: int = 0
    ) -> None:
        super().__init__()
        self.period_s, self.frames, self.seconds = 1 / rate_hz, frames, seconds
        self.sent = 0
        self._stop = threading.Event()
        self._leak_bytes = leak_bytes
        self._leaked: list[np.ndarray] = []

    def close(self) -> None:
        self.closed += 1
        self._stop.set()

    def __iter__(self) -> Iterator[Frame]:
        begin = due = time.monotonic()
        while self.seconds is None or due - begin < self.seconds:
            if self._stop.wait(max(0.0, due - time.monotonic())):
                return
            now_ns = self.contact_ns = time.monotonic_ns()
            frame = self.frames[self.sent % len(self.frames)]
            if self._leak_bytes:
                self._leaked.append(np.ones(self._leak_bytes, np.uint8))
            self.sent += 1
            yield replace(frame, seq=self.sent, t_source_ns=now_ns, t_recv_ns=now_ns)
            due = max(due + self.period_s, time.monotonic() - self.period_s)
