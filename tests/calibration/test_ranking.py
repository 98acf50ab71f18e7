"""Ranks inside clusters, and the four curves of the published figure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyusfm_calibration.embeddings import id_keys
from tinyusfm_calibration.ranking import distance_rank, dual_rank, quality, quality_rank, rank_in_clusters
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.numerics.order import wide

EPOCHS = np.arange(10)
CURVES = np.stack(
    [
        np.full(10, 1.6),  # high and flat: 1st
        np.full(10, 1.0),  # medium and flat: 2nd
        1.0 + 0.5 * (-1.0) ** EPOCHS,  # oscillating about the medium one: 3rd
        np.full(10, 0.4),  # low and flat: 4th
    ]
)
"""The gradient courses drawn in TinyUSFM's overview figure, best first; the shapes are its, the numbers ours."""


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("fading", [0.0, 0.15])
def test_quality_gives_the_figures_order(seed: int, fading: float) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(4)
    # all gradients shrink while the model learns; that must not count as oscillation
    course = CURVES[order] * np.exp(-fading * EPOCHS) * rng.normal(1.0, 0.01, (4, 10))
    assert (order[np.argsort(wide(-quality(course)))] == np.arange(4)).all()
    among_many = np.concatenate([course, rng.normal(1.0, 0.05, (400, 10)) * np.exp(-fading * EPOCHS)])
    assert (order[np.argsort(wide(-quality(among_many)[:4]))] == np.arange(4)).all()


def test_without_the_oscillations_price_the_figures_order_is_lost() -> None:
    others = np.random.default_rng(0).normal(1.0, 0.3, (400, 10)).clip(0.01)
    course = np.concatenate([CURVES, others])
    course[2] += 0.02
    control = np.argsort(wide(-quality(course, weight=0.0)[:4])).tolist()
    assert control == [0, 2, 1, 3], "the mean alone takes the oscillating curve for better than the medium one"
    assert np.argsort(wide(-quality(course)[:4])).tolist() == [0, 1, 2, 3]


def test_a_corrupt_frames_gradient_is_clipped() -> None:
    rng = np.random.default_rng(1)
    course = rng.uniform(0.9, 1.1, (1000, 5))
    course[0] = 1e6
    assert quality(course)[0] < 1.2
    assert quality(course, winsor_percent=(0.0, 100.0))[0] > 1e5, "the control without a clip"


VALUES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=60)


@given(VALUES, st.randoms())
def test_ranks_run_from_0_to_1_and_follow_the_values_alone(pairs: list[tuple[int, int]], rng: object) -> None:
    values, labels = (np.array(column) for column in zip(*pairs, strict=True))
    ties = id_keys([f"frame-{i}" for i in range(len(values))])
    ranks = rank_in_clusters(values, labels, ties)
    for label in np.unique(wide(labels)):
        mine = np.flatnonzero(labels == label)
        wanted = np.linspace(0.0, 1.0, len(mine)) if len(mine) > 1 else [0.0]
        assert np.allclose(np.sort(wide(ranks[mine])), wanted)
        assert (np.diff(values[mine[np.argsort(wide(ranks[mine]))]]) >= 0).all()
    shuffled = list(range(len(values)))
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert (rank_in_clusters(values[shuffled], labels[shuffled], ties[shuffled]) == ranks[shuffled]).all()


def test_near_is_first_good_is_first_and_the_dual_rank_mixes_them() -> None:
    labels, ties = np.zeros(3, int), np.arange(3)
    near = distance_rank(np.array([0.3, 0.1, 0.2]), labels, ties)
    good = quality_rank(np.array([0.3, 0.1, 0.2]), labels, ties)
    assert near.tolist() == [1.0, 0.0, 0.5] and good.tolist() == [0.0, 1.0, 0.5]
    assert dual_rank(near, good).tolist() == [0.5, 0.5, 0.5]
    assert dual_rank(near, good, alpha=1.0).tolist() == near.tolist()
    assert dual_rank(near, good, alpha=0.0).tolist() == good.tolist()


@pytest.mark.parametrize(
    "gradients",
    [
        np.zeros((0, 3)),
        np.ones(4),
        np.full((4, 2), np.nan),
        -np.ones((4, 2)),
        np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]),
    ],
)
def test_gradients_that_rank_nothing_are_refused(gradients: np.ndarray) -> None:
    with pytest.raises(CalibrationError):
        quality(gradients)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(InputError):
        quality(CURVES, weight=-1.0)
    with pytest.raises(InputError):
        quality(CURVES, winsor_percent=(99.0, 1.0))
    with pytest.raises(InputError):
        dual_rank(np.zeros(2), np.zeros(2), alpha=1.1)
    with pytest.raises(CalibrationError, match="NaN"):
        rank_in_clusters(np.array([np.nan, 1.0]), np.zeros(2, int), np.arange(2))
    with pytest.raises(CalibrationError, match="do not fit"):
        rank_in_clusters(np.zeros(2), np.zeros(3, int), np.arange(2))
