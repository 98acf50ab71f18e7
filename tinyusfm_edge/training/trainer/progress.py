"""Progress of a training.

A bar with throughput and time left on a terminal, a plain line now and then elsewhere.

It does not know what is trained.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tinyusfm_edge.durations import in_words

LINE_EVERY_S = 10.0
"""Seconds between lines where standard error is no terminal."""
WINDOW = 20
"""Steps over which throughput is measured."""


class Progress:
    """Called on every step; knows the rate."""

    def __init__(self, steps: int, done: int, batch: int, *, quiet: bool = False) -> None:
        self.steps, self.done, self.batch, self.quiet = steps, done, batch, quiet
        self._times: deque[float] = deque([time.monotonic()], maxlen=WINDOW + 1)
        self._printed = time.monotonic()
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
        """Images per second over the last steps."""
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
        elif self._times[-1] - self._printed >= LINE_EVERY_S or self.done == self.steps:
            self._printed = self._times[-1]
            print(f"step {self.done}/{self.steps}: {text}, {in_words(self.left_s)} left", file=sys.stderr, flush=True)

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


def in_plain_words(found: Mapping[str, float]) -> str:
    """Measured scalars as people say them: ``validation Dice 0.484``.

    The rank is one of them and is left out.
    """
    words = {
        "val_dice": "validation Dice",
        "val_balanced_accuracy": "validation balanced accuracy",
        "val_nll": "NLL",
        "phantom_dice": "Dice on held-out phantoms",
        "negatives_empty": "share of negatives left empty",
    }
    known = {name: value for name, value in found.items() if name != "val_rank"} or found
    return ", ".join(f"{words.get(name, name.replace('_', ' '))} {value:.3f}" for name, value in known.items())


__all__ = ["LINE_EVERY_S", "WINDOW", "Progress", "in_plain_words"]
