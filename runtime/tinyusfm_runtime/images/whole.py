"""Whole or broken off.

What decoders let pass when an image file ends early or is damaged.

Each check reads the container only, never pixels: PNG chunks against their CRC, the end marker of JPEG and JPEG 2000,
the length that RIFF (WebP) and BMP headers promise, the trailer of GIF.

It does not know what is in the image. JPEG has no checksum: a changed byte inside its data shows as noise.
"""

from __future__ import annotations

import zlib
from typing import Literal

from tinyusfm_runtime.errors import FrameError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_START, JPEG_SCAN, JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
MOST_SCANNED = 1 << 29
"""Pixels that a JPEG may go over, all scans together: 16 scans of the largest image; progressive files have 10."""
J2K_START = b"\xff\x4f\xff\x51"
"""SOC and SIZ (ITU-T T.800 A.4)."""

GIF_IMAGE, GIF_EXTENSION = 0x2C, 0x21
"""First bytes of a GIF's blocks (GIF89a, appendix A)."""


def check_whole(data: bytes) -> None:
    """Finds an image file that breaks off, or whose checksums do not match.

    Args:
        data: the whole file.

    Raises:
        FrameError: it breaks off or is damaged.
    """
    if data[:2] == JPEG_START:
        if not jpeg_is_whole(data):
            raise FrameError("the JPEG breaks off")
    elif data[:8] == PNG_SIGNATURE:
        _check_png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        if int.from_bytes(data[4:8], "little") + 8 > len(data):
            raise FrameError("the WebP breaks off")
    elif J2K_START in data[:4096] and not j2k_is_whole(data):
        raise FrameError("the JPEG 2000 breaks off")


def gif_is_whole(data: bytes) -> bool:
    """True if a GIF ends with its trailer; zeros behind it are padding."""
    return data.rstrip(b"\0")[-1:] == b";"


def jpeg_is_whole(data: bytes) -> bool:
    """True if an end marker follows the last scan.

    An embedded preview has a marker of its own before it.
    """
    scan = data.rfind(JPEG_SCAN)
    return data.rfind(JPEG_END) > max(scan, 1)


def check_scans(data: bytes, rows: int, columns: int) -> None:
    """Refuses a JPEG that goes over its pixels again and again.

    Inside a scan the marker's bytes cannot stand (ITU-T T.81 B.1.1.5), so counting them is enough.

    Args:
        data: the whole JPEG.
        rows: of the image.
        columns: of the image.

    Raises:
        FrameError: all scans together go over more than MOST_SCANNED pixels.
    """
    scans = data.count(JPEG_SCAN)
    if scans * rows * columns > MOST_SCANNED:
        raise FrameError(f"a JPEG of {scans} scans is refused: write it as a baseline JPEG")


def check_jpeg_kind(data: bytes) -> None:
    """Names the kinds of JPEG that no decoder here reads.

    Args:
        data: the whole file, JPEG or not.

    Raises:
        FrameError: JPEG of more than 8 bits a sample, lossless JPEG, or JPEG-LS; the message says how to mend it.
    """
    at = 2
    while data[:2] == JPEG_START and at + 9 < len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        marker, bits = data[at + 1], data[at + 4]
        if marker == 0xF7:
            raise FrameError("JPEG-LS file: write it as PNG, or as DICOM in JPEG-LS, which is read")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            kind = "lossless" if marker in (0xC3, 0xC7, 0xCB, 0xCF) else f"{bits}-bit" if bits != 8 else ""
            if kind:
                raise FrameError(
                    f"{kind} JPEG is not read: write it as PNM (djpeg of libjpeg-turbo 3 does) or as 16-bit PNG, and "
                    "give --window LO,HI"
                )
            return
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def gif_pages(data: bytes, most: int) -> int:
    """How many images a GIF holds (GIF89a, section 20).

    They are counted no further than one above ``most``; damage ends the count.
    """
    if len(data) < 13:
        return 0
    at, found = 13 + _table_bytes(data[10]), 0
    while found <= most and at + 1 < len(data):
        if data[at] == GIF_IMAGE:
            found += 1
            at += 11 + (_table_bytes(data[at + 9]) if at + 9 < len(data) else 0)
        elif data[at] == GIF_EXTENSION:
            at += 2
        else:
            break
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return found


def _table_bytes(flags: int) -> int:
    """Bytes of the colour table that a GIF's flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def tiff_pages(data: bytes, most: int) -> int:
    """How many page entries a TIFF chains (TIFF 6.0 section 2; BigTIFF).

    They are counted no further than one above ``most``.
    """
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    big = data[2:4] in (b"+\0", b"\0+")
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if big else (2, 12, 4)
    at, found = (8 if big else 4), 0
    while found <= most:
        place = int.from_bytes(data[at : at + offset_bytes], order)
        if not 0 < place < len(data):
            break
        found += 1
        at = place + count_bytes + entry_bytes * int.from_bytes(data[place : place + count_bytes], order)
        if at >= len(data):
            break
    return found


def j2k_is_whole(data: bytes) -> bool:
    """True if the codestream ends with its marker.

    Whatever padding or boxes stand behind it.
    """
    return data.rfind(JPEG_END) > data.rfind(b"\xff\x93")


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


__all__ = [
    "GIF_EXTENSION",
    "GIF_IMAGE",
    "J2K_START",
    "JPEG_END",
    "JPEG_SCAN",
    "JPEG_START",
    "MOST_SCANNED",
    "PNG_SIGNATURE",
    "check_jpeg_kind",
    "check_scans",
    "check_whole",
    "gif_is_whole",
    "gif_pages",
    "j2k_is_whole",
    "jpeg_is_whole",
    "tiff_pages",
]
