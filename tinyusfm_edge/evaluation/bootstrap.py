"""Means with confidence intervals from whole patients.

Frames of one patient are not independent.

Percentile bootstrap (B. Efron, Bootstrap methods, Ann. Statist. 1979) over groups: groups are drawn with replacement
and the mean is taken over all frames of the groups drawn. It does not know what the values are.

Shapes: N values, G groups, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide

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
        values_N: one per frame.
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
    low, high = np.percentile(wide(means_R), [2.5, 97.5])
    return Estimate(
        mean=float(values.mean()), low=float(low), high=float(high), num_values=len(values), num_groups=len(sums_G)
    )


def estimate_statistic(
    statistic: Callable[[np.ndarray], float],
    groups_N: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate | None:
    """A statistic of all frames with a 95 % interval over groups.

    Args:
        statistic: takes the indices of frames (drawn groups repeat theirs) and gives a number, NaN where undefined.
        groups_N: the patient of each frame.
        resamples: number of draws; undefined ones are left out of the interval.
        seed: of the draws.

    Returns:
        The estimate, or None without frames or where the statistic of all frames is undefined.
    """
    if not groups_N:
        return None
    _, index = np.unique(np.asarray(groups_N, dtype=np.str_), return_inverse=True)
    members = [np.flatnonzero(index == group) for group in range(int(index.max()) + 1)]
    value = statistic(np.arange(len(index)))
    if math.isnan(value):
        return None
    draws = np.random.default_rng(seed).integers(0, len(members), (resamples, len(members)))
    found = np.array([statistic(np.concatenate([members[group] for group in draw])) for draw in draws])
    low, high = np.nanpercentile(wide(found), [2.5, 97.5])
    return Estimate(mean=value, low=float(low), high=float(high), num_values=len(index), num_groups=len(members))


def paired_difference(
    first_N: Sequence[float], second_N: Sequence[float], groups_N: Sequence[str], *, seed: int = SEED
) -> Estimate | None:
    """Mean of first minus second on the same frames, with a 95 % interval over groups.

    Args:
        first_N: one value a frame.
        second_N: of the same frames in the same order.
        groups_N: the patient of each frame.
        seed: of the draws.

    Raises:
        InputError: the two are of different length.
    """
    if len(first_N) != len(second_N):
        raise InputError(f"{len(first_N)} and {len(second_N)} values are not of the same frames")
    return estimate_mean([a - b for a, b in zip(first_N, second_N, strict=True)], groups_N, seed=seed)


__all__ = ["RESAMPLES", "SEED", "Estimate", "estimate_mean", "estimate_statistic", "paired_difference"]
