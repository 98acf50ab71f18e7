"""Source ``clarius:``: a shim for the Clarius Cast API.

It has the callback signatures. Not tested on hardware.

    source = open_source("clarius:")
    caster = pyclariuscast.Caster(source.newProcessedImage, source.newRawImage, source.newSpectrumImage,
                                  source.newImuData, source.freeze, source.buttons)

The signatures are those of Clarius' published examples (clariusdev/cast, python/pycaster.py), the older ones included:
seven arguments instead of eight (without the angle), and bits of a pixel instead of bytes of the image. A call of any
other shape is counted, and the first of each kind becomes a note; nothing raises into the vendor. The library itself
comes
with Clarius' releases only and is never imported here; its Python and its network are the caller's matter. Spacing
comes from ``micronsPerPixel``, which Clarius gives as one figure for both directions.

Images other than processed B-mode (raw lines, spectra) are counted and left.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import SourceError
from tinyusfm_runtime.frame import PixelFormat
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.sources.push import Box, PushSource

FORMATS = {1: PixelFormat.GREY, 4: PixelFormat.RGBA}
"""Bytes per pixel -> what they are: 8-bit grey, or 32-bit RGBA."""
NAMES = ("image", "width", "height", "sz", "micronsPerPixel", "timestamp_ns")
"""What every published newProcessedImage begins with."""
ALIASES = {"bpp": "sz", "size": "sz", "timestamp": "timestamp_ns"}
"""Other names of these in releases."""


def available() -> Availability:
    """Always works as far as it can be known: the callbacks need nothing."""
    return Availability(usable=True, reason="callbacks for the Cast API; not tested on hardware", extra=None)


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


class SignatureError(ValueError):
    """A callback was called in a shape that no published release has."""


class ClariusSource(PushSource):
    """Callbacks of the Cast API; each may come from any thread and none raises."""

    def __init__(self, *, orientation: str | None = None, crop: Box | None = None) -> None:
        super().__init__(orientation=orientation, crop=crop)
        self.findings.note("the Clarius source was never tested on hardware")
        self.frozen = False

    def newProcessedImage(self, *arguments: Any, **named: Any) -> None:
        """Takes a scan-converted image.

        Args:
            *arguments: image (its bytes), width, height, size (bytes altogether, or bits of a pixel in older
                releases), micronsPerPixel (the same both ways), timestamp (the probe's clock, ns), and then what the
                release adds: angle and imu, or imu alone; neither is used.
            **named: the same by the names of the published example.
        """
        try:
            self._take(*_image_arguments(arguments, named))
        except SignatureError as error:
            self.refuse("signature", str(error))
        except Exception as error:  # nothing raises into the vendor
            self.refuse("argument", f"newProcessedImage got something that cannot be used ({type(error).__name__})")

    def _take(self, image: Any, width: int, height: int, size: int, microns: Any, timestamp_ns: Any) -> None:
        pixel_bytes = _pixel_bytes(width, height, size)
        if pixel_bytes is None:
            self.refuse("size", f"an image of {width}x{height} with size {size}: 8-bit grey or 32-bit RGBA is read")
            return
        flat = np.frombuffer(image, np.uint8)
        if flat.size < width * height * pixel_bytes:
            self.refuse("size", f"an image of {width}x{height} brings {flat.size} bytes: is it compressed?")
            return
        flat = flat[: width * height * pixel_bytes]
        shape = (height, width) if pixel_bytes == 1 else (height, width, pixel_bytes)
        self.push(
            flat.reshape(shape),
            t_source_ns=_number_or_none(timestamp_ns),
            pixel_format=FORMATS[pixel_bytes],
            spacing_mm=self._spacing(microns),
        )

    def _spacing(self, microns: Any) -> tuple[float, float] | None:
        side_mm = (_number_or_none(microns) or 0.0) / 1000
        if not 1e-4 < side_mm < 100:
            self.refuse("no_spacing", "micronsPerPixel is no distance: measurements are in pixels")
            return None
        return side_mm, side_mm

    def newRawImage(self, *_: Any, **__: Any) -> None:
        """Raw lines before scan conversion: a sign of life, not an image."""
        self.tally.add("raw")
        self.alive()

    def newSpectrumImage(self, *_: Any, **__: Any) -> None:
        """A Doppler or M-mode strip: a sign of life, not an image."""
        self.tally.add("spectrum")
        self.alive()

    def newImuData(self, *_: Any, **__: Any) -> None:
        """A position of the probe: a sign of life."""
        self.alive()

    def freeze(self, *state: Any, **named: Any) -> None:
        """The probe stands still or goes on; the first argument says which."""
        value = next(iter((*state, *named.values())), True)
        try:
            self.frozen = bool(value)
        except Exception as error:  # such as an array; nothing raises into the vendor
            self.refuse("argument", f"freeze got something that is neither true nor false ({type(error).__name__})")
            return
        self.tally.add("freezes", int(self.frozen))
        self.alive()

    def buttons(self, *_: Any, **__: Any) -> None:
        """A button was pressed: a sign of life."""
        self.alive()


def _image_arguments(arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, int, int, int, Any, Any]:
    """Image, width, height, size, microns and time of a call of any published shape.

    Raises:
        SignatureError: too few arguments, or some that are no numbers where numbers stand.
    """
    given = dict(zip(NAMES, arguments, strict=False)) | {
        ALIASES.get(name, name): value for name, value in named.items()
    }
    if not 6 <= len(arguments) + len(named) <= 10 or any(name not in given for name in NAMES[:5]):
        raise SignatureError(
            f"newProcessedImage was called with {len(arguments) + len(named)} arguments; known are "
            "(image, width, height, size or bits, micronsPerPixel, timestamp, [angle,] imu)"
        )
    try:
        width, height, size = (int(given[name]) for name in ("width", "height", "sz"))
    except (TypeError, ValueError) as error:
        raise SignatureError("newProcessedImage: width, height and size are no numbers") from error
    return given["image"], width, height, size, given["micronsPerPixel"], given.get("timestamp_ns")


def _pixel_bytes(width: int, height: int, size: int) -> int | None:
    """Bytes per pixel, from the size of the image or the bits of a pixel.

    Older releases give the bits of a pixel instead.
    """
    if width < 1 or height < 1:
        return None
    whole = {width * height * count: count for count in FORMATS}
    return whole.get(size) or {8 * count: count for count in FORMATS}.get(size)


def _number_or_none(value: Any) -> float | None:
    try:
        return value if isinstance(value, int) else float(value)
    except (TypeError, ValueError):
        return None


__all__ = [
    "ALIASES",
    "FORMATS",
    "NAMES",
    "ClariusSource",
    "SignatureError",
    "accepts",
    "available",
    "open_source",
]
