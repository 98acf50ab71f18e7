"""What a compressed frame says about itself, from its own markers.

Codec, size, channels and depth.

JPEG and JPEG-LS markers by ITU-T T.81 table B.1 and T.87 C.2.2; JPEG 2000 by T.800 A.5.1; RLE by DICOM PS3.5 G.5. The
frame is not decoded, and what it says is not believed either: decoders check it against its data.
"""

from __future__ import annotations

from dataclasses import dataclass

from tinyusfm_runtime.images.whole import J2K_START, JPEG_START, j2k_is_whole, jpeg_is_whole

JPEG_BASELINE, JPEG_EXTENDED, JPEG_LOSSLESS, JPEG_LOSSLESS_1 = (
    "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70",
)  # fmt: skip
JPEG_LS, JPEG_LS_NEAR = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81"
JPEG_2000_LOSSLESS, JPEG_2000 = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91"
HTJ2K = ("1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.202", "1.2.840.10008.1.2.4.203")
RLE = "1.2.840.10008.1.2.5"
FAMILIES = {
    "JPEG": (JPEG_BASELINE, JPEG_EXTENDED, JPEG_LOSSLESS, JPEG_LOSSLESS_1),
    "JPEG-LS": (JPEG_LS, JPEG_LS_NEAR),
    "JPEG 2000": (JPEG_2000_LOSSLESS, JPEG_2000, *HTJ2K),
}
"""Transfer syntaxes by the codestream that they carry (PS3.5 annex A.4)."""
SOF_LOSSLESS, SOF_LS = 0xC3, 0xF7
_CAPABILITIES = b"\xff\x50"
"""CAP marker: High-Throughput JPEG 2000 (T.814 A.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Codestream:
    """One compressed frame.

    Attributes:
        family: ``JPEG``, ``JPEG-LS`` or ``JPEG 2000``.
        syntax: transfer syntax that fits the codestream.
        rows: of the frame.
        columns: of the frame.
        channels: of the frame.
        bits: of a sample.
        signed: samples may be negative.
        whole: the end marker is there; padding behind it is legal.
    """

    family: str
    syntax: str
    rows: int
    columns: int
    channels: int
    bits: int
    signed: bool
    whole: bool


def starts_image(start: bytes) -> bool:
    """True if bytes begin a compressed image, not its continuation.

    Args:
        start: the first 12 bytes of a fragment.
    """
    return start[:2] == JPEG_START or start[:4] == J2K_START or start[4:8] == b"jP  "


def inspect(data: bytes) -> Codestream | None:
    """Reads a compressed frame's own header.

    Args:
        data: the whole frame.

    Returns:
        What it says; None if it is none of these kinds, or breaks off before it says so.
    """
    if data[:2] == JPEG_START:
        return _jpeg(data)
    start = data.find(J2K_START, 0, 4096)
    return None if start < 0 else _jpeg2000(data, start)


def rle_segments(data: bytes) -> int:
    """How many byte planes an RLE frame says it has: samples times bytes of a sample.

    0 if it breaks off.
    """
    return int.from_bytes(data[:4], "little") if len(data) >= 64 else 0


def _jpeg(data: bytes) -> Codestream | None:
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        frame = 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        if frame or marker == SOF_LS:
            ls = marker == SOF_LS
            lossless = JPEG_LOSSLESS_1 if marker == SOF_LOSSLESS else JPEG_EXTENDED
            return Codestream(
                family="JPEG-LS" if ls else "JPEG",
                syntax=JPEG_LS_NEAR if ls else JPEG_BASELINE if marker in (0xC0, 0xC2) else lossless,
                rows=int.from_bytes(data[at + 5 : at + 7], "big"),
                columns=int.from_bytes(data[at + 7 : at + 9], "big"),
                channels=data[at + 9],
                bits=data[at + 4],
                signed=False,
                whole=jpeg_is_whole(data),
            )
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _jpeg2000(data: bytes, start: int) -> Codestream | None:
    size = data[start + 8 : start + 43]
    if len(size) < 35:
        return None
    width, height, left, top = (int.from_bytes(size[at : at + 4], "big") for at in range(0, 16, 4))
    depth = size[34]
    throughput = _CAPABILITIES in data[start : start + 256]
    return Codestream(
        family="JPEG 2000",
        syntax=HTJ2K[2] if throughput else JPEG_2000,
        rows=height - top,
        columns=width - left,
        channels=int.from_bytes(size[32:34], "big"),
        bits=(depth & 0x7F) + 1,
        signed=bool(depth & 0x80),
        whole=j2k_is_whole(data),
    )


__all__ = [
    "FAMILIES",
    "HTJ2K",
    "JPEG_2000",
    "JPEG_2000_LOSSLESS",
    "JPEG_BASELINE",
    "JPEG_EXTENDED",
    "JPEG_LOSSLESS",
    "JPEG_LOSSLESS_1",
    "JPEG_LS",
    "JPEG_LS_NEAR",
    "RLE",
    "SOF_LOSSLESS",
    "SOF_LS",
    "Codestream",
    "inspect",
    "rle_segments",
    "starts_image",
]
