"""Freeze and rate of a stream.

Are these the same pixels again, and how far apart do frames arrive?

Both are figures for the state machine (live_state.py); nothing here decides anything.

Shapes: HW, HWC as in frame.py.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

_COARSE = 8
"""First look: every eighth row and column. Ultrasound is noisy, so an image that moves differs there already."""
_WINDOW = 32
"""Intervals that the period is estimated from."""
_HICCUPS = 16
"""Of so many intervals the longest is left out."""
_STALL_PERIODS, _STALL_MS = 10, 250.0
"""A pause longer than both is a stall and says nothing about the rate."""
_LEAST = 4
"""Intervals needed before there is an estimate."""


class StillImage:
    """Counts frames in a row whose pixels are those of the frame before.

    It compares with a copy of its own, so that a source that fills one buffer again and again is not taken for frozen.

    Attributes:
        run: identical frames after the last one that differed.
    """

    def __init__(self) -> None:
        self.run = 0
        self._before: np.ndarray | None = None

    def see(self, pixels: np.ndarray) -> bool:
        """Looks at the next image.

        Args:
            pixels: uint8 HW or HWC.

        Returns:
            True if it equals the image before, pixel by pixel.
        """
        before = self._before
        if before is None or before.shape != pixels.shape:
            self._before, self.run = pixels.copy(), 0
            return False
        coarse = slice(None, None, _COARSE)
        if np.array_equal(before[coarse, coarse], pixels[coarse, coarse]) and np.array_equal(before, pixels):
            self.run += 1
            return True
        np.copyto(before, pixels)
        self.run = 0
        return False


class FramePeriod:
    """Estimates the time between frames.

    The mean of the last intervals without the longest.

    The mean, unlike the median, survives bursts (a PLUS server sends several frames at once); leaving out the longest
    makes it survive hiccups, and a pause of many periods is not counted at all.

    Args:
        declared_ms: the period if it is known; nothing is estimated then.
        assumed_ms: what is taken before there is an estimate.
    """

    def __init__(self, declared_ms: float | None = None, assumed_ms: float = 1000 / 15) -> None:
        self._declared_ms = declared_ms
        self._estimate_ms = assumed_ms if declared_ms is None else declared_ms
        self._intervals_ms: deque[float] = deque(maxlen=_WINDOW)
        self._last_ns: int | None = None
        self._stalls = 0

    @property
    def ms(self) -> float:
        """The period in ms, declared, estimated or assumed."""
        return self._estimate_ms

    @property
    def known(self) -> bool:
        """True once it is declared or estimated."""
        return self._declared_ms is not None or len(self._intervals_ms) >= _LEAST

    def spare_ms(self, now_ns: int) -> float:
        """Time until the next frame is expected, ms.

        Args:
            now_ns: ``time.monotonic_ns``.

        Returns:
            Below zero where the frame is late; infinite where none is expected: there is no estimate yet, or no frame
            came for two periods.
        """
        if not self.known or self._last_ns is None:
            return math.inf
        since_ms = (now_ns - self._last_ns) / 1e6
        return math.inf if since_ms > 2 * self._estimate_ms else self._estimate_ms - since_ms

    def arrived(self, now_ns: int) -> None:
        """Takes note of a frame at ``time.monotonic_ns``."""
        last, self._last_ns = self._last_ns, now_ns
        if self._declared_ms is not None or last is None:
            return
        interval_ms = (now_ns - last) / 1e6
        if self.known and interval_ms > max(_STALL_PERIODS * self._estimate_ms, _STALL_MS):
            self._stalls += 1
            if self._stalls < _LEAST:
                return
            self._intervals_ms.clear()  # not a stall: the source has become slow
        self._stalls = 0
        self._intervals_ms.append(interval_ms)
        if self.known:
            count = len(self._intervals_ms)
            kept = sorted(self._intervals_ms)[: count - count // _HICCUPS]
            self._estimate_ms = max(sum(kept) / len(kept), 0.1)


__all__ = ["FramePeriod", "StillImage"]
