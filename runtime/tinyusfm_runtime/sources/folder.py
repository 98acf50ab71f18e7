"""Source for a folder of pictures (PNG, JPEG, BMP, TIFF) or one picture, in natural order.

``img2`` comes before ``img10``. A picture that cannot be read whole stops the source with its
index; nothing is skipped silently. Codes are handed over as the file holds them: grey stays
grey, colour stays BGR(A) as OpenCV decodes it, 16-bit pictures are refused because only their
owner knows the window. PNG chunks are checked against their CRC; JPEG has no checksum, so a
flipped byte inside its data shows as noise and not as an error.

It does not know spacing: pictures carry none that can be trusted, so the caller gives it.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import FrameError, MissingExtra, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.plugins import Probe

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
MAX_FILE_BYTES = 256 << 20
"""A picture file above this is refused unread."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def probe() -> Probe:
    """Works where OpenCV is installed."""
    try:
        import cv2
    except ImportError:
        return Probe(works=False, reason="OpenCV is not installed", extra="opencv")
    except Exception as error:  # a broken installation may raise anything
        return Probe(works=False, reason=f"OpenCV is broken: {type(error).__name__}", extra="opencv")
    return Probe(works=True, reason=f"OpenCV {cv2.__version__}", extra="opencv")


def accepts(location: str) -> bool:
    """True for a folder or a picture's suffix."""
    if location.startswith("folder:"):
        return True
    path = Path(location)
    try:
        return path.suffix.lower() in SUFFIXES or path.is_dir()
    except (OSError, ValueError):  # no path at all
        return False


def open_source(
    location: str, *, spacing_mm: tuple[float, float] | None = None, video_range: str = "full"
) -> FolderSource:
    """Lists the pictures; none is decoded yet.

    Args:
        location: folder or one picture, with or without ``folder:`` in front.
        spacing_mm: (row, column) spacing of every picture, mm, or None.
        video_range: what the codes mean, ``full`` or ``limited``.

    Returns:
        The source.

    Raises:
        SourceError: nothing there, no picture inside, or not readable.
        MissingExtra: OpenCV is not installed.
    """
    path = Path(location.removeprefix("folder:"))
    try:
        if path.is_dir():
            found = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
        elif path.is_file():
            found = [path]
        else:
            raise SourceError("the folder or picture does not exist")
    except OSError as error:
        raise SourceError(f"the folder cannot be read: {error.strerror}") from error
    if not found:
        raise SourceError(f"the folder holds no picture (looked for {', '.join(sorted(SUFFIXES))})")
    try:
        import cv2
    except ImportError as error:
        raise MissingExtra("reading pictures", "opencv-python-headless", "opencv") from error
    return FolderSource(cv2, sorted(found, key=natural_key), spacing_mm, VideoRange(video_range))


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key under which ``img2`` comes before ``img10``; equal numbers fall back to the text."""
    parts = re.findall(r"\d+|\D+", path.name.casefold())
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts] + [(2, 0, path.name)]


class FolderSource:
    """Decodes one picture at a time."""

    def __init__(
        self, cv2: Any, paths: list[Path], spacing_mm: tuple[float, float] | None, video_range: VideoRange
    ) -> None:
        self._cv2, self.paths = cv2, paths
        self.spacing_mm, self.video_range = spacing_mm, video_range
        self.notes: tuple[str, ...] = () if spacing_mm else ("pictures carry no spacing: measurements are in pixels",)

    def __enter__(self) -> FolderSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Frame]:
        for seq, path in enumerate(self.paths):
            try:
                pixels, pixel_format = self._decode(path)
                yield Frame(
                    pixels=pixels,
                    pixel_format=pixel_format,
                    video_range=self.video_range,
                    spacing_mm=self.spacing_mm,
                    seq=seq,
                    t_recv_ns=time.monotonic_ns(),
                )
            except FrameError as error:
                raise SourceError(f"picture {seq} of {len(self.paths)} (natural order, from 0): {error}") from error

    def _decode(self, path: Path) -> tuple[np.ndarray, PixelFormat]:
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise FrameError(f"the file is larger than {MAX_FILE_BYTES >> 20} MiB")
            data = path.read_bytes()
        except OSError as error:
            raise FrameError(f"cannot be read: {error.strerror}") from error
        check_whole(data)
        cv2 = self._cv2
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            good, pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        except cv2.error as error:
            raise FrameError("not a picture that can be decoded") from error
        finally:
            cv2.utils.logging.setLogLevel(level)
        if not good or not pages:
            raise FrameError("not a picture that can be decoded, or it breaks off")
        if len(pages) > 1:
            raise FrameError(f"holds {len(pages)} pages: write them as single pictures")
        return _as_frame_pixels(np.asarray(pages[0]))


def check_whole(data: bytes) -> None:
    """Finds what decoders let pass: a JPEG without its end, a PNG whose chunks do not match their CRC.

    Raises:
        FrameError: the data breaks off or is damaged.
    """
    if data[:2] == b"\xff\xd8":
        if b"\xff\xd9" not in data[-4096:] and b"\xff\xd9" not in data:
            raise FrameError("the JPEG breaks off")
    elif data[:8] == PNG_SIGNATURE:
        _check_png(data)


def _check_png(data: bytes) -> None:
    at, kind = 8, b""
    while kind != b"IEND":
        length = int.from_bytes(data[at : at + 4], "big")
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if end + 4 > len(data) or len(kind) < 4:
            raise FrameError("the PNG breaks off")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise FrameError("the PNG is damaged (CRC)")
        at = end + 4


def _as_frame_pixels(pixels: np.ndarray) -> tuple[np.ndarray, PixelFormat]:
    if pixels.dtype != np.uint8:
        raise FrameError(f"{pixels.dtype.itemsize * 8}-bit picture: window it to 8 bits first")
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim == 2:
        return pixels, PixelFormat.GREY
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        return np.ascontiguousarray(pixels[..., [2, 1, 0, 3]]), PixelFormat.RGBA
    return pixels, PixelFormat.BGR


__all__ = [
    "MAX_FILE_BYTES",
    "PNG_SIGNATURE",
    "SUFFIXES",
    "FolderSource",
    "accepts",
    "check_whole",
    "natural_key",
    "open_source",
    "probe",
]
