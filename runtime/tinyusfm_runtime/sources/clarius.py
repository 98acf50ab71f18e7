"""Source ``clarius:``: a shim with the callback signatures of the Clarius Cast API. Not tested on hardware.

    source = open_source("clarius:")
    caster = pyclariuscast.Caster(source.newProcessedImage, source.newRawImage, source.newSpectrumImage,
                                  source.newImuData, source.freeze, source.buttons)

The signatures are those of Clarius' published example (clariusdev/cast, python/pycaster.py). The library itself comes
with Clarius' releases only and is never imported here; its Python and its network are the caller's matter. Spacing
comes from ``micronsPerPixel``, which Clarius gives as one figure for both directions.

Pictures other than processed B-mode (raw lines, spectra) are counted and left.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import SourceError
from tinyusfm_runtime.frame import PixelFormat
from tinyusfm_runtime.plugins import Probe
from tinyusfm_runtime.sources.push import Box, PushSource

FORMATS = {1: PixelFormat.GREY, 4: PixelFormat.RGBA}
"""Bytes a pixel -> what they are: 8-bit grey, or 32-bit RGBA."""


def probe() -> Probe:
    """Always works as far as it can be known: the callbacks need nothing."""
    return Probe(works=True, reason="callbacks for the Cast API; not tested on hardware", extra=None)


def accepts(location: str) -> bool:
    """True for the scheme ``clarius:``."""
    return location.startswith("clarius:")


def open_source(location: str, *, orientation: str | None = None, crop: Box | None = None) -> ClariusSource:
    """Makes the callbacks.

    Args:
        location: ``clarius:``, or ``clarius:LABEL`` with a label that only people read.
        orientation: PLUS letters of every frame, or None.
        crop: (row, column, height, width): what lies outside is not kept for a moment.

    Returns:
        The source; hand its methods to the caster.

    Raises:
        SourceError: the label cannot be used.
    """
    if not re.fullmatch(r"clarius:[A-Za-z0-9_.-]{0,60}", location):
        raise SourceError("a Clarius source is written clarius: or clarius:LABEL; the connection is the caster's")
    return ClariusSource(orientation=orientation, crop=crop)


class ClariusSource(PushSource):
    """Callbacks of the Cast API; each may come from any thread and none raises."""

    def __init__(self, *, orientation: str | None = None, crop: Box | None = None) -> None:
        super().__init__(orientation=orientation, crop=crop)
        self.notes = ("the Clarius source was never tested on hardware",)
        self.frozen = False

    def newProcessedImage(
        self, image: Any, width: int, height: int, sz: int, micronsPerPixel: float, timestamp_ns: int, angle: float,
        imu: Any,
    ) -> None:  # fmt: skip
        """Takes a scan-converted picture.

        Args:
            image: its bytes.
            width: columns.
            height: rows.
            sz: bytes altogether; another number than width x height x 1 or 4 means a compressed picture.
            micronsPerPixel: distance of pixel centres, um, the same both ways.
            timestamp_ns: the probe's clock, ns.
            angle: of a volume probe; not used.
            imu: positions of the probe; not used.
        """
        pixel_bytes = {width * height * bytes_a_pixel: bytes_a_pixel for bytes_a_pixel in FORMATS}.get(sz)
        if pixel_bytes is None or width < 1 or height < 1:
            self.tally.add("size")
            return
        try:
            flat = np.frombuffer(image, np.uint8, sz)
        except (TypeError, ValueError, BufferError):
            self.tally.add("argument")
            return
        shape = (height, width) if pixel_bytes == 1 else (height, width, pixel_bytes)
        side_mm = micronsPerPixel / 1000
        spacing_mm = (side_mm, side_mm) if 1e-4 < side_mm < 100 else None
        if spacing_mm is None:
            self.tally.add("no_spacing")
        self.push(
            flat.reshape(shape), t_source_ns=timestamp_ns, pixel_format=FORMATS[pixel_bytes], spacing_mm=spacing_mm
        )

    def newRawImage(self, *_: Any) -> None:
        """Raw lines before scan conversion: a sign of life, not a picture."""
        self.tally.add("raw")
        self.alive()

    def newSpectrumImage(self, *_: Any) -> None:
        """A Doppler or M-mode strip: a sign of life, not a picture."""
        self.tally.add("spectrum")
        self.alive()

    def newImuData(self, *_: Any) -> None:
        """A position of the probe: a sign of life."""
        self.alive()

    def freeze(self, frozen: Any) -> None:
        """The probe stands still or goes on."""
        self.frozen = bool(frozen)
        self.tally.add("freezes", int(self.frozen))
        self.alive()

    def buttons(self, *_: Any) -> None:
        """A button was pressed: a sign of life."""
        self.alive()


__all__ = ["FORMATS", "ClariusSource", "accepts", "open_source", "probe"]
