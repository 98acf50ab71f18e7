"""Source for MetaImage sequences (``.mha``, PLUS's ``.igs.mha``): pictures with their times and orientation.

Raw and zlib-compressed data, 8 bits, grey or colour, inside the file itself. The sequence is decompressed as it is
read, so memory holds one picture; that all promised ones come, whole, and nothing behind them, is checked.
Pictures that PLUS marked INVALID are left out and named in the notes.

An ElementSpacing of exactly 1 both ways is what PLUS writes when it knows no millimetres, and counts as unknown. A
transform ImageToCroppedImage that only shifts tells where these pixels lay in the whole picture (``Frame.crop``). Other
transforms, positions of tools among them, are not read.
"""

from __future__ import annotations

import re
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from tinyusfm_runtime.errors import FrameError, SourceError, UnsupportedError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.plugins import Probe

MAX_HEADER_BYTES = 64 << 20
"""PLUS writes a kilobyte of transforms for each picture."""
MAX_LINE_BYTES = 1 << 16
MAX_FRAMES = 1_000_000
CHUNK_BYTES = 1 << 16
UNKNOWN_SPACING = (1.0, 1.0)
FORMATS = {1: PixelFormat.GREY, 3: PixelFormat.RGB, 4: PixelFormat.RGBA}
FRAME_FIELD = re.compile(r"Seq_Frame(\d{1,9})_(Timestamp|ImageStatus|ImageToCroppedImageTransform)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What stands in front of the data.

    Attributes:
        rows: of each picture.
        columns: of each picture.
        frames: how many pictures.
        channels: bytes a pixel.
        compressed: the data is one zlib stream.
        data_offset: where it begins in the file, bytes.
        spacing_mm: (row, column), mm, or None.
        orientation: PLUS letters, or None.
        times_s: picture -> its Timestamp, s.
        invalid: pictures marked so.
        shifts: picture -> (row, column) of its first pixel in the whole picture.
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


def probe() -> Probe:
    """Always works: standard library and numpy."""
    return Probe(works=True, reason="MetaImage, raw and zlib", extra=None)


def accepts(location: str) -> bool:
    """True for the suffix ``.mha``."""
    return location.startswith("mha:") or Path(location).suffix.lower() == ".mha"


def open_source(location: str, *, spacing_mm: tuple[float, float] | None = None) -> MhaSource:
    """Reads the header; no picture is read yet.

    Args:
        location: the file, with or without ``mha:`` in front.
        spacing_mm: (row, column) spacing that overrules the file's, mm, or None.

    Returns:
        The source.

    Raises:
        SourceError: not there, damaged, or contradicting itself.
        UnsupportedError: another pixel type than 8 bits, or data outside the file.
    """
    path = Path(location.removeprefix("mha:"))
    try:
        with path.open("rb") as file:
            header = read_header(file)
            size = path.stat().st_size
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no usable path"
        raise SourceError(f"the MetaImage file cannot be read: {reason}") from error
    whole = header.rows * header.columns * header.channels * header.frames
    if not header.compressed and size - header.data_offset != whole:
        raise SourceError(f"the MetaImage file holds {size - header.data_offset} bytes of pictures instead of {whole}")
    return MhaSource(path, header, spacing_mm)


class MhaSource:
    """Reads one picture at a time; ``seq`` is the picture's number in the file."""

    def __init__(self, path: Path, header: Header, spacing_mm: tuple[float, float] | None) -> None:
        self._path, self.header = path, header
        self.spacing_mm = spacing_mm or header.spacing_mm
        notes = [] if self.spacing_mm else ["the MetaImage file gives no spacing in mm: measurements are in pixels"]
        if header.invalid:
            notes.append(f"{len(header.invalid)} of {header.frames} pictures are marked invalid and are left out")
        self.notes: tuple[str, ...] = tuple(notes)

    def __enter__(self) -> MhaSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __len__(self) -> int:
        return self.header.frames - len(self.header.invalid)

    def __iter__(self) -> Iterator[Frame]:
        head = self.header
        shape = (head.rows, head.columns) if head.channels == 1 else (head.rows, head.columns, head.channels)
        size = head.rows * head.columns * head.channels
        try:
            with self._path.open("rb") as file:
                file.seek(head.data_offset)
                data = Inflated(file) if head.compressed else file
                for seq in range(head.frames):
                    picture = data.read(size)
                    if len(picture) != size:
                        raise SourceError(
                            f"the MetaImage file promises {head.frames} pictures but holds {seq} whole ones"
                        )
                    if seq not in head.invalid:
                        yield self._frame(np.frombuffer(picture, np.uint8).reshape(shape), seq)
                if data.read(1):
                    raise SourceError(f"the MetaImage file promises {head.frames} pictures but holds more")
        except OSError as error:
            raise SourceError(f"the MetaImage file cannot be read: {error.strerror}") from error

    def _frame(self, pixels: np.ndarray, seq: int) -> Frame:
        head, shift = self.header, self.header.shifts.get(seq)
        time_s = head.times_s.get(seq)
        try:
            return Frame(
                pixels=pixels,
                pixel_format=FORMATS[head.channels],
                spacing_mm=self.spacing_mm,
                seq=seq,
                t_source_ns=None if time_s is None else round(time_s * 1e9),
                t_recv_ns=time.monotonic_ns(),
                orientation=head.orientation,
                crop=None if shift is None else (*shift, head.rows, head.columns),
            )
        except FrameError as error:
            raise SourceError(f"picture {seq} of the MetaImage file: {error}") from error


class Inflated:
    """A zlib stream in a file, read in pieces that are asked for; never more than that is in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._stream = file, zlib.decompressobj()

    def read(self, count: int) -> bytes:
        """So many bytes, fewer only at the end.

        Raises:
            SourceError: the stream is damaged or breaks off.
        """
        pieces: list[bytes] = []
        while count > 0 and not self._stream.eof:
            fed = self._stream.unconsumed_tail or self._file.read(CHUNK_BYTES)
            try:
                piece = self._stream.decompress(fed, count)
            except zlib.error as error:
                raise SourceError("the compressed pictures of the MetaImage file are damaged") from error
            if not fed and not piece:
                raise SourceError("the compressed pictures of the MetaImage file break off")
            pieces.append(piece)
            count -= len(piece)
        return b"".join(pieces)


def read_header(file: BinaryIO) -> Header:
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
        match = FRAME_FIELD.fullmatch(name)
        if match:
            per_frame[match[2]][int(match[1])] = value
        elif not name.startswith("Seq_Frame"):
            fields[name] = value
    if fields["ElementDataFile"] != "LOCAL":
        raise UnsupportedError("MetaImage with its pictures in another file: write it as one .mha file")
    kind = fields.get("ElementType")
    if kind != "MET_UCHAR":
        raise UnsupportedError("MetaImage of another type than MET_UCHAR: window it to 8 bits first")
    rows, columns, frames, channels = _sizes(fields)
    return Header(
        rows=rows,
        columns=columns,
        frames=frames,
        channels=channels,
        compressed=fields.get("CompressedData", "False").lower() == "true",
        data_offset=file.tell(),
        spacing_mm=_spacing(fields),
        orientation=_orientation(fields.get("UltrasoundImageOrientation", "")),
        times_s=_times(per_frame["Timestamp"]),
        invalid=frozenset(seq for seq, text in per_frame["ImageStatus"].items() if text != "OK" and seq < frames),
        shifts=_shifts(per_frame["ImageToCroppedImageTransform"]),
    )


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
            "the MetaImage header: sides must be 8 to 16384, pictures at most a million, channels 1, 3 or 4"
        )
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
    "FORMATS",
    "FRAME_FIELD",
    "MAX_FRAMES",
    "MAX_HEADER_BYTES",
    "MAX_LINE_BYTES",
    "UNKNOWN_SPACING",
    "Header",
    "Inflated",
    "MhaSource",
    "accepts",
    "open_source",
    "probe",
    "read_header",
]
