"""exp, log, atan and sums that give the same bits everywhere.

+ - * / and sqrt on doubles, nothing of a maths library.

IEEE 754 fixes the result of each single operation, not that of exp or of a sum in any order. So the functions are
stated here as polynomials with a fixed number of terms, and sums run in one order. runtime/capi/exact.h is the same,
line by line; it must be compiled without contraction to fused multiply-adds (``-ffp-contract=off``).

Errors against the true value: exp 4e-16 relative over -700..700, log 3e-16 relative, atan 3e-16 rad (tests/runtime).

Shapes: N, NM = any.
"""

from __future__ import annotations

import math

import numpy as np

LOG2_E = 1.4426950408889634
LN2_HIGH = 0.6931471803691238
"""The first 33 bits of ln 2, so that a small whole number times it is exact (fdlibm, e_exp.c)."""
LN2_LOW = 1.9082149292705877e-10
EXP_LIMIT = 700.0
"""Arguments are cut here, well inside the range of doubles."""
EXP_TERMS = tuple(1.0 / math.factorial(n) for n in range(14))
"""Taylor: 1/n! as the quotient of two doubles."""
LOG_TERMS = 12
ATAN_TERMS = 21
DEGREES = 57.29577951308232
"""180 / pi."""
HALF_PI, QUARTER_PI = 1.5707963267948966, 0.7853981633974483
TAN_EIGHTH = 0.4142135623730950
"""tan(pi / 8)."""


def exp(x_N: np.ndarray) -> np.ndarray:
    """e to the x.

    x = k ln 2 + r, |r| <= ln 2 / 2, a Taylor polynomial of degree 13 in r, times 2^k.

    Args:
        x_N: float64; cut to -700..700.

    Returns:
        float64.
    """
    x = np.minimum(np.maximum(np.asarray(x_N, np.float64), -EXP_LIMIT), EXP_LIMIT)
    k = np.floor(x * LOG2_E + 0.5)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    total = np.full_like(r, EXP_TERMS[-1])
    for term in EXP_TERMS[-2::-1]:
        total = total * r + term
    found: np.ndarray = np.ldexp(total, k.astype(np.int32))
    return found


def sigmoid(x_N: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), float64."""
    return np.asarray(1.0 / (1.0 + exp(-np.asarray(x_N, np.float64))))


def softmax(x_KN: np.ndarray) -> np.ndarray:
    """Shares of e^x along the first axis, the largest taken off first.

    float64, summed from the first to the last.
    """
    wide = np.asarray(x_KN, np.float64)
    power = exp(wide - wide.max(axis=0))
    return np.asarray(power / np.cumsum(power, axis=0)[-1])


def log(x: float) -> float:
    """Natural logarithm.

    x = m 2^k, m in sqrt(1/2)..sqrt(2), 2 artanh((m - 1) / (m + 1)) + k ln 2.

    Args:
        x: a positive, finite number that is not subnormal.
    """
    m, k = math.frexp(x)  # m in 0.5..1, exact
    if m < 0.7071067811865476:
        m, k = m + m, k - 1
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    total = 1.0 / (2.0 * LOG_TERMS - 1.0)
    for n in range(LOG_TERMS - 2, -1, -1):
        total = total * square + 1.0 / (2.0 * n + 1.0)
    return k * LN2_HIGH + (2.0 * s * total + k * LN2_LOW)


def logit(probability: float) -> float:
    """log(p / (1 - p)) for p in (0, 1), as a float32 value.

    What a logit must exceed for a probability above p.
    """
    return float(np.float32(log(probability / (1.0 - probability))))


def direction_deg(cosine: float, sine: float) -> float:
    """Angle of a direction in degrees, in (-90, 90]; an axis has no sign.

    Args:
        cosine: not negative.
        sine: any; both are not 0.
    """
    size = -sine if sine < 0.0 else sine
    steep = size > cosine
    angle = _atan(cosine / size if steep else size / cosine)
    if steep:
        angle = HALF_PI - angle
    angle = angle * DEGREES
    return -angle if sine < 0.0 and angle < 90.0 else angle


def _atan(z: float) -> float:
    """Of 0..1: around pi / 4 where z is large, then the series z - z^3/3 + ..."""
    large = z > TAN_EIGHTH
    w = (z - 1.0) / (z + 1.0) if large else z
    square = w * w
    total = 1.0 / (2.0 * ATAN_TERMS - 1.0)
    for n in range(ATAN_TERMS - 2, -1, -1):
        total = 1.0 / (2.0 * n + 1.0) - total * square
    return QUARTER_PI + w * total if large else w * total


def ordered_sum(values_NM: np.ndarray) -> float:
    """Sum along each row from left to right, then of the rows from top to bottom."""
    if not values_NM.size:
        return 0.0
    return float(np.cumsum(np.cumsum(values_NM, axis=1)[:, -1])[-1])


__all__ = [
    "ATAN_TERMS",
    "DEGREES",
    "EXP_LIMIT",
    "EXP_TERMS",
    "HALF_PI",
    "LN2_HIGH",
    "LN2_LOW",
    "LOG2_E",
    "LOG_TERMS",
    "QUARTER_PI",
    "TAN_EIGHTH",
    "direction_deg",
    "exp",
    "log",
    "logit",
    "ordered_sum",
    "sigmoid",
    "softmax",
]
