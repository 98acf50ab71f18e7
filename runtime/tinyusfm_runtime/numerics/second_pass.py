"""Second pass: where to look again, and one field of logits out of two.

The crop is centred on the box of the first mask and has the shape of the region the first pass saw: both sides are
the same share of it, 1.45 times the larger of the box's two shares, rounded up to 32nds, so that few sizes occur.
Each pass sees the region stretched alike; a crop of the box's own shape was worse than no second pass (HC18
validation: mean error 3.69 instead of 3.04 mm). The second logits are read between their pixels at the centres of the
first ones and averaged with them inside the crop; outside, the first ones stay. So mask and placement are those of
the first pass.

Arithmetic as in exact.py; runtime/capi/second_pass.c is the same to the byte.

Shapes: KHW = channels, rows, columns.
"""

from __future__ import annotations

import numpy as np

from tinyusfm_runtime.numerics import native
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.numerics.shape import box_of

SMALL_PARTS = 5
"""``small``: the mask covers less than one part of so many."""
PARTS = 32
MARGIN = (29, 20)
"""Side of the crop over side of the mask's box, as a quotient: 1.45."""
LEAST_SIDE = 8
"""Pixels of a frame that preprocessing takes at least."""


def is_small(mask_HW: np.ndarray, placement: Placement) -> bool:
    """Whether a mask is small: less than a fifth of the frame's part.

    The part of the input that the frame fills.

    Args:
        mask_HW: at the input's size; 0 outside.
        placement: where the frame lies in the input.
    """
    _, _, height, width = placement.box
    return SMALL_PARTS * int(np.count_nonzero(mask_HW)) < height * width


def crop_around(mask_HW: np.ndarray, placement: Placement) -> tuple[int, int, int, int] | None:
    """Where to look again.

    Args:
        mask_HW: at the input's size; 0 outside.
        placement: where the frame lies in the input.

    Returns:
        (row, column, height, width) in pixels of the frame, inside the region of the first pass; None where the mask is
        empty or the crop would be that region.
    """
    first_row, first_col, rows, cols = box_of(mask_HW)
    if not rows:
        return None
    top, left, box_h, box_w = placement.box
    row, col, height, width = placement.crop
    over, under = MARGIN
    parts = max(-(-PARTS * over * rows // (under * box_h)), -(-PARTS * over * cols // (under * box_w)))
    if parts >= PARTS:
        return None
    tall, wide = (max(LEAST_SIDE, (2 * side * parts + PARTS) // (2 * PARTS)) for side in (height, width))
    # twice the centre of the box in pixels of the region, rounded down
    middle_row = (2 * (first_row - top) + rows) * height // box_h
    middle_col = (2 * (first_col - left) + cols) * width // box_w
    begin_row = min(max((middle_row - tall) // 2, 0), height - tall)
    begin_col = min(max((middle_col - wide) // 2, 0), width - wide)
    return row + begin_row, col + begin_col, tall, wide


def blend(first_KHW: np.ndarray, second_KHW: np.ndarray, first: Placement, second: Placement) -> np.ndarray:
    """Averages the logits of two passes inside the second one's crop.

    Args:
        first_KHW: float32 logits of the first pass.
        second_KHW: float32 logits of the second one, same shape.
        first: where the frame lies in the first input.
        second: where it lies in the second one.

    Returns:
        float32 KHW, a new array.
    """
    rows, at_row = _positions(first, second, 0)
    cols, at_col = _positions(first, second, 1)
    out = first_KHW.copy()
    if not rows.size or not cols.size:
        return out
    if native.available():
        native.blend(second_KHW, rows, at_row, cols, at_col, out)
        return out
    shape = first_KHW.shape
    above, down = _between(at_row, shape[1])
    before, right = _between(at_col, shape[2])
    wide = second_KHW.astype(np.float64)
    upper = _mixed(wide[:, above][:, :, before], wide[:, above][:, :, before + 1], right[None, None, :])
    lower = _mixed(wide[:, above + 1][:, :, before], wide[:, above + 1][:, :, before + 1], right[None, None, :])
    found = _mixed(upper, lower, down[None, :, None])
    here = np.ix_(np.arange(shape[0]), rows, cols)
    out[here] = (0.5 * (first_KHW[here].astype(np.float64) + found)).astype(np.float32)
    return out


def _positions(first: Placement, second: Placement, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows or columns of the first input in the second crop, and their places.

    Axis 0: rows. Their centres lie in the second crop.
    """
    begin, size = first.box[axis], first.box[axis + 2]
    region, extent = first.crop[axis], first.crop[axis + 2]
    other, other_extent = second.crop[axis], second.crop[axis + 2]
    other_begin, other_size = second.box[axis], second.box[axis + 2]
    index = np.arange(begin, begin + size, dtype=np.int32)
    # pixel of the frame under each centre, counted from the crop's edge
    place = (index - begin + 0.5) * float(extent) / float(size) + float(region - other)
    keep = (place >= 0.0) & (place <= float(other_extent))
    return index[keep], place[keep] * float(other_size) / float(other_extent) + (float(other_begin) - 0.5)


def _between(place: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixel before each place and the share of the one behind it.

    Beyond the outermost centres these count.
    """
    held = np.minimum(np.maximum(place, 0.0), float(size - 1))
    before = np.minimum(held.astype(np.int64), size - 2)
    return before, held - before


def _mixed(low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
    return np.asarray(low + share * (high - low))


__all__ = ["LEAST_SIDE", "MARGIN", "PARTS", "SMALL_PARTS", "blend", "crop_around", "is_small"]
