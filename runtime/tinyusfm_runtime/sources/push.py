"""Source ``push:``: the vendor's own callback hands frames over, from any thread.

    source = PushSource(spacing_mm=(0.2, 0.2))
    sdk.on_frame(lambda pixels, t_ns, number: source.push(pixels, t_source_ns=t_ns, seq=number))

``push`` never waits and never raises, whatever it is called with: what cannot be used is counted, the first of each
kind becomes a note with a hint, and the answer is False, since an exception inside a vendor's callback ends up
nobody knows where. The newest frame waits in a slot of one. Codes of more than 8 bits, and floats, need a window.

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
from tinyusfm_runtime.images.window import Window, apply_window, check_window, needs_window
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.sources._crop import Box, cropped
from tinyusfm_runtime.sources._slot import SlotSource
from tinyusfm_runtime.sources._spacing import SpacingRule, plausible

GUESSES = {2: PixelFormat.GREY, 3: PixelFormat.RGB, 4: PixelFormat.RGBA}
"""Format of an array of two axes, and of one with 3 or 4 channels, if nothing else is said."""

MOST = 1 << 63
"""Numbers and times of frames lie below it: sinks write them with 64 bits."""


def available() -> Availability:
    """Always works: numpy only."""
    return Availability(usable=True, reason="numpy only", extra=None)


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
    window: Window | None = None,
) -> PushSource:
    """Makes a source that waits for ``push``.

    Args:
        location: ``push:``, or ``push:LABEL`` with a label that only people read.
        spacing_mm: (row, column) spacing of every frame that does not bring its own, mm, or None.
        orientation: PLUS letters of every frame, or None.
        crop: (row, column, height, width): what lies outside is not kept for a moment.
        video_range: what the codes mean, ``full`` or ``limited``.
        window: (code that becomes 0, code that becomes 255) for frames that are not uint8, or None to refuse them.

    Returns:
        The source.

    Raises:
        InputError: the window has no two ends.
        SourceError: the label or an option cannot be used.
    """
    if not re.fullmatch(r"push:[A-Za-z0-9_.-]{0,60}", location):
        raise SourceError("a push source is written push: or push:LABEL")
    if video_range not in ("full", "limited"):
        raise SourceError(f"video_range {video_range!r}: choose full or limited")
    if window is not None:
        check_window(window)
    return PushSource(
        spacing_mm=spacing_mm, orientation=orientation, crop=crop, video_range=VideoRange(video_range), window=window
    )


class PushSource(SlotSource):
    """A slot with a mouth.

    Args:
        spacing_mm: (row, column) spacing of every frame that does not bring its own, mm, or None.
        orientation: PLUS letters of every frame, or None.
        crop: (row, column, height, width): what lies outside is not kept.
        video_range: what the codes mean.
        window: (code that becomes 0, code that becomes 255) for frames that are not uint8, or None to refuse them.
    """

    def __init__(
        self,
        *,
        spacing_mm: tuple[float, float] | None = None,
        orientation: str | None = None,
        crop: Box | None = None,
        video_range: VideoRange = VideoRange.FULL,
        window: Window | None = None,
    ) -> None:
        super().__init__()
        self.window, self._rule = window, SpacingRule(spacing_mm, self.findings)
        self.spacing_mm, self.orientation, self.crop, self.video_range = spacing_mm, orientation, crop, video_range
        self._next = 0

    def push(
        self,
        pixels: Any = None,
        t_source_ns: Any = None,
        seq: Any = None,
        *unknown: Any,
        pixel_format: Any = None,
        spacing_mm: Any = None,
        copy: bool = True,
        **more: Any,
    ) -> bool:
        """Hands a frame over.

        Args:
            pixels: uint8 array, HW, or HWC with 3 (RGB) or 4 (RGBA) channels; of another type where there is a window.
            t_source_ns: the source's own clock, ns, or None.
            seq: the source's own running number, or None to count here.
            *unknown: anything else is a call of another shape, counted as ``signature``.
            pixel_format: PixelFormat or its name, where channels mean something else than these.
            spacing_mm: (row, column) of this frame, mm, or None.
            copy: False if the array is never written to again.
            **more: as ``unknown``.

        Returns:
            True if it was taken; False if it cannot be used (see ``counters`` and ``notes``) or the source is closed.
        """
        t_recv_ns = time.monotonic_ns()
        if self.slot.closed:
            return False
        if unknown or more:
            self.refuse("signature", "push is called with more arguments than it knows: push(pixels, t_source_ns, seq)")
            return False
        try:
            frame = self._frame(pixels, pixel_format, spacing_mm, copy)
            frame = replace(
                frame,
                seq=self._next if seq is None else _whole(seq, "seq"),
                t_source_ns=None if t_source_ns is None else _whole(t_source_ns, "t_source_ns"),
                t_recv_ns=t_recv_ns,
            )
        except FrameError as error:
            self.refuse("frame", str(error))
            return False
        except InputError as error:
            self.refuse("crop", str(error))
            return False
        except Exception as error:  # a callback may hand over anything at all
            self.refuse("argument", f"an argument of push cannot be used ({type(error).__name__}): hand over an array")
            return False
        self._next = frame.seq + 1
        self._contact_ns = t_recv_ns
        if self.slot.put(frame):
            self.tally.add("overtaken")
        return True

    def alive(self) -> None:
        """Says that the probe is connected though it sends no image, as when it is frozen."""
        self._contact_ns = time.monotonic_ns()

    def _frame(
        self, pixels: Any, pixel_format: PixelFormat | str | None, spacing_mm: tuple[float, float] | None, copy: bool
    ) -> Frame:
        if pixel_format is None:
            axes = pixels.ndim if isinstance(pixels, np.ndarray) else 0
            pixel_format = GUESSES.get(pixels.shape[2] if axes == 3 else axes)
            if pixel_format is None:
                raise FrameError("an array of HW, or HWC with 3 or 4 channels, is wanted")
        if isinstance(pixels, np.ndarray) and pixels.dtype != np.uint8:
            if self.window is None:
                raise needs_window(f"{pixels.dtype} frames")
            pixels, copy = apply_window(pixels, self.window), False
        frame = Frame(
            pixels=pixels,
            pixel_format=PixelFormat(pixel_format),
            video_range=self.video_range,
            orientation=self.orientation,
        )
        # what a frame brings itself is its own; a given one holds for one size
        own = None if spacing_mm is None else (float(spacing_mm[0]), float(spacing_mm[1]))
        frame = replace(frame, spacing_mm=plausible(own, self.findings) if own else self._rule.of(pixels.shape))
        if self.crop is not None:
            frame = cropped(frame, self.crop)
        return replace(frame, pixels=frame.pixels.copy()) if copy else frame


def _whole(number: Any, name: str) -> int:
    """A whole number that sinks can write.

    Raises:
        FrameError: it has more than 64 bits.
    """
    found = int(number)
    if not -MOST <= found < MOST:
        raise FrameError(f"{name} has more than 64 bits: hand over a count, or nanoseconds")
    return found


__all__ = [
    "GUESSES",
    "MOST",
    "Box",
    "PushSource",
    "accepts",
    "available",
    "open_source",
]
