"""How old results are and how long the engine took, as raw samples.

Kept for the last hour's worth of frames at most.

The memory is taken at once and never grows, so that a soak measures the loop and not its bookkeeping. It knows no
frames and no clocks.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.latency import PERCENTILES
from tinyusfm_runtime.numerics.order import wide

KEPT = 1 << 16
"""Samples that are kept; older ones make room."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveLatency:
    """Raw samples in order, ms.

    Attributes:
        age_ms: from a frame's reception to its result, of every result that has a prediction.
        infer_ms: the engine's part of it.
        period_ms: time between frames as estimated, or declared.
        stale: results that were older than the budget when they were made.
        late: results whose engine passed its deadline.
        deepest: most frames that ever waited at once.
    """

    age_ms: tuple[float, ...]
    infer_ms: tuple[float, ...]
    period_ms: float
    stale: int
    late: int
    deepest: int

    def percentiles(self) -> Mapping[str, Mapping[str, float]]:
        """``age_ms`` and ``infer_ms`` -> p50, p90, p99 and max; empty without samples."""
        found = {}
        for name, samples in (("age_ms", self.age_ms), ("infer_ms", self.infer_ms)):
            if samples:
                values = np.percentile(wide(samples), PERCENTILES)
                found[name] = {f"p{p}": float(v) for p, v in zip(PERCENTILES, values, strict=True)}
                found[name]["max"] = float(max(samples))
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data, raw samples included."""
        return {
            "version": 1,
            "n": len(self.age_ms),
            "percentiles": {name: dict(values) for name, values in self.percentiles().items()},
            "period_ms": self.period_ms,
            "stale": self.stale,
            "late": self.late,
            "deepest": self.deepest,
            "age_ms": list(self.age_ms),
            "infer_ms": list(self.infer_ms),
        }


class LatencyLog:
    """Two rings of samples.

    ``add`` belongs to the inference thread, reading may come from any.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._ages = np.full(kept, np.nan, np.float32)  # written to at once, so that the memory is really there
        self._infers = np.full(kept, np.nan, np.float32)
        self._lock = threading.Lock()
        self._count = self._stale = self._late = 0

    @property
    def count(self) -> int:
        """Samples ever added."""
        return self._count

    def add(self, age_ms: float, infer_ms: float | None, *, stale: bool, late: bool) -> None:
        """Takes one result; without an engine's time it is counted, but is no sample."""
        with self._lock:
            self._stale += stale
            self._late += late
            if infer_ms is not None:
                place = self._count % len(self._ages)
                self._ages[place], self._infers[place] = age_ms, infer_ms
                self._count += 1

    def report(self, period_ms: float, deepest: int, since: int = 0) -> LiveLatency:
        """The samples kept, in order.

        Args:
            period_ms: time between frames.
            deepest: most frames that waited at once.
            since: leave out the first so many samples ever added.
        """
        with self._lock:
            kept = len(self._ages)
            order = [n % kept for n in range(max(since, self._count - kept), self._count)]
            return LiveLatency(
                age_ms=tuple(self._ages[order].tolist()),
                infer_ms=tuple(self._infers[order].tolist()),
                period_ms=period_ms,
                stale=self._stale,
                late=self._late,
                deepest=deepest,
            )


__all__ = ["KEPT", "LatencyLog", "LiveLatency"]
