"""Source for video files: PyAV where it is installed, OpenCV otherwise.

Both agree on every file.

With PyAV an 8-bit YUV or grey stream gives its brightness plane untouched (pixel format grey, video range as the stream
says), so no colour conversion lies between the file and preprocessing and the bytes do not depend on a scaler's
version; ``colour=True`` gives RGB instead, converted to full range by FFmpeg. OpenCV can only hand over BGR that it
converted itself; its codes differ by a few from PyAV's. ``reader`` and the notes say which one is at work.

What the file says about its image is obeyed and noted: rotation and mirroring (frames are upright), pixels that are not
square (the column spacing follows), covers (not part of the video). A stream without a range tag counts as limited if
it is YUV and as full if it is grey or YUVJ, which is FFmpeg's own rule.

A video is complete when it was decoded to its end: a count that is off is a doubt, a file that is cut off an error
after its whole images. Codecs have no checksum: a damaged byte mostly shows as a smear, not as an error.

It does not know spacing: the caller gives it, of the upright image.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from tinyusfm_runtime.errors import EdgeError, FrameError, IncompleteError, InputError, MissingExtra, SourceError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.images.orientation import TURNS, upright
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.sources._findings import Findings
from tinyusfm_runtime.sources._source import ReportingSource
from tinyusfm_runtime.sources._spacing import SpacingRule
from tinyusfm_runtime.sources.video import opencv, pyav
from tinyusfm_runtime.sources.video.reading import Extent, VideoImage, hold_to_promise

SUFFIXES = frozenset(
    {
        ".mp4", ".m4v", ".mov", ".qt", ".avi", ".divx", ".mkv", ".webm", ".mpg",
        ".mpeg", ".m2v", ".wmv", ".asf", ".flv", ".3gp", ".3g2", ".ts", ".mts",
        ".m2ts", ".vob", ".ogv", ".mjpg", ".mjpeg", ".mxf", ".y4m", ".mj2", ".f4v",
    }
)  # fmt: skip
READERS = ("av", "opencv")


def available() -> Availability:
    """Works with PyAV or with OpenCV; says which."""
    for name, title in (("av", "PyAV"), ("cv2", "OpenCV")):
        try:
            return Availability(usable=True, reason=f"{title} {import_module(name).__version__}", extra="video")
        except Exception:  # a broken install raises more than ImportError; the next reader is tried
            continue
    return Availability(usable=False, reason="neither PyAV nor OpenCV is installed", extra="video")


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
        spacing_mm: (row, column) spacing of the upright images, mm, or None.
        reader: ``av`` or ``opencv``; None takes PyAV if it is installed, else OpenCV.
        colour: True for RGB frames instead of the brightness plane (PyAV).

    Returns:
        The source.

    Raises:
        InputError: no such reader.
        SourceError: there is no such file.
        MissingExtra: the reader is not installed.
    """
    path = Path(location.removeprefix("video:"))
    if reader not in (None, *READERS):
        raise InputError(f"there is no video reader {reader!r}; choose {', '.join(READERS)}")
    if not path.is_file():
        raise SourceError("the video file does not exist")
    # FFmpeg takes a name such as 10:30:00.mp4 for an address; an absolute path begins with no scheme
    path = path.absolute()
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


class VideoSource(ReportingSource):
    """Decodes one image at a time, in display order."""

    def __init__(
        self, path: Path, reader: str, library: Any, spacing_mm: tuple[float, float] | None, colour: bool
    ) -> None:
        self._path, self.reader, self._library = path, reader, library
        self.spacing_mm, self.colour = spacing_mm, colour
        super().__init__()
        if spacing_mm is None:
            self.findings.note("video carries no spacing: measurements are in pixels; --spacing MM gives millimetres")
        if reader == "opencv":
            self.findings.note(
                "read by OpenCV, which converts colour itself; PyAV (extra 'video') hands over the codes as stored"
            )

    def __iter__(self) -> Iterator[Frame]:
        extent = Extent(path=self._path)
        if self.reader == "av":
            images = pyav.read(self._library, str(self._path), extent, self.findings, colour=self.colour)
        else:
            images = opencv.read(self._library, self._path, extent, self.findings)
        yield from frames_of(images, extent, self.findings, SpacingRule(self.spacing_mm, self.findings))


def frames_of(images: Iterator[VideoImage], extent: Extent, findings: Findings, rule: SpacingRule) -> Iterator[Frame]:
    """Upright frames of a reader's images.

    At the end comes the judgement whether they are all.

    Args:
        images: of a reader.
        extent: which the reader fills in.
        findings: called with what was obeyed.
        rule: which spacing the upright images carry.

    Raises:
        IncompleteError: the video breaks off after good images.
        SourceError: it holds none.
    """
    seq = 0
    while True:
        try:
            with _mapped(f"the video breaks off at frame {seq} (from 0)" if seq else "the video cannot be read"):
                image = next(images, None)
                frame = None if image is None else _frame(image, seq, findings, rule)
        except SourceError as error:
            raise (IncompleteError if seq else SourceError)(str(error)) from error
        if frame is None:
            break
        yield frame
        seq += 1
    if seq == 0:
        raise SourceError("the video holds no image")
    hold_to_promise(extent, findings)


def _frame(image: VideoImage, seq: int, findings: Findings, rule: SpacingRule) -> Frame:
    if image.orientation is None:
        raise FrameError(
            "the file asks to be turned by an angle that is no multiple of 90 degrees: re-encode it upright"
        )
    if image.orientation != 1:
        findings.note(f"the orientation in the file is obeyed: {TURNS[image.orientation]}")
    aspect = 1 / image.aspect if image.orientation >= 5 else image.aspect
    pixels = upright(image.pixels, image.orientation)
    return Frame(
        pixels=pixels,
        pixel_format=image.pixel_format,
        video_range=image.video_range,
        spacing_mm=rule.of(pixels.shape, aspect=None if abs(aspect - 1) < 0.01 else aspect),
        seq=seq,
        t_source_ns=image.t_ns,
        t_recv_ns=time.monotonic_ns(),
    )


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


__all__ = ["READERS", "SUFFIXES", "VideoSource", "accepts", "available", "frames_of", "open_source"]
