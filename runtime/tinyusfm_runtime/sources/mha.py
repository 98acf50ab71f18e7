"""Source for MetaImage sequences (``.mha``, PLUS's ``.igs.mha``).

Images with their times and orientation.

Raw and zlib-compressed data, grey or colour, inside the file itself; more than 8 bits need a window. The sequence is
decompressed as it is read, so memory holds one image; that all promised ones come, whole, and nothing behind them, is
checked and reported after the whole ones. Images that PLUS marked INVALID are left out and named in the notes.

An orientation whose rows grow towards the transducer (MN, UN) is obeyed: frames come with the transducer at the top.
Which side is the marked one is not changed: it stands in ``Frame.orientation``. Lines before scan conversion
(UltrasoundImageType RF_...) are refused.

An ElementSpacing of exactly 1 both ways is what PLUS writes when it knows no millimetres, and counts as unknown. A
transform ImageToCroppedImage that only shifts tells where these pixels lay in the whole image (``Frame.crop``). Other
transforms, positions of tools among them, are not read.
"""

from __future__ import annotations

import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinyusfm_runtime.errors import FrameError, IncompleteError, SourceError, UnsupportedError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.images.limits import MAX_FRAMES, check_frames, check_image, check_unpacked
from tinyusfm_runtime.images.window import Window, apply_window, check_window, needs_window
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.sources._source import ReportingSource
from tinyusfm_runtime.sources._spacing import SpacingRule

MAX_HEADER_BYTES = 32 << 20
"""PLUS writes a kilobyte of transforms for each image."""
MAX_FIELDS = 4096
"""Fields of the whole file; those of single images come on top."""
MAX_LINE_BYTES = 1 << 16
CHUNK_BYTES = 1 << 16
PIECE_BYTES = 1 << 20
DEFLATE_RATIO = 1032
"""No deflated byte stands for more (RFC 1951: 258 bytes take 2 bits)."""
UNKNOWN_SPACING = (1.0, 1.0)
TYPES = {
    "MET_UCHAR": "u1", "MET_CHAR": "i1", "MET_USHORT": "u2", "MET_SHORT": "i2", "MET_UINT": "u4", "MET_INT": "i4",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
"""ElementType -> numpy's name."""
IMAGE_TYPES = ("BRIGHTNESS", "RGB_COLOR", "")
"""PLUS's image types that are images; the others are lines before scan conversion."""
FORMATS = {1: PixelFormat.GREY, 3: PixelFormat.RGB, 4: PixelFormat.RGBA}
FRAME_FIELD = re.compile(r"Seq_Frame(\d{1,9})_(Timestamp|ImageStatus|ImageToCroppedImageTransform)")


@dataclass(frozen=True, kw_only=True, slots=True)
class MhaHeader:
    """What stands in front of the data.

    Attributes:
        rows: of each image.
        columns: of each image.
        frames: how many images.
        channels: bytes per pixel.
        compressed: the data is one zlib stream.
        data_offset: where it begins in the file, bytes.
        spacing_mm: (row, column), mm, or None.
        orientation: PLUS letters, or None.
        times_s: image -> its Timestamp, s.
        invalid: images marked so.
        shifts: image -> (row, column) of its first pixel in the whole image.
        dtype: of one sample, in the file's byte order.
        notes: what is obeyed, one line each.
        doubts: where the header contradicts itself or the file, one line each.
    """

    rows: int
    columns: int
    frames: int
    channels: int
    compressed: bool
    data_offset: int
    spacing_mm: tuple[float, float] | None
    orientation: str | None
    times_s: Mapping[int, float] = field(default_factory=dict)
    invalid: frozenset[int] = frozenset()
    shifts: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return self.rows * self.columns * self.channels * self.dtype.itemsize


def available() -> Availability:
    """Always works: standard library and numpy."""
    return Availability(usable=True, reason="MetaImage, raw and zlib", extra=None)


def accepts(location: str) -> bool:
    """True for the suffix ``.mha``."""
    return location.startswith("mha:") or Path(location).suffix.lower() == ".mha"


def open_source(
    location: str, *, spacing_mm: tuple[float, float] | None = None, window: Window | None = None
) -> MhaSource:
    """Reads the header; no image is read yet.

    Args:
        location: the file, with or without ``mha:`` in front.
        spacing_mm: (row, column) spacing that overrules the file's, mm, or None.
        window: (code that becomes 0, code that becomes 255) for other types than MET_UCHAR, or None to refuse them.

    Returns:
        The source.

    Raises:
        InputError: the window has no two ends.
        SourceError: not there, damaged, or contradicting itself.
        UnsupportedError: more than 8 bits without a window, lines before scan conversion, or data outside the file.
    """
    if window is not None:
        check_window(window)
    path = Path(location.removeprefix("mha:"))
    try:
        with path.open("rb") as file:
            header = read_header(file)
            size = path.stat().st_size
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no usable path"
        raise SourceError(f"the MetaImage file cannot be read: {reason}") from error
    if header.dtype != np.uint8 and window is None:
        raise UnsupportedError(str(needs_window(f"MetaImage of {header.dtype}")))
    there = size - header.data_offset
    if header.compressed:
        _check_bomb(header, there)
    elif there < header.image_bytes:
        raise SourceError(f"the MetaImage file holds {there} bytes of images, one takes {header.image_bytes}")
    return MhaSource(path, header, spacing_mm, window)


def _check_bomb(header: MhaHeader, packed_bytes: int) -> None:
    """Holds what is promised against what so many compressed bytes can hold.

    Nothing is unpacked for that.
    """
    if header.image_bytes > DEFLATE_RATIO * (packed_bytes + 1):
        raise SourceError(
            f"the MetaImage file holds {packed_bytes} compressed bytes, which cannot be an image of "
            f"{header.image_bytes}"
        )
    try:
        check_unpacked(header.image_bytes * header.frames, packed_bytes)
        check_frames(header.frames, header.image_bytes * header.frames, packed_bytes)
    except FrameError as error:
        raise SourceError(f"the MetaImage file: {error}") from error


class MhaSource(ReportingSource):
    """Reads one image at a time; ``seq`` is the image's number in the file."""

    def __init__(
        self, path: Path, header: MhaHeader, spacing_mm: tuple[float, float] | None, window: Window | None = None
    ) -> None:
        self._path, self.header, self.window = path, header, window
        self.spacing_mm = spacing_mm or header.spacing_mm
        super().__init__(header.notes, header.doubts)
        self._rule = SpacingRule(spacing_mm, self.findings)
        if self.spacing_mm is None:
            self.findings.note(
                "the MetaImage file gives no spacing in mm: measurements are in pixels; --spacing MM gives millimetres"
            )
        if header.invalid:
            self.findings.note(f"{len(header.invalid)} of {header.frames} images are marked invalid and are left out")
        if window is not None and header.dtype == np.uint8:
            self.findings.note("the images have 8 bits: the window is not applied")

    def __len__(self) -> int:
        return self.header.frames - len(self.header.invalid)

    def __iter__(self) -> Iterator[Frame]:
        head = self.header
        shape = (head.rows, head.columns) if head.channels == 1 else (head.rows, head.columns, head.channels)
        size, good = head.image_bytes, 0
        try:
            with self._path.open("rb") as file:
                file.seek(head.data_offset)
                data = Inflated(file) if head.compressed else file
                for seq in range(head.frames):
                    image = data.read(size)
                    if len(image) != size:
                        raise SourceError(
                            f"the MetaImage file promises {head.frames} images but holds {seq} whole ones"
                        )
                    if seq not in head.invalid:
                        frame = self._frame(np.frombuffer(image, head.dtype).reshape(shape), seq)
                        good += 1
                        yield frame
                if data.read(1):
                    raise SourceError(f"the MetaImage file promises {head.frames} images but holds more")
        except OSError as error:
            raise SourceError(f"the MetaImage file cannot be read: {error.strerror}") from error
        except SourceError as error:
            raise (IncompleteError if good else SourceError)(str(error)) from error

    def _frame(self, pixels: np.ndarray, seq: int) -> Frame:
        head, shift = self.header, self.header.shifts.get(seq)
        time_s = head.times_s.get(seq)
        orientation = head.orientation
        try:
            if head.dtype != np.uint8:
                assert self.window is not None
                pixels = apply_window(pixels, self.window)
            if orientation is not None and orientation[1] == "N":
                # where the pixels lay in the whole image is not known upside down: its height is not stated
                pixels, orientation, shift = pixels[::-1], orientation[0] + "F", None
            return Frame(
                pixels=pixels,
                pixel_format=FORMATS[head.channels],
                spacing_mm=self._rule.of(pixels.shape, head.spacing_mm),
                seq=seq,
                t_source_ns=None if time_s is None else round(time_s * 1e9),
                t_recv_ns=time.monotonic_ns(),
                orientation=orientation,
                crop=None if shift is None else (*shift, head.rows, head.columns),
            )
        except FrameError as error:
            raise SourceError(f"image {seq} of the MetaImage file: {error}") from error


class Inflated:
    """A zlib stream in a file, read in pieces that are asked for.

    Never more than that is in memory.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._stream = file, zlib.decompressobj()

    def read(self, count: int) -> bytes | bytearray:
        """So many bytes, fewer only at the end.

        Raises:
            SourceError: the stream is damaged or breaks off.
        """
        found = bytearray()
        while count > 0 and not self._stream.eof:
            fed = self._stream.unconsumed_tail or self._file.read(CHUNK_BYTES)
            try:
                piece = self._stream.decompress(fed, min(count, PIECE_BYTES))
            except zlib.error as error:
                raise SourceError("the compressed images of the MetaImage file are damaged") from error
            if not fed and not piece:
                raise SourceError("the compressed images of the MetaImage file break off")
            found += piece
            count -= len(piece)
        return found


def read_header(file: BinaryIO) -> MhaHeader:
    """Reads the text in front of the data and checks it.

    Args:
        file: at its beginning.

    Returns:
        The header.

    Raises:
        SourceError: damaged, or contradicting itself.
        UnsupportedError: a kind of MetaImage that is not read.
    """
    fields: dict[str, str] = {}
    per_frame: dict[str, dict[int, str]] = {"Timestamp": {}, "ImageStatus": {}, "ImageToCroppedImageTransform": {}}
    while "ElementDataFile" not in fields:
        line = file.readline(MAX_LINE_BYTES)
        name, equals, value = (part.strip() for part in line.decode("latin-1").partition("="))
        if not line.endswith(b"\n") or not equals or file.tell() > MAX_HEADER_BYTES:
            raise SourceError("the MetaImage header is damaged or breaks off")
        if name.startswith("Seq_Frame"):
            if match := FRAME_FIELD.fullmatch(name):
                per_frame[match[2]][int(match[1])] = value
            continue
        fields[name] = value
        if len(fields) > MAX_FIELDS:
            raise SourceError(f"the MetaImage header has more than {MAX_FIELDS} fields")
    if fields["ElementDataFile"] != "LOCAL":
        raise UnsupportedError("MetaImage with its images in another file: write it as one .mha file")
    if fields.get("UltrasoundImageType", "").upper() not in IMAGE_TYPES:
        raise UnsupportedError("the MetaImage file holds lines before scan conversion (RF): scan-convert them first")
    if fields.get("BinaryData", "True").lower() == "false":
        raise UnsupportedError("MetaImage with its images as text: write it with BinaryData = True")
    if fields.get("HeaderSize", "0") != "0":
        raise UnsupportedError("MetaImage with a HeaderSize of its own: write it as one .mha file")
    rows, columns, frames, channels = _sizes(fields)
    return MhaHeader(
        rows=rows,
        columns=columns,
        frames=frames,
        channels=channels,
        compressed=fields.get("CompressedData", "False").lower() == "true",
        dtype=_dtype(fields),
        data_offset=file.tell(),
        notes=_notes(fields),
        doubts=_doubts(fields, per_frame, frames, file),
        spacing_mm=_spacing(fields),
        orientation=_orientation(fields.get("UltrasoundImageOrientation", "")),
        times_s=_times(per_frame["Timestamp"]),
        invalid=frozenset(seq for seq, text in per_frame["ImageStatus"].items() if text != "OK" and seq < frames),
        shifts=_shifts(per_frame["ImageToCroppedImageTransform"]),
    )


def _dtype(fields: Mapping[str, str]) -> np.dtype[Any]:
    kind = fields.get("ElementType", "")
    if kind not in TYPES:
        raise UnsupportedError(f"MetaImage of type {kind[:20]} is not read: write it as MET_UCHAR")
    high_first = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False")).lower() == "true"
    return np.dtype((">" if high_first else "<") + TYPES[kind]).newbyteorder(">" if high_first else "<")


def _notes(fields: Mapping[str, str]) -> tuple[str, ...]:
    orientation = _orientation(fields.get("UltrasoundImageOrientation", ""))
    if orientation is None or orientation[1] != "N":
        return ()
    return (
        f"orientation {orientation}: the transducer is at the bottom; the frames are turned so that it is at the top",
    )


def _doubts(
    fields: Mapping[str, str], per_frame: Mapping[str, Mapping[int, str]], frames: int, file: BinaryIO
) -> tuple[str, ...]:
    """Where the header contradicts itself or the length of the file."""
    found = []
    described = 1 + max((number for texts in per_frame.values() for number in texts), default=-1)
    if described not in (0, frames):
        found.append(f"the MetaImage header promises {frames} images and describes {described}")
    packed = fields.get("CompressedDataSize", "")
    there = os.fstat(file.fileno()).st_size - file.tell() if packed.isdecimal() else 0
    if packed.isdecimal() and int(packed) not in (0, there):
        found.append(f"the MetaImage header promises {packed} compressed bytes and the file holds {there}")
    return tuple(found)


def _sizes(fields: Mapping[str, str]) -> tuple[int, int, int, int]:
    try:
        sizes = [int(part) for part in fields["DimSize"].split()]
        channels = int(fields.get("ElementNumberOfChannels", "1"))
    except (KeyError, ValueError) as error:
        raise SourceError("the MetaImage header gives no size") from error
    if len(sizes) == 4 and sizes[2] == 1:
        sizes = [sizes[0], sizes[1], sizes[3]]
    columns, rows, frames = (*sizes, 1) if len(sizes) == 2 else sizes if len(sizes) == 3 else (0, 0, 0)
    if not (8 <= rows <= 16384 and 8 <= columns <= 16384 and 1 <= frames <= MAX_FRAMES) or channels not in FORMATS:
        raise SourceError(
            f"the MetaImage header: sides must be 8 to 16384, images at most {MAX_FRAMES}, channels 1, 3 or 4"
        )
    try:
        check_image(rows, columns, channels * _dtype(fields).itemsize)
    except FrameError as error:
        raise SourceError(f"the MetaImage header: {error}") from error
    return rows, columns, frames, channels


def _spacing(fields: Mapping[str, str]) -> tuple[float, float] | None:
    numbers = _numbers(fields.get("ElementSpacing") or fields.get("ElementSize") or "")
    if len(numbers) < 2 or (numbers[1], numbers[0]) == UNKNOWN_SPACING:
        return None
    if not all(1e-4 < side < 100 for side in numbers[:2]):
        raise SourceError("the MetaImage header: ElementSpacing must lie between 0.0001 and 100 mm")
    return numbers[1], numbers[0]


def _orientation(text: str) -> str | None:
    """Two PLUS letters; a third one (A, D, ...) is about stacks of slices."""
    return text[:2] if re.fullmatch(r"[MU][FN][AD]?", text) else None


def _times(texts: Mapping[int, str]) -> dict[int, float]:
    found = {seq: _numbers(text) for seq, text in texts.items()}
    return {seq: numbers[0] for seq, numbers in found.items() if len(numbers) == 1 and 0 <= numbers[0] < 4.2e9}


def _shifts(texts: Mapping[int, str]) -> dict[int, tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    for seq, text in texts.items():
        numbers = _numbers(text)
        if len(numbers) != 16:
            continue
        right, down = numbers[3], numbers[7]
        still = [*numbers[:3], *numbers[4:7], *numbers[8:]] == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1]
        if still and right <= 0 and down <= 0 and right == int(right) and down == int(down):
            found[seq] = (-int(down), -int(right))
    return found


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split()]
    except ValueError:
        return []
    return numbers if all(np.isfinite(number) for number in numbers) else []


__all__ = [
    "CHUNK_BYTES",
    "DEFLATE_RATIO",
    "FORMATS",
    "FRAME_FIELD",
    "IMAGE_TYPES",
    "MAX_FIELDS",
    "MAX_HEADER_BYTES",
    "MAX_LINE_BYTES",
    "PIECE_BYTES",
    "TYPES",
    "UNKNOWN_SPACING",
    "Inflated",
    "MhaHeader",
    "MhaSource",
    "accepts",
    "available",
    "open_source",
    "read_header",
]
