"""Orientation: the eight ways in which an image can be stored.

And how each becomes upright (EXIF 2.32, 4.6.4).
"""

from __future__ import annotations

import numpy as np

TURNS = {
    1: "as stored", 2: "mirrored", 3: "turned by 180 degrees", 4: "mirrored top to bottom", 5: "transposed",
    6: "turned by 90 degrees clockwise", 7: "transposed across", 8: "turned by 90 degrees counter-clockwise",
}  # fmt: skip
"""What each orientation does to make the stored image upright."""


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns a stored image.

    Args:
        pixels: HW or HWC.
        orientation: 1..8.

    Returns:
        The upright image, C-contiguous; the array itself where nothing is to be done.
    """
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


__all__ = ["TURNS", "upright"]
