"""Frames that come at a rate, whether or not the answer to the last one is there.

As in a live loop the newest frame is taken and those that waited are dropped. The age of an answer runs from the
arrival of its frame. A closed loop, which asks again when it has its answer, hides exactly this waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.profiling.quantiles import quantiles

_Item = TypeVar("_Item")
LEAST_FRAMES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLoop:
    """What an open loop measured.

    Attributes:
        fps: frames per second that arrived.
        arrived: frames that arrived.
        ages_ms: arrival to answer, of every answered frame, in order.
        service_ms: time of the answer alone, of every answered frame.
        dropped: frames that were overtaken by a newer one before they were taken.
        misses: answers older than the time between two frames.
        longest_streak: most misses in a row.
    """

    fps: float
    arrived: int
    ages_ms: tuple[float, ...]
    service_ms: tuple[float, ...]
    dropped: int
    misses: int
    longest_streak: int

    def to_json(self) -> dict[str, Any]:
        """Plain data with all samples."""
        return {
            "fps": self.fps,
            "arrived": self.arrived,
            "answered": len(self.ages_ms),
            "dropped": self.dropped,
            "misses": self.misses,
            "longest_streak": self.longest_streak,
            "age_quantiles_ms": [found.to_json() for found in quantiles(self.ages_ms)],
            "ages_ms": list(self.ages_ms),
            "service_ms": list(self.service_ms),
        }

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for people."""
        answered = len(self.ages_ms)
        share = self.misses / answered if answered else 0.0
        rows = [
            ("arrived", f"{self.arrived} at {self.fps:g} a second"),
            ("answered", str(answered)),
            ("dropped", f"{self.dropped} ({self.dropped / max(1, self.arrived):.1%})"),
            ("older than one frame", f"{self.misses} ({share:.1%}), at most {self.longest_streak} in a row"),
        ]
        return [*rows, *((f"age p{found.percent:g} ms", found.text()) for found in quantiles(self.ages_ms))]


def run_open_loop(
    answer: Callable[[_Item], object],
    frames: Sequence[_Item],
    *,
    fps: float,
    duration_s: float,
    clock_ns: Callable[[], int] = time.monotonic_ns,
    sleep_s: Callable[[float], None] = time.sleep,
) -> OpenLoop:
    """Lets frames arrive at a rate for a while.

    Args:
        answer: answers for one frame.
        frames: repeated in turn.
        fps: frames per second.
        duration_s: how long frames arrive.
        clock_ns: monotonic clock.
        sleep_s: waits.

    Raises:
        InputError: no frames, or a rate or duration in which fewer than two frames arrive.
    """
    if not frames or not fps > 0 or fps * duration_s < LEAST_FRAMES:
        raise InputError(f"an open loop needs frames, and at least {LEAST_FRAMES} of them in its time")
    period_ns = 1e9 / fps
    arrived = int(fps * duration_s)
    start = clock_ns()
    ages: list[float] = []
    service: list[float] = []
    dropped = misses = streak = longest = 0
    last = -1
    while last < arrived - 1:
        newest = min(int((clock_ns() - start) / period_ns), arrived - 1)
        if newest <= last:
            sleep_s(max(0.0, (start + (last + 1) * period_ns - clock_ns()) / 1e9))
            continue
        dropped += newest - last - 1
        last = newest
        taken = clock_ns()
        answer(frames[newest % len(frames)])
        done = clock_ns()
        age = done - (start + newest * period_ns)
        ages.append(age / 1e6)
        service.append((done - taken) / 1e6)
        late = age > period_ns
        misses += late
        streak = streak + 1 if late else 0
        longest = max(longest, streak)
    return OpenLoop(
        fps=fps,
        arrived=arrived,
        ages_ms=tuple(ages),
        service_ms=tuple(service),
        dropped=dropped,
        misses=misses,
        longest_streak=longest,
    )


__all__ = ["LEAST_FRAMES", "OpenLoop", "run_open_loop"]
