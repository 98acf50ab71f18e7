"""Putting numbers in order.

What has to happen before any sort, unique, percentile or median.

NumPy's vectorised quicksort of float16 gives wrong orders on CPUs that have AVX-512 without its FP16 part (seen with
2.3.5: ``np.unique`` of 8,000 entries with 16 values gave 30). Everything that orders an array goes through it:
``unique``, ``partition``, ``percentile``, ``quantile`` and ``median`` too. So no array of float16 is ever ordered here:
``wide`` stands around the argument of each such call, and a test scans the source for calls without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

FAULT = (
    "this NumPy sorts float16 wrongly on this CPU: the toolkit is not affected, it widens first; in code of your own "
    "sort array.astype(numpy.float32), or install another NumPy"
)
"""What there is to say where ``sorts_float16`` is False."""
_ENTRIES, _VALUES = 1 << 14, 16  # shorter arrays, and arrays with many values, are sorted correctly


def wide(values: Any) -> np.ndarray:
    """The same numbers in a type that NumPy sorts correctly.

    Args:
        values: an array, or anything ``numpy.asarray`` takes.

    Returns:
        float32 where it was float16 (every float16 is a float32), else the array as it is.
    """
    array = np.asarray(values)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def sorts_float16(sort: Callable[[np.ndarray], np.ndarray] = np.sort) -> bool:
    """Whether NumPy's own sort of float16 can be trusted on this machine.

    Args:
        sort: what is tried; another one in tests.

    Returns:
        True if a few long arrays with few distinct values come back in order and complete.
    """
    for seed in range(4):
        values = np.random.default_rng(seed).integers(0, _VALUES, _ENTRIES) / 8.0
        if not np.array_equal(sort(values.astype(np.float16)).astype(np.float64), np.sort(wide(values))):
            return False
    return True


__all__ = ["FAULT", "sorts_float16", "wide"]
