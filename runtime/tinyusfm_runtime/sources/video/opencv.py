"""Video by OpenCV, for installations without PyAV.

BGR in full range, which OpenCV converts itself.

OpenCV tells rotation but no mirroring, and takes a cover image for the video where it comes first: an MP4's own boxes
are asked instead (containers.py), and what OpenCV cannot read rightly is refused with the package that can.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import FrameError, SourceError, UnsupportedError
from tinyusfm_runtime.frame import PixelFormat, VideoRange
from tinyusfm_runtime.images.limits import check_image
from tinyusfm_runtime.installation import pip_line
from tinyusfm_runtime.sources._findings import Findings
from tinyusfm_runtime.sources.video.containers import iso_video
from tinyusfm_runtime.sources.video.reading import Extent, VideoImage

ROTATIONS = {0: 1, 90: 6, 180: 3, 270: 8}
"""OpenCV's clockwise rotation in degrees -> orientation as EXIF counts them."""


def read(cv2: Any, path: Path, extent: Extent, findings: Findings) -> Iterator[VideoImage]:
    """Decodes one image at a time, in display order.

    Args:
        cv2: the library.
        path: absolute path.
        extent: filled in.
        findings: called with what was chosen or neglected.

    Raises:
        SourceError: it cannot be opened.
        FrameError: images of more than 8 bits, or too large.
        UnsupportedError: OpenCV would read another stream than the video.
    """
    boxes = iso_video(path)
    if boxes is not None and boxes.cover_first:
        raise UnsupportedError(
            f"the file begins with a cover image, which OpenCV takes for the video: {pip_line('video')}"
        )
    if boxes is not None and boxes.tracks > 1:
        findings.doubt(f"the file holds {boxes.tracks} videos; number 0 (from 0) is read")
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        # named outright: other back ends of OpenCV take digits in a name for a series of images
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    finally:
        cv2.utils.logging.setLogLevel(level)
    try:
        if not capture.isOpened():
            raise SourceError("the video cannot be opened: damaged, cut off, or a codec that OpenCV lacks")
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
        rows, columns = (int(capture.get(key)) for key in (cv2.CAP_PROP_FRAME_HEIGHT, cv2.CAP_PROP_FRAME_WIDTH))
        check_image(rows, columns, 3)
        tag = max(0, int(capture.get(cv2.CAP_PROP_CODEC_PIXEL_FORMAT))).to_bytes(4, "little")
        # FFmpeg's names of raw formats begin or end with the bits of a sample where these are more than 8
        if bits := next((code for code in (tag[0], tag[3]) if 9 <= code <= 16), 0):
            raise FrameError(f"{bits}-bit video: convert it to 8 bits first, with ffmpeg -pix_fmt yuv420p")
        yield from _images(cv2, capture, extent, None if boxes is None else (boxes.orientation,))
    finally:
        capture.release()


def _images(cv2: Any, capture: Any, extent: Extent, stated: tuple[int | None] | None) -> Iterator[VideoImage]:
    rate_hz = float(capture.get(cv2.CAP_PROP_FPS) or 0)
    count = float(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    extent.period_s = 1 / rate_hz if rate_hz > 0 else 0.0
    extent.promised = max(0, round(count)) if np.isfinite(count) else 0
    extent.total_s = extent.promised * extent.period_s
    # OpenCV estimates the count from the duration where the container has none
    extent.exact = stated is not None or (extent.path is not None and extent.path.suffix.lower() == ".avi")
    turned = round(float(capture.get(cv2.CAP_PROP_ORIENTATION_META))) % 360
    orientation = ROTATIONS.get(turned) if stated is None else stated[0]
    wide, high = (float(capture.get(key)) for key in (cv2.CAP_PROP_SAR_NUM, cv2.CAP_PROP_SAR_DEN))
    aspect = wide / high if wide > 0 and high > 0 else 1.0
    first_s = time_s = 0.0
    while True:
        good, pixels = capture.read()
        if not good:
            return
        stated_s = float(capture.get(cv2.CAP_PROP_POS_MSEC)) / 1e3
        # of some containers (MPEG program streams) OpenCV tells no times: one period after another then
        time_s = stated_s if extent.coded == 0 or stated_s > time_s else time_s + extent.period_s
        first_s = time_s if extent.coded == 0 else first_s
        extent.coded += 1
        extent.end_s = max(extent.end_s, time_s - first_s + extent.period_s)
        yield VideoImage(
            pixels=np.asarray(pixels),
            pixel_format=PixelFormat.BGR if pixels.ndim == 3 else PixelFormat.GREY,
            video_range=VideoRange.FULL,
            t_ns=round(time_s * 1e9),
            orientation=orientation,
            aspect=aspect,
        )


__all__ = ["ROTATIONS", "read"]
