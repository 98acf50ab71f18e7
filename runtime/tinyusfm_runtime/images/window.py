"""Window: codes of any width to 8 bits.

By the two codes that become black and white.
"""

from __future__ import annotations

import math

import numpy as np

from tinyusfm_runtime.errors import FrameError, InputError

BLOCK_CODES = 1 << 20
"""So many codes are mapped at a time."""
Window = tuple[float, float]
"""(code that becomes 0, code that becomes 255)."""


def check_window(window: Window) -> None:
    """Checks that a window has two ends.

    Raises:
        InputError: not finite, or the upper end does not lie above the lower.
    """
    low, high = window
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        raise InputError(f"window {low:g},{high:g}: give LO,HI with HI above LO, such as 0,4095")


def apply_window(codes: np.ndarray, window: Window) -> np.ndarray:
    """Maps codes linearly to 8 bits, computed in float64.

    ``floor((clip(v, lo, hi) - lo) * 255 / (hi - lo) + 0.5)``

    Args:
        codes: integers or floats of one axis or more.
        window: (lo, hi).

    Returns:
        uint8 of the same shape.

    Raises:
        FrameError: a code is not a number.
        InputError: the window has no two ends.
    """
    check_window(window)
    if codes.dtype.kind == "f" and not np.isfinite(codes).all():
        raise FrameError("holds values that are no numbers (NaN or infinity)")
    low, high = window
    found = np.empty(codes.shape, np.uint8)
    # a few rows at a time: as float64 the largest image would take 256 MiB more than once
    rows = max(1, BLOCK_CODES * len(codes) // max(1, codes.size))
    for at in range(0, len(codes), rows):
        wide = np.clip(codes[at : at + rows].astype(np.float64), low, high)
        wide -= low
        wide *= 255.0 / (high - low)
        wide += 0.5
        found[at : at + rows] = wide.astype(np.uint8)
    return found


def needs_window(what: str) -> FrameError:
    """The refusal of codes that only their owner can map to 8 bits.

    Args:
        what: such as ``16-bit image``.
    """
    return FrameError(f"{what}: give --window LO,HI (the codes that become black and white), or convert it to 8 bits")


__all__ = ["BLOCK_CODES", "Window", "apply_window", "check_window", "needs_window"]
