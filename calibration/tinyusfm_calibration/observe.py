"""Streamed observation of activations.

A histogram that any order of frames fills the same way.

Bins are a power of two wide and aligned at zero. When a larger value comes, neighbouring bins are
merged until it fits, which moves no count across an edge, so the result depends on what was seen
and never on the order (Welford-like averages would not have that). It does not know what a range is.

Shapes: any; activations are flattened. N bins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from tinyusfm_runtime.errors import CalibrationError

NUM_BINS = 16384
"""Bins over [-2^e, 2^e): at least 32 for each of the 256 codes even if the values fill only a quarter of it."""

_EMPTY_EXPONENT = -120


@dataclass(kw_only=True, slots=True)
class Histogram:
    """Counts of one tensor's values.

    Attributes:
        name: the tensor.
        low: smallest value seen.
        high: largest value seen.
        exponent: bins cover [-2^exponent, 2^exponent).
        counts_N: int64 counts.
    """

    name: str
    low: float = math.inf
    high: float = -math.inf
    exponent: int = _EMPTY_EXPONENT
    counts_N: np.ndarray = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))

    @property
    def width(self) -> float:
        """Width of a bin, a power of two."""
        return math.ldexp(2.0 / NUM_BINS, self.exponent)

    @property
    def total(self) -> int:
        """Values seen."""
        return int(self.counts_N.sum())

    @property
    def edges_N(self) -> np.ndarray:
        """float64 left edge of each bin; the right edge is ``width`` further."""
        return (np.arange(NUM_BINS) - NUM_BINS // 2) * self.width

    def add(self, values: np.ndarray) -> None:
        """Counts one frame's values.

        Args:
            values: floating-point array of any shape.

        Raises:
            CalibrationError: no values, or NaN or infinity among them.
        """
        flat = np.asarray(values).ravel()
        if flat.dtype != np.float32:
            flat = flat.astype(np.float64)
        if flat.size == 0 or not np.isfinite(flat).all():
            raise CalibrationError(f"tensor {self.name!r} holds NaN, infinity or nothing on a calibration frame")
        low, high = float(flat.min()), float(flat.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._make_room(max(-low, high))
        # the width is a power of two, so the division is exact in float32 as well
        index = np.floor(flat / flat.dtype.type(self.width)).astype(np.int64) + NUM_BINS // 2
        self.counts_N += np.bincount(index, minlength=NUM_BINS)

    def _make_room(self, largest: float) -> None:
        if largest == 0.0:
            return
        # frexp: largest = m * 2^e with 0.5 <= m < 1, so largest < 2^e, and -2^e itself has a bin
        needed = math.frexp(largest)[1]
        steps = needed - self.exponent
        if steps <= 0:
            return
        for _ in range(min(steps, NUM_BINS.bit_length())):
            self._merge_neighbours()
        self.exponent = needed

    def _merge_neighbours(self) -> None:
        half = self.counts_N.reshape(-1, 2).sum(1)
        self.counts_N = np.zeros(NUM_BINS, np.int64)
        self.counts_N[NUM_BINS // 4 : NUM_BINS // 4 + half.size] = half


__all__ = ["NUM_BINS", "Histogram"]
