"""What takes long says how far it is.

A bar with the time left on a terminal, a line every ten seconds elsewhere.

The lines come from a clock of their own, so that a single long step is no silence. It does not know any command.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tinyusfm_edge.cli.voice import voice
from tinyusfm_edge.durations import in_words

Item = TypeVar("Item")
LINE_EVERY_S = 10.0
"""Seconds between lines where standard error is no terminal."""
LEAST_SHARE = 0.02
"""Share below which nothing is said about the time left: it would be a guess."""


class Ticker:
    """Says on standard error, every so often, what is being done.

    Used where there is no terminal.
    """

    def __init__(self, every_s: float | None = None) -> None:
        self._every_s = LINE_EVERY_S if every_s is None else every_s
        self._begun = time.monotonic()
        self._what, self._share, self._moved = "working", 0.0, self._begun
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def update(self, what: str, share: float) -> None:
        """Takes note of what is being done and the share that is done, 0..1."""
        if share > self._share:
            self._moved = time.monotonic()
        self._what, self._share = what, share

    @property
    def line(self) -> str:
        """What is said now."""
        now, share = time.monotonic(), self._share
        spent = now - self._begun
        # a share that stands still says nothing about the time left
        fresh = now - self._moved < self._every_s and LEAST_SHARE < share < 1
        left = f", about {in_words(spent / share * (1 - share))} left" if fresh else ""
        return f"{share:4.0%} {self._what}, {in_words(spent)}{left}"

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            print(self.line, file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Gives a function to be called with what is done and the share, 0..1.

    A bar with the time left if standard error is a terminal, else a line every ``LINE_EVERY_S``; nothing with ``-q``.
    """
    if voice.quiet:
        yield lambda what, share: None
        return
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
        except ImportError:
            pass
        else:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                line = bar.add_task("", total=1.0)
                yield lambda what, share: bar.update(line, description=what, completed=share)
            return
    with Ticker() as ticker:
        yield ticker.update


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """The items, with their progress shown as ``progress`` does.

    Args:
        items: what is gone through.
        label: what is being done.
        total: how many there are, or None where nobody knows.
    """
    with progress() as update:
        update(label, 0.0)
        for number, item in enumerate(items, 1):
            yield item
            update(label if total else f"{label}: {number}", min(1.0, number / total) if total else 0.0)


__all__ = ["LEAST_SHARE", "LINE_EVERY_S", "Item", "Ticker", "progress", "track"]
