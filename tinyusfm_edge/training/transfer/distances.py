"""Distances between sets of features: Frechet, and to the nearest neighbour.

NumPy alone, in double. Shapes: N and M frames, D features.
"""

from __future__ import annotations

import numpy as np

from tinyusfm_runtime.errors import InputError


def frechet_distance(first_ND: np.ndarray, second_MD: np.ndarray) -> float:
    """Frechet distance of two Gaussians fitted to features.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``. Few frames make it larger, so compare sets of equal size.

    Args:
        first_ND: at least two frames.
        second_MD: likewise.

    Returns:
        The distance, not below 0, in squared units of the features.

    Raises:
        InputError: fewer than two frames, other widths, or a number that is not finite.
    """
    first, second = (np.asarray(part, np.float64) for part in (first_ND, second_MD))
    if min(len(first), len(second)) < 2 or first.shape[1:] != second.shape[1:]:
        raise InputError("a Frechet distance needs two frames or more of each set, of equally many features")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise InputError("a Frechet distance needs finite features")
    mean = first.mean(0) - second.mean(0)
    one, two = (np.atleast_2d(np.cov(part, rowvar=False)) for part in (first, second))
    # tr (C1 C2)^(1/2) = the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ two @ root)
    found = float(mean @ mean + np.trace(one) + np.trace(two) - 2 * np.sqrt(cross.clip(0)).sum())
    return max(0.0, found)


def nearest_distances(features_ND: np.ndarray, others_MD: np.ndarray) -> np.ndarray:
    """Distance of each frame to the nearest of others.

    Args:
        features_ND: frames.
        others_MD: at least one.

    Returns:
        N: root of the mean squared difference over the features.
    """
    others = np.asarray(others_MD, np.float64)
    rows = np.asarray(features_ND, np.float64)
    return np.array([np.sqrt(((others - row) ** 2).mean(1).min()) for row in rows], np.float64)


__all__ = ["frechet_distance", "nearest_distances"]
