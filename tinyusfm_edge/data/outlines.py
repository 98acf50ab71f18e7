"""Outlines among masks: found by what they enclose, and filled.

An outline is a thin line around far more area than its own, closed or with small gaps, or an arc that the border cuts.
Thick rings are rings. It does not know values or files.

Shapes: HW rows, columns.
"""

from __future__ import annotations

import numpy as np

from tinyusfm_runtime.errors import InputError

THIN_SHARE = 0.5
"""A shape that covers less of what it encloses is an outline: a ring with walls under 29 % of its radius."""
FINE_SHARE, FINE_PX = 0.8, 3.0
"""The same for lines of at most so many pixels to either side, where small outlines enclose little."""
GAPS_PX = (0, 2, 4, 8, 16)
"""Gaps that are bridged, in this order."""
MOST_SHAPES = 16
"""The largest shapes are looked at."""
MIN_EXTENT_PX = 12
"""Shapes with a smaller diagonal have no inside worth asking for."""


def is_outline(mask_HW: np.ndarray) -> bool:
    """Whether a mask holds an outline instead of a filled shape.

    Args:
        mask_HW: uint8 0/1.
    """
    return any(_filled(mask_HW, gap) for gap in GAPS_PX) or _has_arc(mask_HW)


def fill_outlines(mask_HW: np.ndarray) -> np.ndarray:
    """Fills the outlines of a mask; filled shapes stay as they are.

    Args:
        mask_HW: uint8 0/1.

    Returns:
        uint8 0/1, the line belonging to the shape.

    Raises:
        InputError: an outline is not closed, by gaps of more than 16 pixels.
    """
    for gap in GAPS_PX:
        if shapes := _filled(mask_HW, gap):
            return np.maximum.reduce([mask_HW, *shapes])
    if not _has_arc(mask_HW):
        return mask_HW
    inside = _fill_to_border(mask_HW)
    if inside is None:
        raise InputError("its outline is not closed: close it, or give --no-fill-outline for a shape that is thin")
    return np.maximum(mask_HW, inside)


def _filled(mask_HW: np.ndarray, gap: int) -> list[np.ndarray]:
    """What the outlines of a mask enclose, line included; uint8 0/1 each.

    Gaps of so many pixels are bridged.
    """
    import cv2

    reach = (gap + 1) // 2
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    pad = reach + 1
    padded = cv2.copyMakeBorder(mask_HW, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0)
    joined = cv2.dilate(padded, kernel) if reach else padded
    found = []
    for shape in _largest(joined):
        inside = _enclosed(shape)
        if not inside.any():
            continue
        line = cv2.min(shape, padded)
        whole = cv2.max(shape, inside)
        whole = cv2.max(cv2.erode(whole, kernel) if reach else whole, line)
        if _is_thin(line, whole):
            found.append(np.ascontiguousarray(whole[pad:-pad, pad:-pad]))
    return found


def _largest(mask_HW: np.ndarray) -> list[np.ndarray]:
    """The shapes with the largest boxes, uint8 0/1."""
    import cv2

    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask_HW, connectivity=8)
    order = sorted(range(1, count), key=lambda i: -int(stats[i, 2]) * int(stats[i, 3]))[:MOST_SHAPES]
    return [(labels == index).astype(np.uint8) for index in order]


def _enclosed(shape_HW: np.ndarray) -> np.ndarray:
    """Background that a shape cuts off from the border, uint8 0/1."""
    import cv2

    padded = cv2.copyMakeBorder(shape_HW, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    cv2.floodFill(padded, None, (0, 0), 2, flags=4)
    return (padded[1:-1, 1:-1] == 0).astype(np.uint8)


def _extent(shape_HW: np.ndarray) -> float:
    rows, cols = np.nonzero(shape_HW)
    return float(np.hypot(np.ptp(rows), np.ptp(cols))) if len(rows) else 0.0


def _half_width(shape_HW: np.ndarray) -> float:
    """Largest distance of a pixel of the shape to the background, pixels."""
    import cv2

    padded = cv2.copyMakeBorder(shape_HW, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    return float(cv2.distanceTransform(padded, cv2.DIST_L2, 3).max())


def _is_thin(line_HW: np.ndarray, whole_HW: np.ndarray) -> bool:
    if _extent(line_HW) < MIN_EXTENT_PX:
        return False
    share = int(line_HW.sum()) / int(whole_HW.sum())
    return share < THIN_SHARE or (share < FINE_SHARE and _half_width(line_HW) <= FINE_PX)


def _has_arc(mask_HW: np.ndarray) -> bool:
    """Whether a thin line bends around an area of at least three times its own."""
    import cv2

    for shape in _largest(mask_HW):
        if _extent(shape) < 2 * MIN_EXTENT_PX or _half_width(shape) > max(FINE_PX, 0.02 * _extent(shape)):
            continue
        points = cv2.findNonZero(shape)
        if float(cv2.contourArea(cv2.convexHull(points))) >= 3.0 * float(shape.sum()):
            return True
    return False


def _fill_to_border(mask_HW: np.ndarray) -> np.ndarray | None:
    """Fills the side of an arc that has less of the border.

    None where the arc parts nothing.
    """
    import cv2

    count, labels = cv2.connectedComponents((mask_HW == 0).astype(np.uint8), connectivity=4)
    border = np.concatenate((labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]))
    touched = np.bincount(border[border > 0], minlength=count)[1:]
    if (touched > 0).sum() != 2 or touched.min() > 0.4 * touched.sum():
        return None
    inside = 1 + int(np.argmin(np.where(touched > 0, touched, touched.max() + 1)))
    return (labels == inside).astype(np.uint8)


__all__ = [
    "FINE_PX",
    "FINE_SHARE",
    "GAPS_PX",
    "MIN_EXTENT_PX",
    "MOST_SHAPES",
    "THIN_SHARE",
    "fill_outlines",
    "is_outline",
]
