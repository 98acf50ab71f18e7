"""Intervals are over patients, seeded, and as wide as they must be."""

from __future__ import annotations

import numpy as np
import pytest

from tinyusfm_edge.evaluation.bootstrap import Estimate, estimate_mean, estimate_statistic, paired_difference
from tinyusfm_runtime.errors import InputError


def test_mean_and_counts() -> None:
    found = estimate_mean([1.0, 2.0, 6.0], ["a", "a", "b"])
    assert found is not None
    assert (found.mean, found.num_values, found.num_groups) == (3.0, 3, 2)
    assert found.low == 1.5 and found.high == 6.0, "the draws aa and bb are the ends"


def test_no_values_give_no_estimate() -> None:
    assert estimate_mean([], []) is None


def test_interval_agrees_with_the_normal_one_for_independent_values() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = estimate_mean(values.tolist(), [str(i) for i in range(400)])
    assert found is not None
    half = 1.96 * values.std() / np.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def test_frames_of_one_patient_do_not_narrow_it() -> None:
    """Ten copies of each value are no more information; taken as frames on their own they would seem so."""
    values = np.random.default_rng(0).normal(0, 1, 60)
    copies, patients = np.repeat(values, 10).tolist(), np.repeat(np.arange(60), 10).astype(str).tolist()
    single = estimate_mean(values.tolist(), [str(i) for i in range(60)])
    grouped = estimate_mean(copies, patients)
    wrong = estimate_mean(copies, [str(i) for i in range(600)])
    assert single is not None and grouped is not None and wrong is not None
    assert grouped.high - grouped.low == pytest.approx(single.high - single.low, rel=0.02)
    assert wrong.high - wrong.low < 0.5 * (single.high - single.low)


def test_same_seed_same_interval() -> None:
    values, groups = [1.0, 4.0, 2.0, 8.0], ["a", "b", "c", "d"]
    assert estimate_mean(values, groups, seed=1) == estimate_mean(values, groups, seed=1)
    assert estimate_mean(values, groups, seed=1, resamples=50) != estimate_mean(values, groups, seed=2, resamples=50)


def test_text() -> None:
    found = Estimate(mean=1.234, low=-0.5, high=2.0, num_values=3, num_groups=2)
    assert found.text(2) == "1.23 (-0.50 to 2.00)"
    assert found.text(1, sign=True) == "+1.2 (-0.5 to +2.0)"


def test_a_statistic_of_means_has_the_interval_of_the_mean() -> None:
    values = np.random.default_rng(3).normal(size=40)
    groups = [f"p{i // 3}" for i in range(40)]
    direct = estimate_mean(values.tolist(), groups)
    found = estimate_statistic(lambda index: float(values[index].mean()), groups)
    assert direct is not None and found is not None
    assert (found.mean, found.num_groups) == (pytest.approx(direct.mean), direct.num_groups)
    assert (found.low, found.high) == (pytest.approx(direct.low), pytest.approx(direct.high))


def test_an_undefined_statistic_gives_no_estimate() -> None:
    assert estimate_statistic(lambda index: float("nan"), ["a", "b"]) is None
    assert estimate_statistic(lambda index: 0.0, []) is None


def test_a_paired_difference_is_narrower_than_its_parts() -> None:
    rng = np.random.default_rng(5)
    base = rng.normal(size=60)
    groups = [f"p{i}" for i in range(60)]
    first, second = (base + 0.1 + rng.normal(scale=0.01, size=60)).tolist(), base.tolist()
    difference, alone = paired_difference(first, second, groups), estimate_mean(first, groups)
    assert difference is not None and alone is not None
    assert difference.low > 0.05
    assert difference.high - difference.low < 0.2 * (alone.high - alone.low)
    with pytest.raises(InputError, match="same frames"):
        paired_difference(first, second[1:], groups)
