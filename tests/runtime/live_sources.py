"""Sources for tests of the live loop: one whose frames the test pushes by hand, and one that paces itself."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, TypeVar

from paced import PacedSource
from tests.phantoms import phantom
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.results import LiveEvent, StateChange

Kind = TypeVar("Kind", LiveEvent, StateChange)


def images(count: int = 16, height: int = 96, width: int = 128) -> list[Frame]:
    """Phantoms, all different."""
    return [phantom(seed, height=height, width=width).frame for seed in range(count)]


def only(kind: type[Kind], kept: list[Kind]) -> Callable[[LiveEvent | StateChange], None]:
    """An ``on_event`` that keeps what is of one kind."""

    def keep(event: LiveEvent | StateChange) -> None:
        if isinstance(event, kind):
            kept.append(event)

    return keep


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


__all__ = ["HandSource", "PacedSource", "images", "wait_until"]
