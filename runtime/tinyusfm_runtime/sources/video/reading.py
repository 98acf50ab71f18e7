"""What both video readers hand over.

And how a video's promises are held against what was decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyusfm_runtime.errors import IncompleteError
from tinyusfm_runtime.frame import PixelFormat, VideoRange
from tinyusfm_runtime.sources._findings import Findings
from tinyusfm_runtime.sources.video.containers import promised_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoImage:
    """One decoded image, as stored.

    Attributes:
        pixels: uint8 HW or HWC.
        pixel_format: meaning of the channels.
        video_range: meaning of the codes.
        t_ns: presentation time, ns, or None.
        orientation: 1..8, what makes it upright; None where the file asks for another angle.
        aspect: width of a stored pixel over its height.
    """

    pixels: np.ndarray
    pixel_format: PixelFormat
    video_range: VideoRange
    t_ns: int | None
    orientation: int | None = 1
    aspect: float = 1.0


@dataclass(kw_only=True, slots=True)
class Extent:
    """How much of a video there was; a reader fills it in.

    Attributes:
        path: the file, or None where it is a part of another file.
        promised: coded images that the container promises, 0 if it does not say.
        exact: the promise is a count and not an estimate from the duration.
        total_s: duration that the container promises, s, 0 if it does not say.
        coded: coded images that were there.
        end_s: end of the last image of any stream, s.
        period_s: time of one image, s, 0 if unknown.
        damaged: images that the decoder called damaged.
    """

    path: Path | None = None
    promised: int = 0
    exact: bool = True
    total_s: float = 0.0
    coded: int = 0
    end_s: float = 0.0
    period_s: float = 0.0
    damaged: int = 0


def hold_to_promise(extent: Extent, findings: Findings) -> None:
    """Judges whether a video that was decoded to its end is all of it.

    Args:
        extent: what was promised and what there was.
        findings: takes small contradictions: a count that is off, images dropped by the recorder, damage.

    Raises:
        IncompleteError: the file is cut off, or ends long before its time.
    """
    if extent.damaged:
        findings.doubt(f"{extent.damaged} images of the video are damaged")
    want, there = None, 0
    if extent.path is not None:
        want, there = promised_bytes(extent.path), extent.path.stat().st_size
    if want is not None and there < want - 1:
        raise IncompleteError(f"the video is cut off: it promises {want} bytes and holds {there}")
    missing_s = extent.total_s - extent.end_s
    period_s = extent.period_s or 0.04
    if missing_s > max(2.5 * period_s, 0.002 * extent.total_s):
        raise IncompleteError(f"the video promises {extent.total_s:.1f} s and ends after {extent.end_s:.1f} s")
    short = extent.promised - extent.coded
    # an estimate can only be too long for what is there, and by more than its rounding
    if extent.promised and short and (extent.exact or short > max(2, extent.promised // 50)):
        what = "images dropped by the recorder, or miscounted" if short > 0 else "the count is wrong"
        findings.doubt(f"the video promises {extent.promised} images and holds {extent.coded} to its end: {what}")


__all__ = ["Extent", "VideoImage", "hold_to_promise"]
