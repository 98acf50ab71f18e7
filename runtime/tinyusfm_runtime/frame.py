"""Frame: one picture from a probe, a file or a phantom; FrameSource: whatever gives frames.

A frame says what its bytes mean and never converts them. It does not know the model, and a
source never converts colour on its own: preprocessing reads ``pixel_format`` and ``video_range``.

Shapes: HW = rows, columns; HWC = rows, columns, channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Protocol, runtime_checkable

import numpy as np

from tinyusfm_runtime.errors import FrameError


class PixelFormat(str, Enum):
    """What the channels of a frame are."""

    GREY = "grey"
    """HW, one brightness per pixel."""
    RGB = "rgb"
    """HWC, 3 channels in this order."""
    BGR = "bgr"
    """HWC, 3 channels in this order (OpenCV's)."""
    RGBA = "rgba"
    """HWC, 4 channels; the fourth is ignored."""


class VideoRange(str, Enum):
    """What 8-bit codes mean black and white."""

    FULL = "full"
    """0 is black and 255 is white."""
    LIMITED = "limited"
    """16 is black and 235 is white (ITU-R BT.601/709), as HDMI capture delivers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One picture and what is known about it.

    Attributes:
        pixels: uint8, HW for grey, HWC else; the frame does not own a copy.
        pixel_format: meaning of the channels.
        video_range: meaning of the codes.
        spacing_mm: (row, column) distance of neighbouring pixel centres in mm, or None if unknown.
        seq: running number given by the source.
        t_source_ns: the source's own clock, or None.
        t_recv_ns: ``time.monotonic_ns`` at reception, or None.
        orientation: PLUS letters (MF, UF, MN, UN) or None.
        crop: (row, column, height, width) of these pixels in the picture as it was received, or None for all of it.
    """

    pixels: np.ndarray
    pixel_format: PixelFormat = PixelFormat.GREY
    video_range: VideoRange = VideoRange.FULL
    spacing_mm: tuple[float, float] | None = None
    seq: int = 0
    t_source_ns: int | None = None
    t_recv_ns: int | None = None
    orientation: str | None = None
    crop: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        """Checks that the pixels are what the format says.

        Raises:
            FrameError: dtype, shape or spacing is not usable.
        """
        pixels = self.pixels
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            kind = getattr(pixels, "dtype", type(pixels).__name__)
            raise FrameError(f"frame pixels must be a numpy uint8 array, not {kind}: scale to 0..255 first")
        want = {PixelFormat.GREY: None, PixelFormat.RGB: 3, PixelFormat.BGR: 3, PixelFormat.RGBA: 4}
        channels = want[PixelFormat(self.pixel_format)]
        good = pixels.ndim == 2 if channels is None else pixels.ndim == 3 and pixels.shape[2] == channels
        if not good:
            raise FrameError(f"a {PixelFormat(self.pixel_format).value} frame cannot have shape {pixels.shape}")
        if min(pixels.shape[:2]) < 8 or max(pixels.shape[:2]) > 16384:
            raise FrameError(f"frame of {pixels.shape[1]}x{pixels.shape[0]} pixels: sides must be 8 to 16384")
        if self.spacing_mm is not None and not all(np.isfinite(s) and 1e-4 < s < 100 for s in self.spacing_mm):
            raise FrameError(f"spacing {self.spacing_mm} mm is not plausible: give (row, column) in mm or None")


@runtime_checkable
class FrameSource(Protocol):
    """A context manager that yields frames. Closing stops the iteration and frees the device."""

    def __enter__(self) -> FrameSource: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def __iter__(self) -> Iterator[Frame]: ...


@runtime_checkable
class LiveSource(FrameSource, Protocol):
    """A source whose frames are lost if nobody takes them: a probe, a link, a camera.

    Its iteration blocks until a new frame is there, reconnects by itself and ends only after ``close``, which may be
    called from any thread. A source without these two is a file: its frames wait.
    """

    @property
    def last_contact_ns(self) -> int | None:
        """``time.monotonic_ns`` of the last sign of life (frame, keep-alive, heartbeat), or None before the first."""
        ...

    @property
    def counters(self) -> Mapping[str, int]:
        """What was refused before it became a frame, by reason, and how often the link was made anew."""
        ...

    def close(self) -> None:
        """Ends the iteration soon; closing twice is harmless."""
        ...


__all__ = ["Frame", "FrameSource", "LiveSource", "PixelFormat", "VideoRange"]
