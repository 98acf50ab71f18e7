"""Accuracy of masks and of class scores against the truth.

One image or one split at a time.

Masks: Dice, IoU and the 95 % Hausdorff distance in pixels and, with a spacing, in millimetres. Where both masks are
empty the answer is right: Dice and IoU are 1, the distance is not defined and the case is counted by its caller. Where
one is empty Dice is 0 and there is no distance. ``paper`` repeats the official repository instead (methods.md 1.7):
medpy 0.4.0 gives Dice 0 for two empty masks, and its wrapper a distance of 0 there and of the image's side where one
is empty.

Classes: accuracy, balanced accuracy, AUC (one against the rest, mean over classes), F1 and expected calibration error.

It does not know models, tables or confidence intervals.

Shapes: HW masks, N images, K classes, P and Q border pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide

ECE_BINS = 15
"""Bins of equal width over the top probability (Guo et al. 2017, arXiv 1706.04599, section 2)."""
_CHUNK = 512
"""Border pixels compared at once, so that two long borders take a few megabytes."""


def overlap(predicted_HW: np.ndarray, truth_HW: np.ndarray, *, paper: bool = False) -> tuple[float, float]:
    """Dice and intersection over union of two masks.

    Args:
        predicted_HW: non-zero is foreground.
        truth_HW: of the same size.
        paper: two empty masks score 0, as in the official repository.

    Returns:
        Dice and IoU, each 0..1.

    Raises:
        InputError: masks of different size.
    """
    predicted, truth = _pair(predicted_HW, truth_HW)
    both = int(np.count_nonzero(predicted & truth))
    total = int(np.count_nonzero(predicted)) + int(np.count_nonzero(truth))
    if total == 0:
        empty = 0.0 if paper else 1.0
        return empty, empty
    return 2 * both / total, both / (total - both)


def hausdorff95(
    predicted_HW: np.ndarray,
    truth_HW: np.ndarray,
    spacing: tuple[float, float] = (1.0, 1.0),
    *,
    paper: bool = False,
) -> float | None:
    """95th percentile of the distances between the borders of two masks.

    Both directions are pooled (medpy's hd95).

    A border pixel is a foreground pixel with a 4-neighbour outside; beyond the image is outside.

    Args:
        predicted_HW: non-zero is foreground.
        truth_HW: of the same size.
        spacing: row and column spacing; the answer is in their unit.
        paper: where one mask is empty give the image's larger side, where both are, 0.

    Returns:
        The distance, or None where a mask is empty.

    Raises:
        InputError: masks of different size.
    """
    predicted, truth = _pair(predicted_HW, truth_HW)
    if not predicted.any() or not truth.any():
        if not paper:
            return None
        return 0.0 if predicted.any() == truth.any() else float(max(truth.shape))
    scale = np.asarray(spacing, np.float64)
    a_P2, b_Q2 = _border(predicted) * scale, _border(truth) * scale
    return float(np.percentile(wide(np.concatenate([_nearest(a_P2, b_Q2), _nearest(b_Q2, a_P2)])), 95))


def _pair(predicted_HW: np.ndarray, truth_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if predicted_HW.shape != truth_HW.shape or predicted_HW.ndim != 2:
        raise InputError(f"masks of shapes {predicted_HW.shape} and {truth_HW.shape} cannot be compared")
    return predicted_HW != 0, truth_HW != 0


def _border(mask_HW: np.ndarray) -> np.ndarray:
    padded = np.pad(mask_HW, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask_HW & ~inside)


def _nearest(a_P2: np.ndarray, b_Q2: np.ndarray) -> np.ndarray:
    found = [
        np.sqrt(((part[:, None] - b_Q2[None]) ** 2).sum(2).min(1))
        for part in (a_P2[start : start + _CHUNK] for start in range(0, len(a_P2), _CHUNK))
    ]
    return np.concatenate(found)


def accuracy(scores_NK: np.ndarray, truth_N: np.ndarray) -> float:
    """Fraction of images whose largest score is the true class."""
    return float(np.mean(scores_NK.argmax(1) == truth_N))


def balanced_accuracy(scores_NK: np.ndarray, truth_N: np.ndarray) -> float:
    """Mean over the classes present of the fraction of their images that are found."""
    predicted = scores_NK.argmax(1)
    return float(np.mean([np.mean(predicted[truth_N == k] == k) for k in np.unique(wide(truth_N))]))


def f1(scores_NK: np.ndarray, truth_N: np.ndarray) -> float:
    """F1: of class 1 for two classes, else the mean over the classes.

    Classes that are present or predicted count.
    """
    predicted = scores_NK.argmax(1)
    classes = [1] if scores_NK.shape[1] == 2 else np.union1d(wide(truth_N), wide(predicted)).tolist()
    found = []
    for k in classes:
        hits = np.count_nonzero((predicted == k) & (truth_N == k))
        total = np.count_nonzero(predicted == k) + np.count_nonzero(truth_N == k)
        found.append(2 * hits / total if total else 0.0)
    return float(np.mean(found))


def auc(scores_NK: np.ndarray, truth_N: np.ndarray) -> float:
    """Area under the ROC curve: of class 1 for two classes, else one-vs-rest.

    For more classes it is the mean of one against the rest.

    The area is the Mann-Whitney statistic, ties counted half. Classes without or with only positive images are left
    out; NaN where none remains.
    """
    classes = [1] if scores_NK.shape[1] == 2 else range(scores_NK.shape[1])
    found = [_rank_auc(scores_NK[:, k], truth_N == k) for k in classes]
    known = [value for value in found if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _rank_auc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    num_positive = int(np.count_nonzero(positive_N))
    num_negative = len(positive_N) - num_positive
    if num_positive == 0 or num_negative == 0:
        return math.nan
    _, inverse, counts = np.unique(wide(scores_N), return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(mean_rank[inverse][positive_N].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def calibration_error(scores_NK: np.ndarray, truth_N: np.ndarray, *, bins: int = ECE_BINS) -> float:
    """Expected calibration error of the top class.

    |accuracy - confidence| by bins of confidence, weighted by size.

    Args:
        scores_NK: probabilities, rows summing to 1.
        truth_N: true classes.
        bins: of equal width over 0..1.
    """
    top = scores_NK.max(1)
    right = scores_NK.argmax(1) == truth_N
    index = np.minimum((top * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=right - top.astype(np.float64), minlength=bins)
    return float(np.abs(gaps).sum() / len(top))


CLASS_METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "auc": auc,
    "f1": f1,
    "ece": calibration_error,
}
"""What a classification report holds, by name; each takes probabilities NK and true classes N."""


__all__ = [
    "CLASS_METRICS",
    "ECE_BINS",
    "accuracy",
    "auc",
    "balanced_accuracy",
    "calibration_error",
    "f1",
    "hausdorff95",
    "overlap",
]
