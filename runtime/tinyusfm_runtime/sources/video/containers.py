"""Video containers as far as decoders do not tell.

How many bytes they promise, and what an MP4 says about its image.

Families are walked by their own sizes: RIFF (AVI), ISO base media (MP4, MOV, 3GP; ISO/IEC 14496-12), EBML (Matroska,
WebM; RFC 8794), ASF (WMV), YUV4MPEG2 and transport streams. No coded image is read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_MOOV_BYTES = 64 << 20
"""Of an MP4's own description; a longer one is not looked into."""
MAX_BOXES = 100_000
ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
"""Header object, and File Properties object of an ASF file."""
Y4M_SHARES = {"420": (2, 2), "422": (2, 1), "444": (1, 1), "411": (4, 1), "mono": (0, 0)}
"""Colour space of a YUV4MPEG2 file -> columns and rows that share a colour; mono has none."""
SEGMENT = 0x18538067
"""Matroska's outermost element (RFC 9559)."""
MATRICES = {
    (1, 0, 0, 1): 1, (-1, 0, 0, 1): 2, (-1, 0, 0, -1): 3, (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5, (0, 1, -1, 0): 6, (0, -1, -1, 0): 7, (0, -1, 1, 0): 8,
}  # fmt: skip
"""Signs of a display matrix (a, b, c, d) -> orientation as EXIF counts them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IsoVideo:
    """What an MP4 says about its image.

    Attributes:
        orientation: 1..8 of its first video track, or None where its matrix is no such turn.
        tracks: how many video tracks there are.
        cover_first: a cover image stands in front of the tracks, where some readers take it for the video.
    """

    orientation: int | None
    tracks: int
    cover_first: bool


def orientation_of(a: float, b: float, c: float, d: float) -> int | None:
    """Orientation of a display matrix, or None for other angles.

    Other angles are those that are not a multiple of 90 degrees.

    Args:
        a: x' = a x + c y, y' = b x + d y; likewise the others (ISO/IEC 14496-12, 6.2.2).
        b: see ``a``.
        c: see ``a``.
        d: see ``a``.
    """
    largest = max(abs(value) for value in (a, b, c, d))
    if largest == 0:
        return 1
    signs = tuple(0 if abs(value) < 0.01 * largest else 1 if value > 0 else -1 for value in (a, b, c, d))
    return MATRICES.get(signs)  # type: ignore[arg-type]


def promised_bytes(path: Path) -> int | None:
    """How long a file must be by its container's own sizes, or None.

    None where the container does not say.

    Args:
        path: the file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(12)
            if start[:4] == b"RIFF":
                return _riff(file)
            if start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
                return max((at + size for _, at, size in _boxes(file, 0, _size(file))), default=None)
            if start[:4] == b"\x1a\x45\xdf\xa3":
                return _ebml(file)
            if start[:9] == b"YUV4MPEG2":
                return _y4m(file)
            if start[:3] == b"\xff\xd8\xff":
                return _mjpeg(file)
            if start[:4] == ASF[:4]:
                return _asf(file)
            if start[:1] == b"G" or start[4:5] == b"G":
                return _ts(file)
    except OSError:
        return None
    return None


def iso_video(path: Path) -> IsoVideo | None:
    """What an MP4 says about its image, or None for other containers.

    Args:
        path: the file.
    """
    try:
        with path.open("rb") as file:
            for kind, at, size in _boxes(file, 0, _size(file)):
                if kind == b"moov" and size <= MAX_MOOV_BYTES:
                    file.seek(at + 8)
                    return _movie(file.read(size - 8))
    except OSError:
        return None
    return None


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _riff(file: BinaryIO) -> int:
    """RIFF lists of an AVI one behind another; files above 1 GiB have several."""
    at, end = 0, _size(file)
    promised = 0
    for _ in range(MAX_BOXES):
        file.seek(at)
        head = file.read(8)
        if head[:4] != b"RIFF" or len(head) < 8:
            break
        size = int.from_bytes(head[4:], "little")
        if size in (0, 0xFFFFFFFF):  # a recorder that never came back to write it
            break
        promised = at + 8 + size
        at = promised + promised % 2
        if at >= end:
            break
    return promised


def _boxes(file: BinaryIO, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, offset, size) of the boxes at one level of an MP4.

    The last may promise more than there is.
    """
    for _ in range(MAX_BOXES):
        if at + 8 > end:
            return
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        elif size == 0:
            size = end - at
        if size < 8 or not head[4:8].isalnum():
            return
        yield head[4:8], at, size
        at += size


def _y4m(file: BinaryIO) -> int | None:
    """End of the image that a raw YUV4MPEG2 file of 8 bits ends in."""
    file.seek(0)
    line = file.readline(4096)
    words = {word[:1]: word[1:].decode("ascii", "replace") for word in line.split()[1:]}
    chroma = words.get(b"C", "420")
    share = next((part for name, part in Y4M_SHARES.items() if chroma.startswith(name)), None)
    if share is None or "p1" in chroma or not (words.get(b"W", "").isdecimal() and words.get(b"H", "").isdecimal()):
        return None
    wide, high = int(words[b"W"]), int(words[b"H"])
    halves = (-(-wide // share[0])) * (-(-high // share[1])) * 2 if share[0] else 0
    step = len(b"FRAME\n") + wide * high + halves
    data = _size(file) - len(line)
    # parameters of single images make the step another one: then nothing is promised
    file.seek(len(line) + (data // step - 1) * step if data >= step else len(line))
    return len(line) + -(-data // step) * step if file.read(5) == b"FRAME" else None


def _mjpeg(file: BinaryIO) -> int | None:
    """More bytes than there are, where the last image has no end marker."""
    size = _size(file)
    file.seek(max(0, size - 64))
    return None if b"\xff\xd9" in file.read() else size + 2


def _asf(file: BinaryIO) -> int | None:
    """The size that an ASF (WMV) file gives itself, or None (ASF 1.20, 3.2)."""
    file.seek(0)
    start = file.read(1 << 16)
    at = start.find(ASF_PROPERTIES)
    size = int.from_bytes(start[at + 40 : at + 48], "little") if at >= 0 else 0
    return size or None


def _ts(file: BinaryIO) -> int | None:
    """End of the packet that a transport stream ends in (ISO/IEC 13818-1).

    Packets have 188 bytes, or 192 with a time in front.
    """
    file.seek(0)
    start = file.read(192 * 4)
    for length, first in ((188, 0), (192, 4)):
        if len(start) > 3 * length and all(start[first + k * length] == 0x47 for k in range(3)):
            return -(-_size(file) // length) * length
    return None


def _ebml(file: BinaryIO) -> int | None:
    """End of the Segment of a Matroska file; None where its size was never written."""
    file.seek(0)
    data = file.read(4096)
    at = 0
    for _ in range(16):
        name, width = _vint(data, at, keep=True)
        size, more = _vint(data, at + width, keep=False)
        if not width or not more:
            return None
        body = at + width + more
        if name == SEGMENT:
            return None if size == (1 << 7 * more) - 1 else body + size
        at = body + size
    return None


def _vint(data: bytes, at: int, *, keep: bool) -> tuple[int, int]:
    """A variable-length number of EBML and its width (RFC 8794, 4).

    0 where there is none.
    """
    first = data[at] if at < len(data) else 0
    width = 9 - first.bit_length()
    if first == 0 or at + width > len(data):
        return 0, 0
    value = int.from_bytes(data[at : at + width], "big")
    return (value if keep else value & ((1 << 7 * width) - 1)), width


def _movie(data: bytes) -> IsoVideo:
    orientations: list[int | None] = []
    cover = False
    for kind, body in _inner(data):
        if kind == b"udta" and b"covr" in body:
            cover = cover or not orientations
        if kind == b"trak" and _handler(body) == b"vide":
            orientations.append(_track_orientation(body))
    return IsoVideo(orientation=orientations[0] if orientations else 1, tracks=len(orientations), cover_first=cover)


def _inner(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size < 8:
            return
        yield data[at + 4 : at + 8], data[at + 8 : at + size]
        at += size


def _handler(track: bytes) -> bytes:
    media = next((body for kind, body in _inner(track) if kind == b"mdia"), b"")
    return next((body[8:12] for kind, body in _inner(media) if kind == b"hdlr"), b"")


def _track_orientation(track: bytes) -> int | None:
    """From the matrix of the track header (ISO/IEC 14496-12, 8.3.2)."""
    header = next((body for kind, body in _inner(track) if kind == b"tkhd"), b"")
    at = 52 if header[:1] == b"\1" else 40
    numbers = [int.from_bytes(header[at + 4 * n : at + 4 * n + 4], "big", signed=True) for n in range(5)]
    return orientation_of(numbers[0], numbers[1], numbers[3], numbers[4]) if len(header) >= at + 36 else 1


__all__ = [
    "ASF",
    "ASF_PROPERTIES",
    "MATRICES",
    "MAX_BOXES",
    "MAX_MOOV_BYTES",
    "SEGMENT",
    "Y4M_SHARES",
    "IsoVideo",
    "iso_video",
    "orientation_of",
    "promised_bytes",
]
