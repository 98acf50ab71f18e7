"""What a frame must be before it may reach an engine.

Engines differ in what they let through.

``Frame`` checks itself when it is made. Here the same is asked again of whatever a source handed over, since a plug-in
may hand over anything, and each refusal gets a reason that can be counted. It changes nothing and casts nothing.

Shapes: HW = rows, columns; HWC = rows, columns, channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import FrameError
from tinyusfm_runtime.frame import Frame

NOT_A_FRAME, WRONG_TYPE, NOT_FINITE, WRONG_SHAPE, WRONG_GEOMETRY, MISPLACED = (
    "not_a_frame", "wrong_type", "not_finite", "wrong_shape", "wrong_geometry", "misplaced",
)  # fmt: skip
"""Reasons under which refused frames are counted; ``misplaced`` is a model's crop that lies outside the frame."""


def refusal(candidate: Any) -> str | None:
    """Why something cannot be used as a frame.

    Args:
        candidate: what a source handed over.

    Returns:
        One of the reasons above, or None if it is a sound frame.
    """
    if not isinstance(candidate, Frame):
        return NOT_A_FRAME
    pixels: Any = candidate.pixels
    if not isinstance(pixels, np.ndarray):
        return WRONG_TYPE
    if pixels.dtype.kind in "fc" and not np.isfinite(pixels).all():
        return NOT_FINITE
    if pixels.dtype != np.uint8:
        return WRONG_TYPE
    if not _is_whole(candidate.seq) or not all(
        t is None or _is_whole(t) for t in (candidate.t_source_ns, candidate.t_recv_ns)
    ):
        return WRONG_GEOMETRY
    try:
        replace(candidate, spacing_mm=None)
    except (FrameError, ValueError, TypeError, AttributeError):
        return WRONG_SHAPE
    try:
        replace(candidate)
    except (FrameError, ValueError, TypeError):
        return WRONG_GEOMETRY
    return None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = [
    "MISPLACED",
    "NOT_A_FRAME",
    "NOT_FINITE",
    "WRONG_GEOMETRY",
    "WRONG_SHAPE",
    "WRONG_TYPE",
    "refusal",
]
