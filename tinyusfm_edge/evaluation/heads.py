"""Heads scored as shapes, at the original image's size.

The reported ellipse or mask against the head's own ellipse.

Filled masks made of a drawn outline are too wide by half its line, so a perfect answer scores below 1 against them;
``ellipses.csv`` holds the shape itself. It does not know models.

Shapes: HW at the original image's size.
"""

from __future__ import annotations

import numpy as np

from tinyusfm_edge.data.ellipses import Ellipse
from tinyusfm_edge.data.table import Sample
from tinyusfm_runtime.numerics.measure import Measurement, dice
from tinyusfm_runtime.numerics.preprocess import Placement


def reported_ellipse(head: Measurement) -> Ellipse:
    """The ellipse of a measurement, in the frame's pixels.

    Args:
        head: a measurement with an ellipse.
    """
    centre = (head.centre_px[1], head.centre_px[0])
    return Ellipse.from_axes(centre, head.axes_px[0] / 2, head.axes_px[1] / 2, head.angle_deg)


def shape_dice(sample: Sample, head: Measurement | None, mask_HW: np.ndarray, placement: Placement) -> float | None:
    """Overlap of what is reported with the head's ellipse.

    Both at the original image's size.

    Args:
        sample: the frame with its ellipse.
        head: the measurement, or None where the model reports a mask alone.
        mask_HW: the mask in the model's input.
        placement: where the frame lies in the input.

    Returns:
        0..1, or None where the table names no ellipse.
    """
    if sample.ellipse is None:
        return None
    rows, cols = sample.original_hw
    frame_rows, frame_cols = placement.frame_size
    scale = (cols / frame_cols, rows / frame_rows)
    truth = sample.ellipse.scaled(*scale).coverage(rows, cols, fine=1)
    if head is not None and head.has_ellipse:
        if not head.found:
            return 0.0
        answer = reported_ellipse(head).scaled(*scale).coverage(rows, cols, fine=1)
    else:
        answer = _enlarged(mask_HW, placement, rows, cols)
    return dice(answer, truth)


def _enlarged(mask_HW: np.ndarray, placement: Placement, rows: int, cols: int) -> np.ndarray:
    """A mask of the model's input at the original image's size, nearest.

    Outside of the crop it is empty.
    """
    row, col, height, width = placement.crop
    top, left, box_h, box_w = placement.box
    frame_rows, frame_cols = placement.frame_size
    y = ((np.arange(rows) + 0.5) * frame_rows / rows - row) * box_h / height
    x = ((np.arange(cols) + 0.5) * frame_cols / cols - col) * box_w / width
    inside = ((y >= 0) & (y < box_h))[:, None] & ((x >= 0) & (x < box_w))
    at_y, at_x = np.clip(y, 0, box_h - 1).astype(int) + top, np.clip(x, 0, box_w - 1).astype(int) + left
    found: np.ndarray = mask_HW[at_y][:, at_x] * inside
    return found


__all__ = ["reported_ellipse", "shape_dice"]
