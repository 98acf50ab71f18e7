"""Quotas: a whole number shared out by weights, within limits.

By largest remainders. It knows no images.

Shapes: K parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide


def share_out(total: int, weights: Sequence[float] | np.ndarray, *, limits: np.ndarray | None = None) -> np.ndarray:
    """Shares a whole number out in proportion to weights.

    Hamilton's largest remainders.

    What a part cannot take because of its limit goes to the others, again by their weights. Equal remainders go to the
    part that stands first.

    Args:
        total: what is shared out, from 0 up.
        weights: (K,) from 0 up.
        limits: most that each part takes, whole numbers (K,); None is no limit.

    Returns:
        int64 (K,); their sum is ``total``, or less where the limits allow no more.

    Raises:
        InputError: a negative number, or one that is not finite.
    """
    weights_K = np.asarray(weights, np.float64)
    if total < 0 or not np.isfinite(weights_K).all() or (weights_K < 0.0).any():
        raise InputError("a share needs weights and a total that are finite and not negative")
    room_K = np.full(len(weights_K), total, np.int64) if limits is None else np.asarray(limits, np.int64).copy()
    shares_K = np.zeros(len(weights_K), np.int64)
    while (left := total - int(shares_K.sum())) > 0:
        open_K = (room_K > shares_K) & (weights_K > 0.0)
        if not open_K.any():
            # only parts of weight zero have room; they are equals
            open_K = room_K > shares_K
            if not open_K.any():
                break
            weights_K = np.where(open_K, 1.0, 0.0)
        shares_K += np.minimum(_hamilton(left, np.where(open_K, weights_K, 0.0)), room_K - shares_K)
    return shares_K


def _hamilton(total: int, weights_K: np.ndarray) -> np.ndarray:
    ideal_K = total * (weights_K / weights_K.sum())
    whole_K = np.floor(ideal_K).astype(np.int64)
    left = total - int(whole_K.sum())
    # parts of weight zero come last, whatever rounding made of the others
    order = np.lexsort((np.arange(len(weights_K)), wide(-(ideal_K - whole_K)), wide(weights_K == 0.0)))
    if left >= 0:
        whole_K[order[:left]] += 1
    else:  # rounding made a product a whole number that it was not
        whole_K[order[left:]] -= 1
    return whole_K


def cluster_quotas(budget: int, sizes_K: np.ndarray, *, gamma: float = 1.0) -> np.ndarray:
    """How many images each cluster gives: budget * n^gamma / sum n^gamma.

    Args:
        budget: images wanted, from 0 to all of them.
        sizes_K: images in each cluster.
        gamma: 1 keeps the pool's proportions, 0.5 favours small clusters, 0 treats all alike.

    Returns:
        int64 (K,), none above its cluster's size, together exactly ``budget``.

    Raises:
        InputError: a budget larger than the pool, or a gamma outside 0..1.
    """
    if not 0 <= budget <= int(sizes_K.sum()):
        raise InputError(f"a budget of {budget} images cannot be taken from {int(sizes_K.sum())}")
    if not 0.0 <= gamma <= 1.0:
        raise InputError(f"gamma {gamma} must lie in 0..1")
    weights_K = np.where(sizes_K > 0, np.asarray(sizes_K, np.float64) ** gamma, 0.0)
    return share_out(budget, weights_K, limits=sizes_K)


__all__ = ["cluster_quotas", "share_out"]
