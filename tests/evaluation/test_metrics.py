"""Metrics against closed forms, brute force and scikit-learn; the official repository's quirks behind a switch."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyusfm_edge.evaluation.metrics import (
    accuracy,
    auc,
    balanced_accuracy,
    calibration_error,
    f1,
    hausdorff95,
    overlap,
)
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide

MASKS = hnp.arrays(np.uint8, (12, 15), elements=st.integers(0, 1))
EMPTY = np.zeros((12, 15), np.uint8)


def square(row: int, col: int, side: int = 4) -> np.ndarray:
    mask = EMPTY.copy()
    mask[row : row + side, col : col + side] = 1
    return mask


@given(MASKS, MASKS)
@settings(max_examples=60, deadline=None)
def test_overlap_laws(a: np.ndarray, b: np.ndarray) -> None:
    dice, iou = overlap(a, b)
    assert overlap(b, a) == (dice, iou)
    assert dice == pytest.approx(2 * iou / (1 + iou))
    assert (dice == 1.0) == bool((a == b).all())


def test_empty_masks_follow_the_rule_and_paper_mode_the_repository() -> None:
    one = square(2, 3)
    assert overlap(EMPTY, EMPTY) == (1.0, 1.0)
    assert overlap(EMPTY, EMPTY, paper=True) == (0.0, 0.0)
    assert overlap(one, EMPTY) == overlap(one, EMPTY, paper=True) == (0.0, 0.0)
    assert hausdorff95(EMPTY, EMPTY) is None
    assert hausdorff95(one, EMPTY) is None
    assert hausdorff95(EMPTY, EMPTY, paper=True) == 0.0
    assert hausdorff95(one, EMPTY, paper=True) == 15.0


def brute_force(a: np.ndarray, b: np.ndarray, spacing: tuple[float, float]) -> float:
    def border(mask: np.ndarray) -> list[tuple[int, int]]:
        def inside(r: int, c: int) -> bool:
            return 0 <= r < mask.shape[0] and 0 <= c < mask.shape[1] and bool(mask[r, c])

        found = []
        for r, c in np.argwhere(mask):
            if not all(inside(r + dr, c + dc) for dr, dc in ((1, 0), (-1, 0), (0, 1), (0, -1))):
                found.append((int(r), int(c)))
        return found

    def nearest(p: tuple[int, int], others: list[tuple[int, int]]) -> float:
        return min(math.hypot((p[0] - q[0]) * spacing[0], (p[1] - q[1]) * spacing[1]) for q in others)

    first, second = border(a), border(b)
    return float(np.percentile(wide([nearest(p, second) for p in first] + [nearest(p, first) for p in second]), 95))


@given(MASKS, MASKS, st.floats(0.2, 3), st.floats(0.2, 3))
@settings(max_examples=40, deadline=None)
def test_border_distance_is_the_brute_force_one(a: np.ndarray, b: np.ndarray, row: float, col: float) -> None:
    found = hausdorff95(a, b, (row, col))
    if a.any() and b.any():
        assert found == pytest.approx(brute_force(a, b, (row, col)))
    else:
        assert found is None


def test_a_shift_shows_in_its_own_axis_and_unit() -> None:
    assert hausdorff95(square(2, 3), square(2, 3)) == 0.0
    assert hausdorff95(square(2, 3), square(5, 3)) == pytest.approx(3.0)
    assert hausdorff95(square(2, 3), square(5, 3), (0.5, 9.0)) == pytest.approx(1.5)


def test_masks_of_different_size_are_refused() -> None:
    for function in (overlap, hausdorff95):
        with pytest.raises(InputError, match="cannot be compared"):
            function(EMPTY, EMPTY[1:])


@given(st.integers(0, 10**6), st.integers(2, 4))
@settings(max_examples=25, deadline=None)
def test_class_metrics_are_those_of_scikit_learn(seed: int, classes: int) -> None:
    sk = pytest.importorskip("sklearn.metrics", reason="install tinyusfm-edge[calibration]")
    rng = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(classes), rng.integers(0, classes, 30)])
    scores = np.round(rng.dirichlet(np.ones(classes), len(truth)), 2) + 1e-3  # rounding makes ties
    scores /= scores.sum(1, keepdims=True)
    predicted = scores.argmax(1)
    assert accuracy(scores, truth) == pytest.approx(sk.accuracy_score(truth, predicted))
    assert balanced_accuracy(scores, truth) == pytest.approx(sk.balanced_accuracy_score(truth, predicted))
    if classes == 2:
        assert f1(scores, truth) == pytest.approx(sk.f1_score(truth, predicted))
        assert auc(scores, truth) == pytest.approx(sk.roc_auc_score(truth, scores[:, 1]))
    else:
        assert f1(scores, truth) == pytest.approx(sk.f1_score(truth, predicted, average="macro"))
        wanted = sk.roc_auc_score(truth, scores, multi_class="ovr", average="macro")
        assert auc(scores, truth) == pytest.approx(wanted)


def test_auc_of_a_single_class_is_undefined() -> None:
    assert math.isnan(auc(np.array([[0.4, 0.6], [0.3, 0.7]]), np.array([1, 1])))


def test_calibration_error_by_hand() -> None:
    scores = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert calibration_error(scores, np.array([0, 0, 0, 0])) == pytest.approx(0.5 * 0.1 + 0.5 * 0.4)
    assert calibration_error(scores, np.array([1, 1, 1, 1])) == pytest.approx(0.5 * 0.9 + 0.5 * 0.6)
    assert calibration_error(np.eye(2)[[0, 1]], np.array([0, 1])) == 0.0
