"""Intervals are over patients, seeded, and as wide as they must be."""

from __future__ import annotations

import numpy as np
import pytest

from tinyusfm_edge.evaluation.bootstrap import Estimate, estimate_mean


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
