"""Shares by largest remainders, and the quotas of clusters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyusfm_calibration.quotas import cluster_quotas, share_out
from tinyusfm_runtime.errors import InputError

WEIGHTS = st.lists(st.floats(0.0, 1e6, allow_subnormal=False), min_size=1, max_size=20).filter(lambda w: sum(w) > 0)


@given(WEIGHTS, st.integers(0, 10_000))
def test_shares_add_up_and_stay_within_one_of_the_ideal(weights: list[float], total: int) -> None:
    shares = share_out(total, weights)
    assert shares.sum() == total
    ideal = total * np.array(weights) / sum(weights)
    assert (np.abs(shares - ideal) <= 1.0 + 1e-6 * total).all()


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.floats(0.0, 1.0), st.data())
def test_quotas_add_up_within_each_clusters_size(sizes: list[int], gamma: float, data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, sum(sizes)))
    quotas = cluster_quotas(budget, np.array(sizes), gamma=gamma)
    assert quotas.sum() == budget and (quotas <= sizes).all() and (quotas >= 0).all()


def test_the_textbook_case() -> None:
    # Hamilton's method on the usual example: 10 seats for 43, 39 and 18 votes
    assert share_out(10, [43, 39, 18]).tolist() == [4, 4, 2]


def test_limits_pass_on_what_they_hold_back_and_gamma_balances() -> None:
    assert share_out(10, [8, 1, 1], limits=np.array([2, 9, 9])).tolist() == [2, 4, 4]
    assert share_out(10, [1, 1], limits=np.array([2, 3])).tolist() == [2, 3]
    sizes = np.array([900, 100])
    assert cluster_quotas(100, sizes).tolist() == [90, 10]
    assert cluster_quotas(100, sizes, gamma=0.5).tolist() == [75, 25]
    assert cluster_quotas(100, sizes, gamma=0.0).tolist() == [50, 50]


@pytest.mark.parametrize("budget, gamma", [(-1, 1.0), (101, 1.0), (10, -0.1), (10, 1.5), (10, float("nan"))])
def test_a_quota_that_cannot_be_is_refused(budget: int, gamma: float) -> None:
    with pytest.raises(InputError):
        cluster_quotas(budget, np.array([60, 40]), gamma=gamma)
