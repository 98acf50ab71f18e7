"""Depth of an image as its file stores it.

Pillow reduces some kinds to 8 bits without a word.

The file's own header decides (PNG's IHDR, TIFF's BitsPerSample and SampleFormat, PNM's maximum, JPEG 2000's SIZ), never
the mode that Pillow chose. It does not decode.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import FrameError
from tinyusfm_runtime.images.whole import J2K_START

BITS_TAG, FORMAT_TAG, SAMPLES_TAG = 258, 339, 277
"""BitsPerSample, SampleFormat, SamplesPerPixel (TIFF 6.0)."""
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
"""SampleFormat (TIFF 6.0, section 19)."""
_PNM = re.compile(rb"P[2356]\s+(?:#[^\n]*\n\s*)*\d+\s+(?:#[^\n]*\n\s*)*\d+\s+(?:#[^\n]*\n\s*)*(\d+)\s")
_IMAGEJ = re.compile(r"^images=(\d{1,7})\s*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCodes:
    """What one channel of the file holds.

    Attributes:
        bits: of one code.
        signed: True if codes may be negative.
        floats: True if codes are floating-point numbers.
        shift: bits by which Pillow moves codes up when it loads them.
        maximum: what the file says is white, for kinds that Pillow stretches to 16 bits, else 0.
    """

    bits: int = 8
    signed: bool = False
    floats: bool = False
    shift: int = 0
    maximum: int = 0

    @property
    def needs_window(self) -> bool:
        """True if only the owner knows which codes are black and white."""
        return self.bits > 8 or self.signed or self.floats

    @property
    def name(self) -> str:
        """Such as ``16-bit image``."""
        kind = "float" if self.floats else "signed " if self.signed else ""
        return f"{self.bits}-bit {kind}{' ' if self.floats else ''}image"

    def codes_of(self, image: Any) -> np.ndarray:
        """The codes of a loaded image as the file stores them.

        Args:
            image: Pillow's, of one channel.

        Returns:
            HW, integers or float32.

        Raises:
            FrameError: several channels, which Pillow has reduced to 8 bits.
        """
        codes = np.asarray(image)
        if codes.ndim != 2:
            raise FrameError(f"{self.bits}-bit image of several channels: convert it to 8 bits, or to grey, first")
        if self.signed and codes.dtype == np.uint8:
            codes = codes.view(np.int8)
        if self.bits == 32 and not self.signed and codes.dtype == np.int32:
            codes = codes.view(np.uint32)
        if self.maximum:
            return (codes.astype(np.int64) * self.maximum + 32767) // 65535
        return codes >> self.shift if self.shift else codes


def stored_codes(image: Any, data: bytes) -> StoredCodes:
    """What the file stores.

    Args:
        image: Pillow's, opened at the page in question.
        data: the whole file.

    Returns:
        Depth and kind of its codes.

    Raises:
        FrameError: a kind that is not read.
    """
    kind = image.format
    if kind == "PNG":
        return StoredCodes(bits=max(8, data[24]))
    if kind == "TIFF":
        return _tiff(image.tag_v2)
    if kind == "PPM":
        if data[:2] in (b"Pf", b"PF"):
            return StoredCodes(bits=32, floats=True)
        maximum = pnm_maximum(data)
        return StoredCodes(bits=8 if maximum < 256 else 16, maximum=0 if maximum < 256 else maximum)
    if kind == "JPEG2000":
        return _jpeg2000(data)
    return StoredCodes()


def pnm_maximum(data: bytes) -> int:
    """What a PNM says is white; 255 where it does not say (bitmaps)."""
    match = _PNM.match(data[:4096])
    return int(match[1]) if match else 255


def _tiff(tags: Any) -> StoredCodes:
    bits = max(tags.get(BITS_TAG) or (1,))
    formats = tags.get(FORMAT_TAG) or (UNSIGNED,)
    return StoredCodes(bits=max(8, int(bits)), signed=SIGNED in formats, floats=FLOAT in formats)


def _jpeg2000(data: bytes) -> StoredCodes:
    """Depth from the SIZ marker (ITU-T T.800 A.5.1).

    Csiz at byte 38 of the codestream, then Ssiz of each component.
    """
    start = data.find(J2K_START)
    if start < 0 or start + 43 > len(data):
        return StoredCodes()
    depth = data[start + 42]
    bits = (depth & 0x7F) + 1
    return StoredCodes(bits=max(8, bits), signed=bool(depth & 0x80), shift=16 - bits if 8 < bits < 16 else 0)


def imagej_pages(description: object) -> int:
    """How many images ImageJ says a TIFF holds, or 0.

    Large stacks have one page entry and the rest behind it.
    """
    if not isinstance(description, str) or not description.startswith("ImageJ="):
        return 0
    match = _IMAGEJ.search(description)
    return int(match[1]) if match else 0


__all__ = [
    "BITS_TAG",
    "FLOAT",
    "FORMAT_TAG",
    "SAMPLES_TAG",
    "SIGNED",
    "UNSIGNED",
    "StoredCodes",
    "imagej_pages",
    "pnm_maximum",
    "stored_codes",
]
