"""Layout of the pixel data as it really is.

Tags held against lengths, counts, codestreams and the samples themselves.

Uncompressed data are measured: how many bytes there are for each pixel says whether colours are subsampled, how many
channels and how many bits there are, and how many frames. Where a length fits two layouts, the first frame's samples
decide. Compressed frames say size, channels and depth in their own header. Every contradiction becomes a doubt; a
layout that fits nothing is refused. It decodes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from tinyusfm_runtime.errors import FrameError, SourceError
from tinyusfm_runtime.images.limits import MAX_FRAMES
from tinyusfm_runtime.sources.dicom import fragments
from tinyusfm_runtime.sources.dicom.codestream import FAMILIES, RLE, Codestream, inspect, rle_segments
from tinyusfm_runtime.sources.dicom.header import DicomHeader

NATIVE_LITTLE = "1.2.840.10008.1.2.1"
EXCHANGED = 1.5
"""So many times rougher than cut the other way, and the sides are exchanged; real images have at most 0.6."""
SAMPLE_BYTES = 1 << 20
"""So many bytes of the first frame are looked at."""
GREY_SHARE = 0.95
"""Share of pixels whose channels are alike, above which a colour image is taken for grey shown in colour."""
ALIKE = 3
"""Codes that differ by no more are alike."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the pixel data are to be decoded.

    Attributes:
        frames: whole frames that are there.
        promised: frames that the tags promise, or None.
        samples: channels per pixel.
        photometric: DICOM's name of the colour space.
        planar: True if each channel is a plane of its own.
        allocated: bits of a stored sample.
        stored: of these, bits in use.
        shift: bits below the lowest one in use.
        signed: samples may be negative.
        swapped: the bytes of each 16-bit word stand in the other order than the transfer syntax says.
        syntax: transfer syntax UID that fits the data.
        spans: place of each frame's fragments in the file; empty for uncompressed data.
        frame_bytes: of one uncompressed frame; 0 for compressed data.
        doubts: contradictions between tags and data, one line each.
    """

    frames: int
    promised: int | None
    samples: int
    photometric: str
    planar: bool
    allocated: int
    stored: int
    shift: int
    signed: bool
    swapped: bool = False
    syntax: str
    spans: tuple[tuple[fragments.Span, ...], ...] = ()
    frame_bytes: int = 0
    doubts: tuple[str, ...] = ()

    @property
    def encapsulated(self) -> bool:
        """True for compressed data."""
        return self.frame_bytes == 0

    @property
    def eight_bits(self) -> bool:
        """True if codes are 0..255 as they stand."""
        return self.stored == 8 and not self.signed

    def but(self, doubt: str, **changes: Any) -> Layout:
        """The same with something changed, and why."""
        return replace(self, doubts=(*self.doubts, doubt), **changes)


def find_layout(file: BinaryIO, header: DicomHeader) -> Layout:
    """Measures the pixel data.

    Args:
        file: the DICOM file.
        header: what its tags promise.

    Raises:
        SourceError: tags and data fit in no way.
    """
    layout = Layout(
        frames=0,
        promised=header.promised,
        samples=header.samples,
        photometric=header.photometric,
        planar=header.planar,
        allocated=header.allocated,
        stored=header.stored,
        shift=max(0, header.high + 1 - header.stored),
        signed=header.signed,
        syntax=str(header.syntax),
    )
    if not header.dataset.get("PhotometricInterpretation"):
        layout = layout.but(f"the file does not say what its samples mean: read as {header.photometric}")
    if header.length is None:
        found = _encapsulated(file, header, layout)
    else:
        if header.syntax.is_encapsulated:
            layout = layout.but("the file says its pixels are compressed, and they are not", syntax=NATIVE_LITTLE)
        found = _native(file, header, layout)
    if not 1 <= found.frames <= MAX_FRAMES:
        raise SourceError(f"the DICOM file holds {found.frames} whole frames")
    return _counted(found)


def _counted(layout: Layout) -> Layout:
    """Holds the count of frames against NumberOfFrames.

    Too few are reported when the file is read to its end.
    """
    if layout.promised is None and layout.frames > 1:
        return layout.but(f"the file does not say how many frames it has; it holds {layout.frames}, all are read")
    if layout.promised is not None and layout.frames > layout.promised:
        return layout.but(f"the DICOM file promises {layout.promised} frames and holds {layout.frames}: all are read")
    return layout


# compressed


def _encapsulated(file: BinaryIO, header: DicomHeader, layout: Layout) -> Layout:
    found = fragments.walk(file, header.offset)
    extended = _extended_offsets(header.dataset)
    frames = fragments.group(found, rle=layout.syntax == RLE, promised=header.promised, extended=extended)
    if not frames:
        raise SourceError("the pixel data of the DICOM file break off before the first whole frame")
    first = b"".join(fragments.read_frames(file, frames[:1]))
    frames = _drop_torn(file, frames, found.closed, layout.syntax)
    layout = replace(layout, frames=len(frames), spans=tuple(map(tuple, frames)))
    if layout.syntax == RLE and not first.startswith(b"\xff"):
        return _fit_rle(layout, first)
    stream = inspect(first)
    return layout if stream is None else fit_codestream(layout, stream, header)


def _drop_torn(
    file: BinaryIO, frames: list[list[fragments.Span]], closed: bool, syntax: str
) -> list[list[fragments.Span]]:
    """Leaves the last frame out where the file breaks off.

    Only if that frame lacks its end.
    """
    if closed or syntax == RLE:
        return frames
    last = inspect(b"".join(fragments.read_frames(file, frames[-1:])))
    return frames if last is not None and last.whole else frames[:-1]


def _extended_offsets(dataset: Any) -> tuple[int, ...]:
    table = dataset.get("ExtendedOffsetTable") or b""
    return tuple(int.from_bytes(table[at : at + 8], "little") for at in range(0, len(table) - 7, 8))


def _fit_rle(layout: Layout, first: bytes) -> Layout:
    segments, want = rle_segments(first), layout.samples * layout.allocated // 8
    if segments == want:
        return layout
    for samples, allocated in ((1, 8), (3, 8), (1, 16), (3, 16)):
        if segments == samples * allocated // 8 and (samples == layout.samples or allocated == layout.allocated):
            return _of_channels(layout, samples, "the RLE data").but(
                f"the tags promise {want} byte planes and the RLE data hold {segments}",
                allocated=allocated,
                stored=min(layout.stored, allocated),
            )
    raise SourceError(f"the RLE data hold {segments} byte planes, the tags promise {want}")


def fit_codestream(layout: Layout, stream: Codestream, header: DicomHeader) -> Layout:
    """Holds a compressed frame's own header against the tags.

    Args:
        layout: so far.
        stream: what the frame says.
        header: what the tags promise.

    Returns:
        The layout that fits the frame.

    Raises:
        FrameError: another size than the tags promise: a bomb, or damage.
    """
    if (stream.rows, stream.columns) != (header.rows, header.columns):
        raise FrameError(
            f"the {stream.family} says {stream.rows}x{stream.columns} rows x columns, the header says otherwise"
        )
    if layout.syntax not in FAMILIES[stream.family]:
        layout = layout.but(f"the file names another codec than its data have: {stream.family}", syntax=stream.syntax)
    if stream.channels not in (1, 3):
        raise FrameError(f"the {stream.family} has {stream.channels} channels: only 1 and 3 are read")
    if stream.channels != layout.samples:
        layout = _of_channels(layout, stream.channels, f"the {stream.family} frame")
    if stream.bits != layout.stored and (stream.bits > 8 or layout.stored > 8):
        allocated = 8 if stream.bits <= 8 else 16
        text = f"the tags say {layout.stored} bits and the {stream.family} frame has {stream.bits}"
        # a codestream of 16 bits around samples of 12 is usual and says nothing wrong
        if stream.bits < layout.stored or layout.stored <= 8:
            layout = layout.but(text, stored=stream.bits, allocated=allocated)
    return layout


# uncompressed


def _native(file: BinaryIO, header: DicomHeader, layout: Layout) -> Layout:
    pixels = header.rows * header.columns
    total, promised = int(header.length or 0), header.promised or 1
    if header.keyword != "PixelData":
        layout = replace(layout, allocated=32 if header.keyword == "FloatPixelData" else 64, stored=0, shift=0)
    start = _start_of(file, header, min(pixels * 6, SAMPLE_BYTES))
    layout = _measured(header, layout, total / (pixels * promised), start)
    layout = _sampled(header, _shifted(layout, start, little=header.syntax.is_little_endian), start)
    size = frame_bytes(layout, pixels)
    frames = header.available // size
    if frames == 0:
        raise SourceError(f"the DICOM file promises {size} bytes per frame and holds {header.available} of pixels")
    torn = header.available < total
    rest = total - frames * size
    if not torn and rest > 1:
        if frames < promised or rest > max(1024, size // 8):
            raise SourceError(
                f"the tags promise {promised} frames of {size} bytes and the pixel data have {total}: "
                "Rows, Columns, BitsAllocated or NumberOfFrames are wrong"
            )
        layout = layout.but(f"{rest} bytes more than the tags promise stand behind the last frame")
    return replace(layout, frames=frames, frame_bytes=size)


def frame_bytes(layout: Layout, pixels: int) -> int:
    """Bytes of one uncompressed frame (PS3.5 8.2; YBR_FULL_422 has 2 bytes per pixel)."""
    if layout.photometric == "YBR_FULL_422" and layout.samples == 3:
        return pixels * 2 * layout.allocated // 8
    return pixels * layout.samples * layout.allocated // 8


def _measured(header: DicomHeader, layout: Layout, bytes_a_pixel: float, start: np.ndarray) -> Layout:
    """Corrects the layout by the bytes there are for a pixel.

    Where those for a pixel of a promised frame say another one.
    """
    pixels = header.rows * header.columns
    want = frame_bytes(layout, pixels) / pixels
    ratio = bytes_a_pixel / want if want else 1.0
    several = header.promised is None or header.promised == 1
    if _near(ratio, 1.0):
        return layout
    if layout.photometric == "YBR_FULL_422" and (
        _near(ratio, 1.5) or (several and _near(ratio % 1.5, 0) and ratio > 1)
    ):
        space = "RGB" if _channels_alike(start, 3) >= _chroma_neutral(start) else "YBR_FULL"
        return layout.but(
            f"the tags say YBR_FULL_422, the data have 3 bytes per pixel: read as {space}", photometric=space
        )
    if layout.photometric in ("YBR_FULL", "YBR_ICT", "YBR_RCT") and _near(ratio, 2 / 3):
        return layout.but(
            "the tags say 3 bytes per pixel, the data have 2: read as YBR_FULL_422", photometric="YBR_FULL_422"
        )
    if layout.samples == 3 and _near(ratio, 1 / 3) and layout.allocated == 8:
        return _of_channels(layout, 1, "the pixel data")
    threes = several and ratio > 2.9 and _near(ratio % 3, 0)
    if layout.samples == 1 and layout.photometric != "PALETTE COLOR" and threes and _in_threes(start):
        return _of_channels(layout, 3, "the pixel data")
    if layout.allocated == 16 and _near(ratio, 0.5):
        return layout.but(
            "the tags say 16 bits per sample, the data have 8", allocated=8, stored=min(8, layout.stored), shift=0
        )
    if layout.allocated == 8 and several and _near(ratio, 2.0) and not start[1::2].any():
        return layout.but("the tags say 8 bits per sample, the data have 16", allocated=16)
    return layout


def _near(value: float, want: float) -> bool:
    return abs(value - want) < 0.002


def _of_channels(layout: Layout, samples: int, what: str) -> Layout:
    """The layout with another number of channels than the tags say."""
    text = f"the tags say {layout.samples} samples per pixel ({layout.photometric}), {what} have {samples}"
    space = "MONOCHROME2" if samples == 1 else layout.photometric if layout.photometric[:3] in ("RGB", "YBR") else "RGB"
    return layout.but(text, samples=samples, photometric=space, planar=False)


def _sampled(header: DicomHeader, layout: Layout, start: np.ndarray) -> Layout:
    """Corrects what only the samples themselves tell.

    Planes, colour space, byte order.
    """
    colour = layout.photometric[:3] in ("RGB", "YBR")
    if (layout.samples == 3) != colour:
        space = "RGB" if layout.samples == 3 else "MONOCHROME2"
        layout = layout.but(
            f"the tags say {layout.photometric} and {layout.samples} samples per pixel: read as {space}",
            photometric=space,
        )
    if layout.samples == 3 and layout.allocated == 8 and layout.photometric in ("RGB", "YBR_FULL"):
        layout = _colour(header, layout, start)
    if layout.allocated == 16 and 8 < layout.stored < 16 and header.keyword == "PixelData":
        layout = _byte_order(header, layout, start)
    return layout


def _colour(header: DicomHeader, layout: Layout, start: np.ndarray) -> Layout:
    plane = header.rows * header.columns
    by_pixel = _channels_alike(start, 3)
    by_plane = _planes_alike(start, plane)
    if not layout.planar and by_plane > GREY_SHARE and by_pixel < 0.9 * by_plane:
        return layout.but("the tags say colour by pixel, the data have it by plane", planar=True)
    if layout.planar and by_pixel > GREY_SHARE and by_plane < 0.9 * by_pixel:
        return layout.but("the tags say colour by plane, the data have it by pixel", planar=False)
    return layout


def _shifted(layout: Layout, start: np.ndarray, *, little: bool) -> Layout:
    """Corrects a HighBit that cannot be, or that the samples contradict (PS3.5 8.1.1)."""
    if layout.shift == 0 or layout.allocated > 16:
        return layout
    text = f"HighBit says that samples begin {layout.shift} bits up"
    if layout.stored + layout.shift > layout.allocated:
        return layout.but(f"{text}, which a sample of {layout.allocated} bits has no room for: left out", shift=0)
    words = start if layout.allocated == 8 else start[: len(start) // 2 * 2].view("<u2" if little else ">u2")
    below = words & ((1 << layout.shift) - 1)
    if below.any() and int(words.max()) < 1 << layout.stored:
        return layout.but(f"{text}, the samples begin at the lowest bit", shift=0)
    return layout


def exchanged(file: BinaryIO, header: DicomHeader) -> bool:
    """Whether an uncompressed image has as many rows as the tags say it has columns.

    Lines of an image are like their neighbours; cut at another length they are not.

    Args:
        file: the DICOM file.
        header: what its tags promise.
    """
    rows, columns = header.rows, header.columns
    unit = (1 if header.planar else header.samples) * header.allocated // 8
    frames = header.promised or 1
    if header.length is None or rows == columns or header.allocated not in (8, 16):
        return False
    if header.length // frames // (rows * columns) != header.samples * header.allocated // 8:
        return False  # another layout than promised: judged by its own rules
    start = _start_of(file, header, min(rows * columns * unit, SAMPLE_BYTES))
    if header.allocated == 16:
        start = start[: len(start) // 2 * 2].view("<u2" if header.syntax.is_little_endian else ">u2")
        unit //= 2
    as_told, other = (_step(start, side * unit) for side in (columns, rows))
    return other > 0.5 and as_told > EXCHANGED * other


def _step(start: np.ndarray, line: int) -> float:
    """Mean difference of samples that lie one line apart."""
    values = start.astype(np.int32)
    return float(np.abs(values[line:] - values[:-line]).mean()) if len(values) > 2 * line else 0.0


def _byte_order(header: DicomHeader, layout: Layout, start: np.ndarray) -> Layout:
    little = header.syntax.is_little_endian
    words = start[: len(start) // 2 * 2].view("<u2" if little else ">u2")
    limit = 1 << (layout.stored + layout.shift)
    if not layout.signed and len(words) and int(words.max()) >= limit > int(words.byteswap().max()):
        return layout.but("the bytes of each 16-bit word stand in the other order than the tags say", swapped=True)
    return layout


def _start_of(file: BinaryIO, header: DicomHeader, count: int) -> np.ndarray:
    """The first bytes of the pixel data, uint8.

    Of one whole frame where that is enough.
    """
    file.seek(header.offset)
    return np.frombuffer(file.read(min(count, header.available)), np.uint8)


def _channels_alike(start: np.ndarray, channels: int) -> float:
    """Share of pixels, not black, whose side-by-side channels are alike.

    Of the pixels that are not black; their channels stand side by side.
    """
    triples = start[: len(start) // channels * channels].reshape(-1, channels).astype(np.int16)
    lit = triples.max(axis=1) > ALIKE
    if not lit.any():
        return 1.0
    spread = triples[lit].max(axis=1) - triples[lit].min(axis=1)
    return float((spread <= ALIKE).mean())


def _in_threes(start: np.ndarray) -> bool:
    """True if bytes come in equal threes, as grey shown in colour does.

    Not if they only change slowly.
    """
    steps = start[1:].astype(np.int16) - start[:-1]
    lit = start[:-1] > ALIKE
    shares = []
    for phase in range(3):
        chosen = steps[phase::3][lit[phase::3]]
        shares.append(float((chosen == 0).mean()) if len(chosen) else 1.0)
    return min(shares[:2]) > GREY_SHARE and shares[2] < min(shares[:2]) - 0.2


def _chroma_neutral(start: np.ndarray) -> float:
    """Share of pixels whose second and third channel are near 128.

    As those of grey in YCbCr are.
    """
    triples = start[: len(start) // 3 * 3].reshape(-1, 3).astype(np.int16)
    if not len(triples):
        return 0.0
    return float((np.abs(triples[:, 1:] - 128).max(axis=1) <= ALIKE).mean())


def _planes_alike(start: np.ndarray, plane: int) -> float:
    """Share of pixels whose channels are alike when each is a plane.

    Of the pixels that are not black; 0 if unknown.
    """
    if len(start) < 3 * plane:
        return 0.0
    planes = start[: 3 * plane].reshape(3, plane).astype(np.int16)
    lit = planes.max(axis=0) > ALIKE
    if not lit.any():
        return 0.0
    spread = planes[:, lit].max(axis=0) - planes[:, lit].min(axis=0)
    return float((spread <= ALIKE).mean())


def looks_like(pixels_HWC: np.ndarray) -> str | None:
    """Colour space of three decoded channels where they show it.

    ``RGB``, ``YBR_FULL``, or None where they do not.

    Grey shown in colour has three channels alike in RGB, and two near 128 in YCbCr; most of an ultrasound image is.

    Args:
        pixels_HWC: uint8.
    """
    flat = np.ascontiguousarray(pixels_HWC[::3, ::3]).reshape(-1)
    alike, neutral = _channels_alike(flat, 3), _chroma_neutral(flat)
    if alike > GREY_SHARE > 2 * neutral:
        return "RGB"
    return "YBR_FULL" if neutral > GREY_SHARE > 2 * alike else None


__all__ = [
    "ALIKE",
    "EXCHANGED",
    "GREY_SHARE",
    "NATIVE_LITTLE",
    "SAMPLE_BYTES",
    "Layout",
    "exchanged",
    "find_layout",
    "fit_codestream",
    "frame_bytes",
    "looks_like",
]
