"""Source ``push:``: the vendor's own callback hands frames over, from any thread.

    source = PushSource(spacing_mm=(0.2, 0.2))
    sdk.on_frame(lambda pixels, t_ns, number: source.push(pixels, t_source_ns=t_ns, seq=number))

``push`` never waits and never raises: what cannot be used is counted and answered with False, since an exception inside
a vendor's callback ends up nobody knows where. The newest frame waits in a slot of one.

It does not know the vendor.
"""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import FrameError, InputError, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.plugins import Probe
from tinyusfm_runtime.slot import SlotSource

Box = tuple[int, int, int, int]
"""(row, column, height, width) in frame pixels."""
GUESSES = {2: PixelFormat.GREY, 3: PixelFormat.RGB, 4: PixelFormat.RGBA}
"""Format of an array of two axes, and of one with 3 or 4 channels, if nothing else is said."""


def probe() -> Probe:
    """Always works: numpy only."""
    return Probe(works=True, reason="numpy only", extra=None)


def accepts(location: str) -> bool:
    """True for the scheme ``push:``."""
    return location.startswith("push:")


def open_source(
    location: str,
    *,
    spacing_mm: tuple[float, float] | None = None,
    orientation: str | None = None,
    crop: Box | None = None,
    video_range: str = "full",
) -> PushSource:
    """Makes a source that waits for ``push``.

    Args:
        location: ``push:``, or ``push:LABEL`` with a label that only people read.
        spacing_mm: (row, column) spacing of every frame that does not bring its own, mm, or None.
        orientation: PLUS letters of every frame, or None.
        crop: (row, column, height, width): what lies outside is not kept for a moment.
        video_range: what the codes mean, ``full`` or ``limited``.

    Returns:
        The source.

    Raises:
        SourceError: the label or an option cannot be used.
    """
    if not re.fullmatch(r"push:[A-Za-z0-9_.-]{0,60}", location):
        raise SourceError("a push source is written push: or push:LABEL")
    if video_range not in ("full", "limited"):
        raise SourceError(f"video_range {video_range!r}: choose full or limited")
    return PushSource(spacing_mm=spacing_mm, orientation=orientation, crop=crop, video_range=VideoRange(video_range))


class PushSource(SlotSource):
    """A slot with a mouth.

    Args:
        spacing_mm: (row, column) spacing of every frame that does not bring its own, mm, or None.
        orientation: PLUS letters of every frame, or None.
        crop: (row, column, height, width): what lies outside is not kept.
        video_range: what the codes mean.
    """

    def __init__(
        self,
        *,
        spacing_mm: tuple[float, float] | None = None,
        orientation: str | None = None,
        crop: Box | None = None,
        video_range: VideoRange = VideoRange.FULL,
    ) -> None:
        super().__init__()
        self.spacing_mm, self.orientation, self.crop, self.video_range = spacing_mm, orientation, crop, video_range
        self._next = 0

    def __enter__(self) -> PushSource:
        return self

    def push(
        self,
        pixels: np.ndarray,
        t_source_ns: int | None = None,
        seq: int | None = None,
        *,
        pixel_format: PixelFormat | str | None = None,
        spacing_mm: tuple[float, float] | None = None,
        copy: bool = True,
    ) -> bool:
        """Hands a frame over.

        Args:
            pixels: uint8, HW, or HWC with 3 (RGB) or 4 (RGBA) channels.
            t_source_ns: the source's own clock, or None.
            seq: the source's own running number, or None to count here.
            pixel_format: meaning of the channels where it is another than these.
            spacing_mm: (row, column) of this frame, mm, or None.
            copy: False if the array is never written to again.

        Returns:
            True if it was taken; False if it cannot be used (see ``counters``) or the source is closed.
        """
        t_recv_ns = time.monotonic_ns()
        if self.slot.closed:
            return False
        try:
            frame = self._frame(pixels, pixel_format, spacing_mm, copy)
            frame = replace(
                frame,
                seq=self._next if seq is None else int(seq),
                t_source_ns=None if t_source_ns is None else int(t_source_ns),
                t_recv_ns=t_recv_ns,
            )
        except FrameError:
            self.tally.add("frame")
            return False
        except InputError:
            self.tally.add("crop")
            return False
        except Exception:  # a callback may hand over anything at all
            self.tally.add("argument")
            return False
        self._next = frame.seq + 1
        self._contact_ns = t_recv_ns
        if self.slot.put(frame):
            self.tally.add("overtaken")
        return True

    def alive(self) -> None:
        """Says that the probe is connected though it sends no picture, as when it is frozen."""
        self._contact_ns = time.monotonic_ns()

    def _frame(
        self, pixels: Any, pixel_format: PixelFormat | str | None, spacing_mm: tuple[float, float] | None, copy: bool
    ) -> Frame:
        from tinyusfm_runtime.sources import cropped

        if pixel_format is None:
            axes = pixels.ndim if isinstance(pixels, np.ndarray) else 0
            pixel_format = GUESSES.get(pixels.shape[2] if axes == 3 else axes)
            if pixel_format is None:
                raise FrameError("an array of HW, or HWC with 3 or 4 channels, is wanted")
        frame = Frame(
            pixels=pixels,
            pixel_format=PixelFormat(pixel_format),
            video_range=self.video_range,
            spacing_mm=spacing_mm or self.spacing_mm,
            orientation=self.orientation,
        )
        if self.crop is not None:
            frame = cropped(frame, self.crop)
        return replace(frame, pixels=frame.pixels.copy()) if copy else frame


__all__ = ["GUESSES", "Box", "PushSource", "accepts", "open_source", "probe"]
