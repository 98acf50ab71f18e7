"""Quantiles of a sample with intervals, refused where the sample is too small.

The interval of a quantile lies between two order statistics, by the binomial distribution of how many samples fall
below it; no shape is assumed (H. A. David, H. N. Nagaraja, Order Statistics, 2003, 7.1). A quantile is refused where no
order statistic bounds it from above: the early-stopping rule of MLPerf inference rests on the same binomial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.numerics.order import wide

PERCENTS = (50.0, 90.0, 95.0, 99.0, 99.9)
"""Percentiles that are reported, where the sample supports them."""
CONFIDENCE = 0.95
"""Of the interval, two-sided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantile:
    """One percentile of a sample.

    Attributes:
        percent: 0..100.
        value: by linear interpolation, or None where the sample is too small for it.
        low: lower end of its interval, or None.
        high: upper end, or None.
        needed: samples that this percentile needs.
    """

    percent: float
    value: float | None
    low: float | None
    high: float | None
    needed: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"percent": self.percent, "value": self.value, "low": self.low, "high": self.high, "needed": self.needed}

    def text(self) -> str:
        """``value (low to high)``, or why not."""
        if self.value is None or self.low is None or self.high is None:
            return f"needs {self.needed} samples"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def samples_needed(percent: float, confidence: float = CONFIDENCE) -> int:
    """Fewest samples whose largest one bounds a percentile from above.

    Args:
        percent: above 0, below 100.
        confidence: of the two-sided interval.
    """
    share = percent / 100.0
    tail = (1.0 - confidence) / 2.0
    return math.ceil(math.log(tail) / math.log(max(share, 1.0 - share)) - 1e-9)


def quantile(samples: Sequence[float], percent: float, confidence: float = CONFIDENCE) -> Quantile:
    """One percentile with its interval.

    Args:
        samples: any numbers.
        percent: above 0, below 100.
        confidence: of the two-sided interval.
    """
    needed = samples_needed(percent, confidence)
    count = len(samples)
    if count < needed:
        return Quantile(percent=percent, value=None, low=None, high=None, needed=needed)
    ordered = np.sort(wide(samples))
    below = _binomial_cdf(count, percent / 100.0)
    tail = (1.0 - confidence) / 2.0
    # P(fewer than k samples below the quantile) = below[k - 1]
    low = int(np.searchsorted(below, tail, side="right"))
    high = int(np.searchsorted(below, 1.0 - tail, side="left"))
    return Quantile(
        percent=percent,
        value=float(np.percentile(wide(ordered), percent)),
        low=float(ordered[max(0, low - 1)]),
        high=float(ordered[min(count - 1, high)]),
        needed=needed,
    )


def quantiles(samples: Sequence[float], percents: Sequence[float] = PERCENTS) -> tuple[Quantile, ...]:
    """Several percentiles of one sample.

    Args:
        samples: any numbers.
        percents: each above 0 and below 100.
    """
    return tuple(quantile(samples, percent) for percent in percents)


def _binomial_cdf(count: int, share: float) -> np.ndarray:
    """P(X <= k) for k = 0..count, by logarithms."""
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    k = np.arange(count + 1)
    chance = logs[count] - logs[k] - logs[count - k] + k * math.log(share) + (count - k) * math.log1p(-share)
    return np.minimum(np.cumsum(np.exp(chance)), 1.0)


__all__ = ["CONFIDENCE", "PERCENTS", "Quantile", "quantile", "quantiles", "samples_needed"]
