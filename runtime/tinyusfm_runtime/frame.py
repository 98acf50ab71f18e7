"""Frame: one image from a probe, a file or a phantom.

FrameSource: whatever gives frames.

A frame says what its bytes mean and never converts them. It does not know the model, and a
source never converts colour on its own: preprocessing reads ``pixel_format`` and ``video_range``.

Shapes: HW = rows, columns; HWC = rows, columns, channels.
"""

from __future__ import annotations

import difflib
import functools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

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


_Word = TypeVar("_Word", bound=Enum)
_CHANNELS = {PixelFormat.GREY: None, PixelFormat.RGB: 3, PixelFormat.BGR: 3, PixelFormat.RGBA: 4}


def _refusing(cls: type[Frame]) -> type[Frame]:
    """Makes wrong arguments of a frame FrameErrors that say how to mend them.

    Python's own are TypeErrors.
    """
    known = tuple(field.name for field in fields(cls))
    plain = cls.__init__

    @functools.wraps(plain)
    def __init__(self: Frame, *positional: Any, **named: Any) -> None:
        if positional:
            raise FrameError("Frame takes named arguments only: Frame(pixels=array_HW, spacing_mm=(row_mm, column_mm))")
        if unknown := [name for name in named if name not in known]:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise FrameError(f"Frame has no argument {unknown[0]!r}: {hint}")
        if "pixels" not in named:
            raise FrameError("a frame needs pixels: Frame(pixels=array_HW, spacing_mm=(row_mm, column_mm))")
        plain(self, **named)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_refusing
@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One image and what is known about it.

        Frame(pixels=grey_HW)                                       # uint8, rows x columns
        Frame(pixels=grey_HW, spacing_mm=(0.12, 0.12))              # readings in mm
        Frame(pixels=rgb_HWC, pixel_format="rgb", video_range="limited")

    Attributes:
        pixels: uint8, HW for grey, HWC else; the frame does not own a copy.
        pixel_format: meaning of the channels.
        video_range: meaning of the codes.
        spacing_mm: (row, column) distance of neighbouring pixel centres in mm, or None if unknown.
        seq: running number given by the source.
        t_source_ns: the source's own clock, or None.
        t_recv_ns: ``time.monotonic_ns`` at reception, or None.
        orientation: PLUS letters (MF, UF, MN, UN) or None.
        crop: (row, column, height, width) of these pixels in the image as it was received, or None for all of it.
        phantom: drawn by phantom.py, so that nobody compares it with patients.
        name: of the file it came from, only where the caller asked for names; sinks then tell it.
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
    phantom: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        """Checks the pixels against the format, and every other argument.

        The pixels are what the format says, and everything else is of its kind.

        Raises:
            FrameError: dtype, shape, spacing or another argument is not usable.
        """
        pixel_format = _word(PixelFormat, self.pixel_format, "pixel_format")
        object.__setattr__(self, "pixel_format", pixel_format)
        object.__setattr__(self, "video_range", _word(VideoRange, self.video_range, "video_range"))
        _check_pixels(self.pixels, pixel_format)
        if self.spacing_mm is not None:
            object.__setattr__(self, "spacing_mm", _spacing(self.spacing_mm))
        _whole(self.seq, "seq")
        for name in ("t_source_ns", "t_recv_ns"):
            if (value := getattr(self, name)) is not None:
                _whole(value, name)
        if self.orientation is not None and not isinstance(self.orientation, str):
            raise FrameError(f"orientation is PLUS letters such as 'MF', or None, not {self.orientation!r}")
        if self.crop is not None:
            object.__setattr__(self, "crop", _crop(self.crop))
        if self.name is not None and not isinstance(self.name, str):
            raise FrameError(f"name is text or None, not {type(self.name).__name__}")

    def __repr__(self) -> str:
        """Size and facts, never pixels."""
        height, width = self.pixels.shape[:2]
        spacing = "no spacing" if self.spacing_mm is None else "{:.4g} x {:.4g} mm".format(*self.spacing_mm)
        return f"Frame({width}x{height} {self.pixel_format.value}, {spacing}, seq={self.seq})"


def _word(kind: type[_Word], value: object, name: str) -> _Word:
    if isinstance(value, kind):
        return value
    try:
        return kind(value)
    except ValueError:
        raise FrameError(f"{name} is one of {', '.join(word.value for word in kind)}, not {value!r}") from None


def _check_pixels(pixels: object, pixel_format: PixelFormat) -> None:
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        kind = getattr(pixels, "dtype", type(pixels).__name__)
        how = "scale to 0..255 first" if isinstance(pixels, np.ndarray) else "give np.asarray(pixels, np.uint8)"
        raise FrameError(f"frame pixels must be a numpy uint8 array, not {kind}: {how}")
    channels = _CHANNELS[pixel_format]
    good = pixels.ndim == 2 if channels is None else pixels.ndim == 3 and pixels.shape[2] == channels
    if not good:
        colour = pixels.ndim == 3 and pixels.shape[2] in (3, 4)
        hint = ": say pixel_format='rgb', 'bgr' or 'rgba'" if channels is None and colour else ""
        if channels is None and pixels.ndim == 3 and pixels.shape[2] == 1:
            hint = ": give pixels[:, :, 0]"
        raise FrameError(f"a {pixel_format.value} frame cannot have shape {pixels.shape}{hint}")
    if min(pixels.shape[:2]) < 8 or max(pixels.shape[:2]) > 16384:
        raise FrameError(f"frame of {pixels.shape[1]}x{pixels.shape[0]} pixels: sides must be 8 to 16384")


def _spacing(value: Any) -> tuple[float, float]:
    try:
        row_mm, column_mm = (float(part) for part in (() if isinstance(value, str) else value))
    except (TypeError, ValueError):
        raise FrameError(f"spacing {value!r} is not usable: give (row, column) in mm or None") from None
    if not all(np.isfinite(side) and 1e-4 < side < 100 for side in (row_mm, column_mm)):
        raise FrameError(f"spacing {value} mm is not plausible: give (row, column) in mm or None")
    return row_mm, column_mm


def _whole(value: Any, name: str) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise FrameError(f"{name} is a whole number, not {value!r}") from None


def _crop(value: Any) -> tuple[int, int, int, int]:
    try:
        row, column, height, width = (operator.index(part) for part in value)
    except (TypeError, ValueError):
        raise FrameError(f"crop is (row, column, height, width) in pixels or None, not {value!r}") from None
    if min(row, column) < 0 or min(height, width) < 1:
        raise FrameError(f"crop {value} lies outside the image: rows and columns from 0, sides from 1")
    return row, column, height, width


@runtime_checkable
class FrameSource(Protocol):
    """A context manager that yields frames.

    Closing stops the iteration and frees the device.
    """

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
        """``time.monotonic_ns`` of the last sign of life, or None before the first.

        A sign of life is a frame, a keep-alive or a heartbeat.
        """
        ...

    @property
    def counters(self) -> Mapping[str, int]:
        """What was refused before it became a frame, by reason, and reconnects.

        Reconnects: how often the link was made again.
        """
        ...

    def close(self) -> None:
        """Ends the iteration soon; idempotent."""
        ...


__all__ = ["Frame", "FrameSource", "LiveSource", "PixelFormat", "VideoRange"]
