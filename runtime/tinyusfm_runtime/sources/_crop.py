"""Crop: a window of a frame, cut before anything is stored, shown or measured."""

from __future__ import annotations

from dataclasses import replace

from tinyusfm_runtime.errors import SourceError
from tinyusfm_runtime.frame import Frame

Box = tuple[int, int, int, int]
"""(row, column, height, width) in frame pixels."""


def cropped(frame: Frame, crop: Box) -> Frame:
    """Cuts a window out of a frame.

    Args:
        frame: any frame.
        crop: (row, column, height, width) in frame pixels.

    Returns:
        A frame whose pixels are a view of the window; everything else is carried over.

    Raises:
        SourceError: the window does not lie inside the frame.
    """
    row, col, height, width = crop
    rows, cols = frame.pixels.shape[:2]
    if row < 0 or col < 0 or height < 8 or width < 8 or row + height > rows or col + width > cols:
        raise SourceError(
            f"crop {crop} does not lie inside a frame of {rows}x{cols} rows x columns (8 pixels at least)"
        )
    top, left = (frame.crop or (0, 0))[:2]
    window = frame.pixels[row : row + height, col : col + width]
    return replace(frame, pixels=window, crop=(top + row, left + col, height, width))


__all__ = ["Box", "cropped"]
