"""How long each stage of a start took."""

from __future__ import annotations

import time


class StartClock:
    """Wall time of start-up stages, ms; the first begins when it is made."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter_ns()

    def lap(self, name: str) -> None:
        """Ends a stage.

        Args:
            name: of the stage that ends now.
        """
        now = time.perf_counter_ns()
        self.laps[name] = (now - self._last) / 1e6
        self._last = now


__all__ = ["StartClock"]
