"""While no frame comes, a line says so, ever more rarely.

It says what is waited for, why, and for how long.

It looks at a live loop's counters from a thread of its own and changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tinyusfm_edge.cli import console
from tinyusfm_edge.durations import in_words

if TYPE_CHECKING:
    from tinyusfm_runtime.live.loop import Live
    from tinyusfm_runtime.results import LiveEvent, StateChange

FIRST_S, MOST_S = 2.0, 60.0
"""Seconds without a frame until the first line, and between lines at most."""


class Waiting:
    """Prints a line while a loop gets no frames.

    The first comes after 2 s, the next ones after 4, 8 and so on, up to a minute apart.

    Args:
        location: the source as it was typed.
        say: prints a line.
        first_s: seconds until the first line.
    """

    def __init__(self, location: str, *, say: Callable[[str], None] = console.note, first_s: float = FIRST_S) -> None:
        self.location, self._say, self._first_s = location, say, first_s
        self.reason = ""
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def event(self, event: StateChange | LiveEvent) -> None:
        """Takes note of why there is nothing, where the source says it."""
        if getattr(getattr(event, "kind", None), "value", "") == "source":
            self.reason = event.reason

    def watch(self, live: Live) -> Waiting:
        """Watches an entered loop until this is left.

        Args:
            live: the loop.
        """
        self._thread = threading.Thread(target=self._run, args=(live,), name="waiting", daemon=True)
        return self

    def __enter__(self) -> Waiting:
        assert self._thread is not None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, live: Live) -> None:
        seen, since, pause = 0, time.monotonic(), self._first_s
        told = since
        while not self._over.wait(min(0.1, self._first_s)):
            now, received = time.monotonic(), live.counters.received
            if received != seen:
                if pause > self._first_s:
                    self._say(f"frames arrive from {self.location}")
                seen, since, told, pause = received, now, now, self._first_s
            elif live.is_live and now - told >= pause:
                tries = sum(number for name, number in live.counters.source.items() if "connection" in name)
                counted = f", {tries} tries" if tries else ""
                why = f": {self.reason}" if self.reason else ""
                self._say(f"waiting for {self.location} for {in_words(now - since)}{counted}{why}")
                told, pause = now, min(MOST_S, 2 * pause)


__all__ = ["FIRST_S", "MOST_S", "Waiting"]
