"""Source for video files (MP4, MOV, AVI, MKV, WebM): PyAV where it is installed, OpenCV otherwise.

With PyAV an 8-bit YUV or grey stream gives its brightness plane untouched (pixel format grey, video
range as the stream says), so no colour conversion lies between the file and preprocessing and the
bytes do not depend on a scaler's version; ``colour=True`` gives RGB instead, converted to full range
by FFmpeg. OpenCV can only hand over BGR that it converted itself; its codes differ by a few from
PyAV's. ``reader`` and the notes say which one is at work.

A stream without a range tag counts as limited if it is YUV and as full if it is grey or YUVJ, which
is FFmpeg's own rule. Codecs have no checksum: a damaged byte mostly shows as a smear, not as an
error. What can be counted is: fewer coded pictures than the container promises is an error.

It does not know spacing: the caller gives it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import EdgeError, FrameError, InputError, MissingExtra, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.plugins import Probe

SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"})
FULL_RANGE_TAG = 2
"""AVCOL_RANGE_JPEG of FFmpeg's libavutil/pixfmt.h; 1 is limited, 0 untagged."""
PLANE_FORMATS = ("gray", "yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "nv12", "nv21")
"""Pixel formats whose first plane is 8-bit brightness."""
COLOUR_FORMATS = ("rgb24", "bgr24", "gbrp", "rgba", "bgra", "rgb0", "bgr0", "pal8")
"""Pixel formats that hold RGB: there is no brightness plane to hand over."""
READERS = ("av", "opencv")


def probe() -> Probe:
    """Works with PyAV or with OpenCV; says which."""
    for name, title in (("av", "PyAV"), ("cv2", "OpenCV")):
        try:
            return Probe(works=True, reason=f"{title} {import_module(name).__version__}", extra="video")
        except Exception:  # a broken install raises more than ImportError; the next reader is tried
            continue
    return Probe(works=False, reason="neither PyAV nor OpenCV is installed", extra="video")


def accepts(location: str) -> bool:
    """True for a video file's suffix."""
    return location.startswith("video:") or Path(location).suffix.lower() in SUFFIXES


def open_source(
    location: str,
    *,
    spacing_mm: tuple[float, float] | None = None,
    reader: str | None = None,
    colour: bool = False,
) -> VideoSource:
    """Opens a video file.

    Args:
        location: the file, with or without ``video:`` in front.
        spacing_mm: (row, column) spacing of the pictures, mm, or None.
        reader: ``av`` or ``opencv``; None takes PyAV if it is installed, else OpenCV.
        colour: True for RGB frames instead of the brightness plane (PyAV).

    Returns:
        The source; ``reader`` on it says which library reads.

    Raises:
        SourceError: the file does not exist.
        InputError: unknown reader.
        MissingExtra: neither library, or not the one asked for, is installed.
    """
    path = Path(location.removeprefix("video:"))
    if not path.is_file():
        raise SourceError("the video file does not exist")
    if reader not in (None, *READERS):
        raise InputError(f"video reader {reader!r}: choose one of {', '.join(READERS)}")
    if reader in (None, "av"):
        try:
            import av

            return VideoSource(path, "av", av, spacing_mm, colour)
        except ImportError as error:
            if reader == "av":
                raise MissingExtra("reading video with PyAV", "av", "video") from error
    try:
        import cv2
    except ImportError as error:
        raise MissingExtra("reading video", "av", "video") from error
    return VideoSource(path, "opencv", cv2, spacing_mm, colour)


class VideoSource:
    """Decodes one picture at a time, in display order."""

    def __init__(
        self, path: Path, reader: str, library: Any, spacing_mm: tuple[float, float] | None, colour: bool
    ) -> None:
        self._path, self.reader, self._library = path, reader, library
        self.spacing_mm, self.colour = spacing_mm, colour
        notes = [] if spacing_mm else ["video carries no spacing: measurements are in pixels"]
        if reader == "opencv":
            notes.append(
                "read by OpenCV, which converts colour itself; PyAV (extra 'video') hands over the codes as stored"
            )
        self.notes: tuple[str, ...] = tuple(notes)

    def __enter__(self) -> VideoSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __iter__(self) -> Iterator[Frame]:
        pictures = self._from_av() if self.reader == "av" else self._from_opencv()
        seq = 0
        while True:
            with _mapped(f"the video breaks off at frame {seq} (from 0)" if seq else "the video cannot be read"):
                picture = next(pictures, None)
                if picture is None:
                    break
                pixels, pixel_format, video_range, t_source_ns = picture
                frame = Frame(
                    pixels=pixels,
                    pixel_format=pixel_format,
                    video_range=video_range,
                    spacing_mm=self.spacing_mm,
                    seq=seq,
                    t_source_ns=t_source_ns,
                    t_recv_ns=time.monotonic_ns(),
                )
            yield frame
            seq += 1
        if seq == 0:
            raise SourceError("the video holds no picture")

    def _from_av(self) -> Iterator[tuple[np.ndarray, PixelFormat, VideoRange, int | None]]:
        with self._library.open(str(self._path)) as container:
            if not container.streams.video:
                raise SourceError("the file holds no video stream")
            stream = container.streams.video[0]
            promised, packets, end_s = stream.frames, 0, 0.0
            for packet in container.demux(stream):
                packets += packet.size > 0
                for picture in packet.decode():
                    time_ns = None if picture.pts is None else int(picture.pts * picture.time_base * 1_000_000_000)
                    end_s = max(end_s, (time_ns or 0) / 1e9)
                    yield (*_pixels_of(picture, self.colour), time_ns)
            if packets < promised:
                raise SourceError(f"the video promises {promised} coded pictures and holds {packets}")
            # Matroska counts nothing but tells how long it is; other streams may outlast the pictures
            total_s = (container.duration or 0) / 1e6
            if not promised and len(container.streams) == 1 and end_s < 0.9 * total_s - 0.5:
                raise SourceError(f"the video promises {total_s:.1f} s and breaks off after {end_s:.1f} s")

    def _from_opencv(self) -> Iterator[tuple[np.ndarray, PixelFormat, VideoRange, int | None]]:
        cv2 = self._library
        capture = cv2.VideoCapture(str(self._path))
        try:
            if not capture.isOpened():
                raise SourceError("the video cannot be opened: damaged, cut off, or a codec that OpenCV lacks")
            promised, count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0
            while True:
                good, pixels = capture.read()
                if not good:
                    break
                count += 1
                time_ns = int(capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6)
                yield np.asarray(pixels), PixelFormat.BGR, VideoRange.FULL, time_ns
            # OpenCV estimates the count from the duration where the container has none: allow for rounding
            if count < promised - max(2, promised // 50):
                raise SourceError(f"the video promises {promised} pictures and gave {count}")
        finally:
            capture.release()


def _pixels_of(picture: Any, colour: bool) -> tuple[np.ndarray, PixelFormat, VideoRange]:
    """A PyAV picture as pixels, their format and their range."""
    name = picture.format.name
    if name not in PLANE_FORMATS and name not in COLOUR_FORMATS:
        depth = max(component.bits for component in picture.format.components)
        if depth > 8:
            raise FrameError(f"{depth}-bit video ({name}): convert it to 8 bits first")
        colour = True
    if colour or name in COLOUR_FORMATS:
        return picture.to_ndarray(format="rgb24"), PixelFormat.RGB, VideoRange.FULL
    plane = picture.planes[0]
    pixels_HW = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
    untagged_full = name == "gray" or name.startswith("yuvj")
    tag = int(picture.color_range)
    full = tag == FULL_RANGE_TAG or (tag == 0 and untagged_full)
    return pixels_HW.copy(), PixelFormat.GREY, VideoRange.FULL if full else VideoRange.LIMITED


@contextmanager
def _mapped(what: str) -> Iterator[None]:
    """The one place where the video libraries' errors become ours."""
    try:
        yield
    except FrameError as error:
        raise SourceError(f"{what}: {error}") from error
    except EdgeError:
        raise
    except Exception as error:
        raise SourceError(f"{what}: damaged, cut off, or not a video ({type(error).__name__})") from error


__all__ = [
    "COLOUR_FORMATS",
    "FULL_RANGE_TAG",
    "PLANE_FORMATS",
    "READERS",
    "SUFFIXES",
    "VideoSource",
    "accepts",
    "open_source",
    "probe",
]
