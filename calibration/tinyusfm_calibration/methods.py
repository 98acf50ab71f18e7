"""From a histogram to a range, each method one small function.

Min-max, percentile, entropy and MSE.

Every range holds zero (so zero has an exact code, which padded convolutions need) and lies within
what was seen. Quantization is meant as 8 bits; symmetric targets take the larger side. It does not
know tensors' meaning or targets.

Shapes: N bins, C candidate bins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from tinyusfm_calibration.observe import NUM_BINS, Histogram
from tinyusfm_runtime.errors import CalibrationError, InputError

PERCENTILE: Final = 99.99
"""Share of the values kept, percent; 99.99 is the usual choice for 8 bits (Wu et al. 2020, arXiv:2004.09602, 4.2)."""

ENTROPY_LEVELS: Final = 128
"""Codes of one sign of an 8-bit symmetric quantizer (S. Migacz, 8-bit Inference with TensorRT, GTC 2017)."""

ENTROPY_BINS: Final = 2048
"""Bins over |x| of the same source."""


def minmax(histogram: Histogram) -> tuple[float, float]:
    """Everything that was seen.

    Args:
        histogram: of one tensor.

    Returns:
        (low, high), low <= 0 <= high.
    """
    return min(histogram.low, 0.0), max(histogram.high, 0.0)


def percentile(histogram: Histogram, percent: float = PERCENTILE) -> tuple[float, float]:
    """Cuts equal tails: (100 - percent) / 2 percent of the values on either side.

    Args:
        histogram: of one tensor.
        percent: share of values kept, over 50 to 100.

    Returns:
        (low, high) on bin edges, within min-max.
    """
    if not 50.0 < percent <= 100.0:
        raise InputError(f"percentile {percent} must lie in (50, 100]")
    tail = (1.0 - percent / 100.0) / 2.0 * histogram.total
    below_N = np.cumsum(histogram.counts_N)
    above_N = np.cumsum(histogram.counts_N[::-1])
    first = int(np.argmax(below_N > tail))
    last = NUM_BINS - 1 - int(np.argmax(above_N > tail))
    return _within(histogram, histogram.edges_N[first], histogram.edges_N[last] + histogram.width)


def entropy(histogram: Histogram) -> tuple[float, float]:
    """Clip with the least Kullback-Leibler divergence.

    The divergence is that between the values and their 8-bit form.

    TensorRT's entropy calibrator (S. Migacz, 8-bit Inference with TensorRT, GTC 2017, slides 33-38): |x| in 2048 bins;
    for each clip the outliers are added to the last bin, the clipped histogram is squeezed into 128 levels and
    spread again over the bins that were not empty. The bin of zero takes its neighbour's count, since zero is
    coded exactly and says nothing about the clip (as in NVIDIA pytorch-quantization, calib/histogram.py).

    Args:
        histogram: of one tensor.

    Returns:
        (low, high), within min-max.
    """
    counts_C, width = _magnitudes(histogram)
    counts_C = counts_C.astype(np.float64)
    if counts_C.size > 1:
        counts_C[0] = counts_C[1]
    if counts_C.size <= ENTROPY_LEVELS or counts_C.sum() == 0:
        return minmax(histogram)
    clips = np.arange(ENTROPY_LEVELS, counts_C.size + 1)
    best = int(clips[int(np.argmin([_divergence(counts_C, int(clip)) for clip in clips]))])
    return _within(histogram, -best * width, best * width)


def mse(histogram: Histogram) -> tuple[float, float]:
    """Clip with the least squared quantization error.

    Both sides shrink together first, then each alone; min-max is among the candidates.

    Args:
        histogram: of one tensor.

    Returns:
        (low, high), within min-max.
    """
    low, high = minmax(histogram)
    used = histogram.counts_N > 0
    centres_N = (histogram.edges_N + 0.5 * histogram.width)[used]
    counts_N = histogram.counts_N[used]
    best = low, high
    for shrink_low, shrink_high in ((True, True), (True, False), (False, True)):
        pairs = [
            (best[0] * (s if shrink_low else 1.0), best[1] * (s if shrink_high else 1.0))
            for s in np.linspace(1.0, 0.1, 91)
        ]
        best = min(pairs, key=lambda pair: quantization_error(centres_N, pair, counts_N))
    return best


def quantization_error(values: np.ndarray, bounds: tuple[float, float], weights: np.ndarray | None = None) -> float:
    """Mean squared error of an 8-bit affine quantizer with an exact zero.

    Args:
        values: any shape.
        bounds: (low, high) with low <= 0 <= high.
        weights: how often each value counts; None counts each once.

    Returns:
        Mean squared error; infinite if the range is empty.
    """
    low, high = bounds
    if high <= low:
        return float("inf")
    scale = (high - low) / 255.0
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(values / scale) + zero, 0, 255)
    return float(np.average(((codes - zero) * scale - values) ** 2, weights=weights))


def _magnitudes(histogram: Histogram) -> tuple[np.ndarray, float]:
    """Counts over |x| up to the largest one seen, and the bins' width.

    In at most ENTROPY_BINS bins.
    """
    half = NUM_BINS // 2
    counts = histogram.counts_N[half:] + histogram.counts_N[:half][::-1]
    width = histogram.width
    used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 1
    while used > ENTROPY_BINS:
        counts = counts.reshape(-1, 2).sum(1)
        width *= 2.0
        used = (used + 1) // 2
    return counts[:used], width


def _divergence(counts_C: np.ndarray, clip: int) -> float:
    kept = counts_C[:clip]
    reference = kept.copy()
    reference[-1] += counts_C[clip:].sum()
    starts = np.linspace(0, clip, ENTROPY_LEVELS + 1).astype(np.int64)[:-1]
    occupied = reference > 0
    sums = np.add.reduceat(kept, starts)
    filled = np.add.reduceat(occupied.astype(np.float64), starts)
    share = np.divide(sums, filled, out=np.zeros_like(sums), where=filled > 0)
    coded = np.where(occupied, np.repeat(share, np.diff(np.append(starts, clip))), 0.0)
    # a level that lost all its counts to clipping would make the divergence infinite
    p = np.maximum(reference[occupied], 1e-4)
    q = np.maximum(coded[occupied], 1e-4)
    p, q = p / p.sum(), q / q.sum()
    return float(np.sum(p * np.log(p / q)))


def _within(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    floor, ceiling = minmax(histogram)
    return min(max(float(low), floor), 0.0), max(min(float(high), ceiling), 0.0)


RANGE_METHODS: Final[dict[str, Callable[[Histogram], tuple[float, float]]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}
"""Methods by the name people type."""


def find_range(histogram: Histogram, method: str) -> tuple[float, float]:
    """Applies a named method.

    Args:
        histogram: of one tensor.
        method: minmax, percentile, entropy or mse.

    Returns:
        (low, high), low <= 0 <= high, low < high.

    Raises:
        InputError: no such method.
        CalibrationError: nothing was seen, or zero alone.
    """
    if method not in RANGE_METHODS:
        raise InputError(f"no range method {method!r}: there are {', '.join(RANGE_METHODS)}")
    if histogram.total == 0:
        raise CalibrationError(f"tensor {histogram.name!r} was never observed")
    if histogram.low == histogram.high == 0.0:
        raise CalibrationError(f"tensor {histogram.name!r} is zero on every calibration frame: it cannot be quantized")
    low, high = RANGE_METHODS[method](histogram)
    return (low, high) if low < high else minmax(histogram)


__all__ = [
    "ENTROPY_BINS",
    "ENTROPY_LEVELS",
    "PERCENTILE",
    "RANGE_METHODS",
    "entropy",
    "find_range",
    "minmax",
    "mse",
    "percentile",
    "quantization_error",
]
