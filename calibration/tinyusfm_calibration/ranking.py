"""Ranks inside clusters.

Distance to the centre, quality of the gradient's course, and both as one.

A re-implementation from the overview figure of TinyUSFM (arXiv:2510.19239) and its abstract; formulas and defaults are
ours. The figure ranks a high flat gradient first, a medium flat one second, a strongly oscillating one third although
its mean is about that of the second, and a low flat one last; Q = mean - lambda * std of the gradient's course gives
that order. It does not know images, models or how gradients are computed.

Shapes: N images, E epochs.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.numerics.order import wide

WINSOR_PERCENT: Final = (1.0, 99.0)
"""Each epoch's gradients are clipped here: the very highest come from overlays and corrupt frames."""


def rank_in_clusters(values_N: np.ndarray, labels_N: np.ndarray, ties_N: np.ndarray) -> np.ndarray:
    """Ranks within each cluster, ascending, first to last as 0 to 1.

    Args:
        values_N: what is ranked; the smallest is first.
        labels_N: cluster of each image.
        ties_N: numbers that order equal values, see ``embeddings.id_keys``.

    Returns:
        float64 (N,): rank / (n_c - 1), and 0 in a cluster of one.

    Raises:
        CalibrationError: NaN, or columns of different length.
    """
    if not len(values_N) == len(labels_N) == len(ties_N):
        raise CalibrationError(f"{len(values_N)} values, {len(labels_N)} clusters and {len(ties_N)} ties do not fit")
    if np.isnan(values_N).any():
        raise CalibrationError(f"{int(np.isnan(values_N).sum())} values to be ranked are NaN")
    order_N = np.lexsort((wide(ties_N), wide(values_N), wide(labels_N)))
    sizes_K = np.bincount(labels_N)
    starts_K = np.cumsum(sizes_K) - sizes_K
    sorted_labels_N = labels_N[order_N]
    places_N = np.arange(len(order_N)) - starts_K[sorted_labels_N]
    ranks_N = np.zeros(len(order_N))
    ranks_N[order_N] = places_N / np.maximum(sizes_K[sorted_labels_N] - 1, 1)
    return ranks_N


def distance_rank(distances_N: np.ndarray, labels_N: np.ndarray, ties_N: np.ndarray) -> np.ndarray:
    """r_d: the image nearest to its centre is 0, the farthest 1.

    The direction is as drawn in the figure.
    """
    return rank_in_clusters(distances_N, labels_N, ties_N)


def quality(
    gradients_NE: np.ndarray, *, weight: float = 1.0, winsor_percent: tuple[float, float] = WINSOR_PERCENT
) -> np.ndarray:
    """Q = mean - weight * std over the epochs of the gradient's course.

    Each epoch's gradients are divided by their median, which takes out that all of them shrink while a model learns,
    and clipped at two percentiles.

    Args:
        gradients_NE: gradient norm of each image in each epoch, from 0 up, under the same mask in all epochs.
        weight: lambda, how much oscillation costs.
        winsor_percent: lower and upper percentile of an epoch's clip.

    Returns:
        float64 (N,); high is good.

    Raises:
        CalibrationError: no epochs, a negative or not finite norm, or an epoch in which half of the norms are zero.
        InputError: a negative weight, or percentiles out of order.
    """
    gradients_NE = np.asarray(gradients_NE, np.float64)
    low, high = winsor_percent
    if weight < 0.0 or not 0.0 <= low < high <= 100.0:
        raise InputError(f"lambda {weight} or percentiles {low} to {high} cannot be used")
    if gradients_NE.ndim != 2 or 0 in gradients_NE.shape:
        raise CalibrationError(f"gradients of shape {gradients_NE.shape}: give one row per image, one column per epoch")
    if not np.isfinite(gradients_NE).all() or (gradients_NE < 0.0).any():
        raise CalibrationError("gradient norms must be finite and not negative")
    medians_E = np.median(wide(gradients_NE), axis=0)
    if (medians_E == 0.0).any():
        raise CalibrationError(f"in epoch {int(np.argmin(medians_E))} half of the gradients are zero")
    course_NE = gradients_NE / medians_E
    bounds_2E = np.percentile(wide(course_NE), (low, high), axis=0)
    course_NE = np.clip(course_NE, bounds_2E[0], bounds_2E[1])
    found_N: np.ndarray = course_NE.mean(1) - weight * course_NE.std(1)
    return found_N


def quality_rank(quality_N: np.ndarray, labels_N: np.ndarray, ties_N: np.ndarray) -> np.ndarray:
    """r_q: the image of the highest quality in its cluster is 0, the lowest 1."""
    return rank_in_clusters(-np.asarray(quality_N), labels_N, ties_N)


def dual_rank(distance_N: np.ndarray, quality_N: np.ndarray, *, alpha: float = 0.5) -> np.ndarray:
    """s = alpha * r_d + (1 - alpha) * r_q; low is good.

    Args:
        distance_N: r_d.
        quality_N: r_q.
        alpha: share of the distance, 0..1.

    Raises:
        InputError: alpha outside 0..1.
    """
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha {alpha} must lie in 0..1")
    found_N: np.ndarray = alpha * np.asarray(distance_N) + (1.0 - alpha) * np.asarray(quality_N)
    return found_N


__all__ = ["WINSOR_PERCENT", "distance_rank", "dual_rank", "quality", "quality_rank", "rank_in_clusters"]
