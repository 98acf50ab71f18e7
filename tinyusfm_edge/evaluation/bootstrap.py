"""Means with confidence intervals from whole patients: frames of one patient are not independent.

Percentile bootstrap (B. Efron, Bootstrap methods, Ann. Statist. 1979) over groups: groups are drawn with replacement
and the mean is taken over all frames of the groups drawn. It does not know what the values are.

Shapes: N values, G groups, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
"""Resamples of an interval; the 2.5 % ends then rest on 50 resamples each."""
SEED = 42
"""Seed of the draws, so that a report can be repeated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean and its 95 % interval.

    Attributes:
        mean: over frames.
        low: 2.5 % end of the interval over groups.
        high: 97.5 % end.
        num_values: frames.
        num_groups: patients.
    """

    mean: float
    low: float
    high: float
    num_values: int
    num_groups: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def text(self, digits: int, *, sign: bool = False) -> str:
        """``mean (low to high)``, rounded.

        Args:
            digits: decimals.
            sign: write the plus sign too.
        """
        form = f"{'+' if sign else ''}.{digits}f"
        return f"{self.mean:{form}} ({self.low:{form}} to {self.high:{form}})"


def estimate_mean(
    values_N: Sequence[float], groups_N: Sequence[str], *, resamples: int = RESAMPLES, seed: int = SEED
) -> Estimate | None:
    """Mean of the values with a 95 % interval over groups.

    Args:
        values_N: one a frame.
        groups_N: the patient of each frame.
        resamples: number of draws.
        seed: of the draws.

    Returns:
        The estimate, or None without values.
    """
    if not values_N:
        return None
    values = np.asarray(values_N, np.float64)
    _, index = np.unique(np.asarray(groups_N, dtype=np.str_), return_inverse=True)
    sums_G = np.bincount(index, weights=values)
    counts_G = np.bincount(index)
    draws_RG = np.random.default_rng(seed).integers(0, len(sums_G), (resamples, len(sums_G)))
    means_R = sums_G[draws_RG].sum(1) / counts_G[draws_RG].sum(1)
    low, high = np.percentile(means_R, [2.5, 97.5])
    return Estimate(
        mean=float(values.mean()), low=float(low), high=float(high), num_values=len(values), num_groups=len(sums_G)
    )


__all__ = ["RESAMPLES", "SEED", "Estimate", "estimate_mean"]
