"""Progress of a training: a bar with throughput and time left on a terminal, a plain line now and then elsewhere.

It does not know what is trained.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

LINE_EVERY_S = 30.0
"""Seconds between lines where standard error is no terminal."""
WINDOW = 20
"""Steps over which throughput is measured."""


class Progress:
    """Told of every step; knows the rate."""

    def __init__(self, steps: int, done: int, batch: int, *, quiet: bool = False) -> None:
        self.steps, self.done, self.batch, self.quiet = steps, done, batch, quiet
        self._times: deque[float] = deque([time.monotonic()], maxlen=WINDOW + 1)
        self._said = time.monotonic()
        self._bar: Any = None
        self._line: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            self._bar = _rich_bar()
            if self._bar is not None:
                self._bar.start()
                self._line = self._bar.add_task("", total=self.steps, completed=self.done)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def rate(self) -> float:
        """Images a second over the last steps."""
        span = self._times[-1] - self._times[0]
        return (len(self._times) - 1) * self.batch / span if span > 0 else 0.0

    @property
    def left_s(self) -> float:
        """Seconds to the end at this rate."""
        return (self.steps - self.done) * self.batch / self.rate if self.rate else 0.0

    def advance(self, scalars: Mapping[str, float]) -> None:
        """One step more.

        Args:
            scalars: the latest ones; ``loss`` is shown.
        """
        self.done += 1
        self._times.append(time.monotonic())
        if self.quiet:
            return
        text = f"loss {scalars['loss']:.4f}, " if "loss" in scalars else ""
        text += f"{self.rate:.1f} images/s"
        if self._bar is not None:
            self._bar.update(self._line, completed=self.done, description=text)
        elif self._times[-1] - self._said >= LINE_EVERY_S or self.done == self.steps:
            self._said = self._times[-1]
            print(f"step {self.done}/{self.steps}: {text}, {self.left_s:.0f} s left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress
    except ImportError:
        return None
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    return RichProgress(*columns, console=Console(stderr=True))


__all__ = ["LINE_EVERY_S", "WINDOW", "Progress"]
