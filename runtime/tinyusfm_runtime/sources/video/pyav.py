"""Video by PyAV: the brightness plane as stored.

With the range, orientation and pixel shape that the stream tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import FrameError, SourceError
from tinyusfm_runtime.frame import PixelFormat, VideoRange
from tinyusfm_runtime.images.limits import MAX_PIXELS, check_image
from tinyusfm_runtime.sources._findings import Findings
from tinyusfm_runtime.sources.video.containers import orientation_of
from tinyusfm_runtime.sources.video.reading import Extent, VideoImage

FULL_RANGE_TAG = 2
"""AVCOL_RANGE_JPEG of FFmpeg's libavutil/pixfmt.h; 1 is limited, 0 untagged."""
PLANE_FORMATS = ("gray", "yuv420p", "yuv422p", "yuv444p", "yuv411p", "yuv410p", "yuv440p", "yuvj420p", "yuvj422p",
                 "yuvj444p", "yuvj440p", "nv12", "nv21")  # fmt: skip
"""Pixel formats whose first plane is 8-bit brightness."""
COLOUR_FORMATS = ("rgb24", "bgr24", "gbrp", "rgba", "bgra", "argb", "abgr", "rgb0", "bgr0", "0rgb", "0bgr", "pal8")
"""Pixel formats that hold RGB: there is no brightness plane to hand over."""
OPTIONS = {"protocol_whitelist": "file"}
"""A file that names others, or an address, is not followed."""
ATTACHED = 0x0400
"""AV_DISPOSITION_ATTACHED_PIC of FFmpeg's libavformat/avformat.h: a cover, not the video."""


def read(av: Any, place: Any, extent: Extent, findings: Findings, *, colour: bool) -> Iterator[VideoImage]:
    """Decodes one image at a time, in display order.

    Args:
        av: the library.
        place: absolute path as text, or an open binary file.
        extent: filled in.
        findings: called with what was chosen or neglected.
        colour: True for RGB images instead of the brightness plane.

    Raises:
        SourceError: there is no video stream.
        FrameError: an image of more than 8 bits, or too large.
    """
    with av.open(place, options=OPTIONS) as container:
        stream = choose_stream(container, findings)
        check_image(stream.codec_context.height, stream.codec_context.width, 3)
        # an image inside the stream may say another size: the decoder itself refuses it then
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        extent.promised, extent.total_s = int(stream.frames or 0), float(container.duration or 0) / 1e6
        rate = stream.average_rate or stream.base_rate
        extent.period_s = float(1 / rate) if rate else 0.0
        aspect = float(stream.sample_aspect_ratio or 1)
        start_s = float(container.start_time or 0) / 1e6
        for packet in container.demux():
            _measure(packet, stream, extent, start_s)
            if packet.stream is not stream:
                continue
            for image in packet.decode():
                extent.damaged += bool(image.is_corrupt)
                if getattr(image, "interlaced_frame", False):
                    findings.note("the video is interlaced; its fields are not separated")
                yield _image(image, aspect, colour)


def choose_stream(container: Any, findings: Findings) -> Any:
    """The video stream to read: never a cover.

    Args:
        container: PyAV's.
        findings: takes notes of covers and of other videos that are not read.

    Raises:
        SourceError: there is none.
    """
    real = [stream for stream in container.streams.video if not _disposition(stream) & ATTACHED]
    if not real:
        raise SourceError("the file holds no video stream")
    if len(real) < len(container.streams.video):
        findings.note("the file carries a cover image, which is not part of the video")
    best = container.streams.best("video")
    chosen = best if best in real else real[0]
    if len(real) > 1:
        findings.doubt(f"the file holds {len(real)} videos; number {real.index(chosen)} (from 0) is read")
    return chosen


def _disposition(stream: Any) -> int:
    return int(getattr(stream.disposition, "value", stream.disposition))


def _measure(packet: Any, stream: Any, extent: Extent, start_s: float) -> None:
    """Counts a packet, and keeps the latest end of any stream."""
    if not packet.size:
        return
    if packet.stream is stream:
        extent.coded += 1
        extent.damaged += bool(packet.is_corrupt)
    if packet.pts is not None and packet.time_base is not None and not _disposition(packet.stream) & ATTACHED:
        end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base) - start_s
        if packet.stream is stream and not packet.duration:
            end_s += extent.period_s
        extent.end_s = max(extent.end_s, end_s)


def _image(image: Any, aspect: float, colour: bool) -> VideoImage:
    pixels, pixel_format, video_range = pixels_of(image, colour)
    return VideoImage(
        pixels=pixels,
        pixel_format=pixel_format,
        video_range=video_range,
        t_ns=None if image.pts is None else int(image.pts * image.time_base * 1_000_000_000),
        orientation=_orientation(image),
        aspect=aspect,
    )


def _orientation(image: Any) -> int | None:
    for side in image.side_data:
        if side.type.name == "DISPLAYMATRIX":
            matrix = np.frombuffer(bytes(side), np.int32)
            return orientation_of(*(float(matrix[at]) for at in (0, 1, 3, 4)))
    return 1


def pixels_of(image: Any, colour: bool) -> tuple[np.ndarray, PixelFormat, VideoRange]:
    """A PyAV image as pixels, their format and their range.

    Args:
        image: PyAV's VideoFrame.
        colour: True for RGB.

    Raises:
        FrameError: more than 8 bits.
    """
    name = image.format.name
    if name not in PLANE_FORMATS and name not in COLOUR_FORMATS:
        depth = max(component.bits for component in image.format.components)
        if depth > 8:
            raise FrameError(f"{depth}-bit video ({name}): convert it to 8 bits first, with ffmpeg -pix_fmt yuv420p")
        colour = True
    if colour or name in COLOUR_FORMATS:
        return image.to_ndarray(format="rgb24"), PixelFormat.RGB, VideoRange.FULL
    plane = image.planes[0]
    pixels_HW = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
    untagged_full = name == "gray" or name.startswith("yuvj")
    tag = int(image.color_range)
    full = tag == FULL_RANGE_TAG or (tag == 0 and untagged_full)
    return pixels_HW.copy(), PixelFormat.GREY, VideoRange.FULL if full else VideoRange.LIMITED


__all__ = [
    "ATTACHED",
    "COLOUR_FORMATS",
    "FULL_RANGE_TAG",
    "OPTIONS",
    "PLANE_FORMATS",
    "choose_stream",
    "pixels_of",
    "read",
]
