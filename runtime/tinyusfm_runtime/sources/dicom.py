"""Source for DICOM: single pictures and cines, decoded one frame at a time by pydicom.

What reading means here, and where it stops:

* MONOCHROME2 is handed over as it is, MONOCHROME1 inverted (its 0 means white), PALETTE COLOR
  through its table, RGB as it is. YBR_* becomes RGB: that is part of decoding the file, as the
  standard defines it (PS3.3 C.7.6.3.1.2), not a colour conversion of ours.
* 8-bit pictures only; window 16-bit ones first. Deflated files and DICOM video are refused.
* Every frame that the header promises must come, whole. pydicom stops silently when a compressed
  file breaks off and decodes half a JPEG without complaint, so the fragments are walked and each
  JPEG's size and end are checked here.
* Spacing comes from SequenceOfUltrasoundRegions (centimetres per pixel), else PixelSpacing. A file
  whose region does not fit its own picture was resized after acquisition; its spacing is not used.

It knows neither patient nor study: only the tags named below are read. pydicom's log and warnings
are silenced while it works, since they quote element values.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from tinyusfm_runtime.errors import EdgeError, FrameError, MissingExtra, SourceError, UnsupportedError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.plugins import Probe

SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
MAX_FILE_BYTES = 4 << 30
"""A file above this is refused unread."""
MAX_SIDE = 16384
MAX_FRAMES = 100_000
MAX_SAMPLES = 1 << 37
"""rows * columns * channels * frames; 20 minutes of 1080p colour at 30 frames a second fit."""
DECODERS = ("pillow", "pydicom", "pylibjpeg", "gdcm")
"""Preference, fixed because decoders differ by a few codes on the same JPEG."""
CENTIMETRE = 3
"""PhysicalUnitsXDirection code for cm (PS3.3 C.8.5.5.1.15)."""
TISSUE_2D = 1
"""RegionSpatialFormat code for 2D (PS3.3 C.8.5.5.1.1)."""
TAGS = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing", "FrameTime", "FrameTimeVector",
    "SequenceOfUltrasoundRegions", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What is needed to decode the frames; nothing about the patient.

    Attributes:
        rows: rows of each frame.
        columns: columns of each frame.
        frames: how many the file promises.
        samples: channels per pixel as stored.
        photometric: as stored.
        syntax: transfer syntax UID (pydicom's type).
        pixel_offset: byte position of the PixelData element.
        dataset: the tags above, for the palette.
    """

    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    syntax: Any
    pixel_offset: int
    dataset: Any


def probe() -> Probe:
    """Works where pydicom is installed; says which JPEG decoder it has."""
    try:
        import pydicom
        from pydicom.pixels import get_decoder

        found = get_decoder(pydicom.uid.JPEGBaseline8Bit).available_plugins
    except ImportError:
        return Probe(works=False, reason="pydicom is not installed", extra="dicom")
    except Exception as error:  # a broken installation may raise anything
        return Probe(works=False, reason=f"pydicom is broken: {type(error).__name__}", extra="dicom")
    jpeg = next((name for name in DECODERS if name in found), None)
    decoder = f"JPEG by {jpeg}" if jpeg else "no JPEG decoder: compressed files cannot be read"
    return Probe(works=True, reason=f"pydicom {pydicom.__version__}, {decoder}", extra="dicom")


def accepts(location: str) -> bool:
    """True for a DICOM suffix or a file with ``DICM`` at byte 128."""
    if location.startswith("dicom:") or Path(location).suffix.lower() in SUFFIXES:
        return True
    try:
        with Path(location).open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError):
        return False


def open_source(location: str, *, spacing_mm: tuple[float, float] | None = None, region: bool = False) -> DicomSource:
    """Reads the header and refuses what cannot be read; no pixel is decoded yet.

    Args:
        location: the file, with or without ``dicom:`` in front.
        spacing_mm: (row, column) spacing that overrules the file's, mm, or None.
        region: True crops every frame to the file's largest ultrasound region.

    Returns:
        The source.

    Raises:
        SourceError: not a DICOM file, damaged, too large or of a kind that is refused.
        MissingExtra: pydicom or the decoder for this file is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        raise MissingExtra("reading DICOM", "pydicom", "dicom") from error
    path = Path(location.removeprefix("dicom:"))
    with _mapped("the DICOM header cannot be read"):
        header = _read_header(pydicom, path)
        decoder = _choose_decoder(header.syntax)
    with _mapped("the ultrasound regions cannot be read"):
        own_spacing, box, notes = _geometry(header)
    if region and box is None:
        raise SourceError("the DICOM file marks no ultrasound region that fits its picture: give crop in pixels")
    return DicomSource(
        path=path,
        header=header,
        decoder=decoder,
        spacing_mm=spacing_mm or own_spacing,
        region=box if region else None,
        notes=() if spacing_mm else notes,
    )


class DicomSource:
    """Decodes frame by frame; memory holds two frames at most."""

    def __init__(
        self,
        *,
        path: Path,
        header: Header,
        decoder: str,
        spacing_mm: tuple[float, float] | None,
        region: tuple[int, int, int, int] | None,
        notes: tuple[str, ...],
    ) -> None:
        self._path, self.header, self.decoder = path, header, decoder
        self.spacing_mm, self.region, self.notes = spacing_mm, region, notes
        self._period_ns = _frame_times_ns(header)

    def __enter__(self) -> DicomSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def __len__(self) -> int:
        return self.header.frames

    @property
    def path(self) -> Path:
        """The file; for objects that refer to it, never for messages."""
        return self._path

    def __iter__(self) -> Iterator[Frame]:
        # nothing is silenced while a frame is out: the caller's own warnings are its own
        with _opened(self._path) as file:
            encoded = _encapsulated if self.header.syntax.is_encapsulated else _native
            pieces = encoded(file, self.header)
            for seq in range(self.header.frames):
                with _mapped(f"frame {seq} of {self.header.frames} (from 0) cannot be decoded"):
                    data = next(pieces, None)
                    if data is None:
                        raise SourceError(
                            f"the DICOM file promises {self.header.frames} frames but holds {seq} whole ones"
                        )
                    frame = self._frame(self._decode(data), seq)
                yield frame
            with _mapped("the end of the DICOM file cannot be read"):
                if next(pieces, None) is not None:
                    raise SourceError(f"the DICOM file promises {self.header.frames} frames but holds more")

    def _decode(self, data: bytes) -> np.ndarray:
        from pydicom.encaps import encapsulate
        from pydicom.pixels import apply_color_lut, get_decoder

        head = self.header
        options: dict[str, Any] = {
            "rows": head.rows,
            "columns": head.columns,
            "number_of_frames": 1,
            "samples_per_pixel": head.samples,
            "photometric_interpretation": head.photometric,
            "planar_configuration": int(head.dataset.get("PlanarConfiguration") or 0),
            "bits_allocated": 8,
            "bits_stored": 8,
            "pixel_representation": 0,
            "pixel_keyword": "PixelData",
            "as_rgb": True,
        }
        source = encapsulate([data], has_bot=False) if head.syntax.is_encapsulated else data
        decoder = get_decoder(head.syntax)
        pixels, _ = decoder.as_array(source, index=0, validate=True, decoding_plugin=self.decoder, **options)
        if head.photometric == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, head.dataset)
            if pixels.dtype != np.uint8:
                pixels = (pixels >> 8).astype(np.uint8)
            pixels = pixels[..., :3]
        if head.photometric == "MONOCHROME1":
            pixels = 255 - pixels
        return np.ascontiguousarray(pixels)

    def _frame(self, pixels: np.ndarray, seq: int) -> Frame:
        if pixels.shape[:2] != (self.header.rows, self.header.columns):
            raise FrameError(f"decodes to {pixels.shape[:2]} rows x columns, the header says otherwise")
        if self.region is not None:
            row, col, height, width = self.region
            pixels = pixels[row : row + height, col : col + width]
        return Frame(
            pixels=pixels,
            pixel_format=PixelFormat.GREY if pixels.ndim == 2 else PixelFormat.RGB,
            spacing_mm=self.spacing_mm,
            seq=seq,
            t_source_ns=None if self._period_ns is None else self._period_ns[seq],
            t_recv_ns=time.monotonic_ns(),
            crop=self.region,
        )


def _opened(path: Path) -> BinaryIO:
    with _mapped("the DICOM file cannot be read"):
        return path.open("rb")


@contextmanager
def _mapped(what: str) -> Iterator[None]:
    """The one place where pydicom's errors become ours; it raises almost anything on damaged files."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FrameError as error:
        raise SourceError(f"{what}: {error}") from error
    except EdgeError:
        raise
    except OSError as error:
        raise SourceError(f"{what}: {error.strerror or 'it breaks off'}") from error
    except Exception as error:
        raise SourceError(f"{what}: damaged or not DICOM ({type(error).__name__})") from error
    finally:
        logger.disabled = before


def _read_header(pydicom: Any, path: Path) -> Header:
    if not path.is_file():
        raise SourceError("the DICOM file does not exist")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise SourceError(f"the DICOM file is larger than {MAX_FILE_BYTES >> 30} GiB")
    meta = pydicom.filereader.read_file_meta_info(path)
    syntax = meta.get("TransferSyntaxUID")
    if syntax is None:
        raise SourceError("the file carries no DICOM transfer syntax: not a DICOM file, or cut off")
    if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
        raise SourceError("deflated DICOM is refused (it can unpack to any size): re-save it uncompressed")
    with path.open("rb") as file:
        dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
        offset = file.tell()
    try:
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.SamplesPerPixel)
        depth = int(dataset.BitsAllocated), int(dataset.BitsStored), int(dataset.get("PixelRepresentation") or 0)
        photometric = str(dataset.PhotometricInterpretation)
    except (AttributeError, TypeError, ValueError) as error:
        raise SourceError("the DICOM file holds no picture, or its picture tags are damaged") from error
    if depth != (8, 8, 0):
        raise SourceError(f"{depth[1]}-bit DICOM: only unsigned 8-bit pictures are read, window it to 8 bits first")
    if not (8 <= rows <= MAX_SIDE and 8 <= columns <= MAX_SIDE):
        raise SourceError(f"DICOM picture of {rows}x{columns} rows x columns: each side must be 8 to {MAX_SIDE}")
    if not 1 <= frames <= MAX_FRAMES or rows * columns * samples * frames > MAX_SAMPLES:
        raise SourceError(
            f"the DICOM file promises {frames} frames of {rows}x{columns}: too many ({MAX_FRAMES} at most)"
        )
    if samples != (1 if photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR") else 3):
        raise SourceError(f"DICOM photometric interpretation with {samples} samples per pixel is not read")
    return Header(
        rows=rows, columns=columns, frames=frames, samples=samples, photometric=photometric,
        syntax=syntax, pixel_offset=offset, dataset=dataset,
    )  # fmt: skip


def _choose_decoder(syntax: Any) -> str:
    """Name of pydicom's plug-in for a transfer syntax, or "" for uncompressed files."""
    from pydicom.pixels import get_decoder

    try:
        decoder = get_decoder(syntax)
    except NotImplementedError as error:
        raise SourceError(f"DICOM in {syntax.name} is not read: re-save it as JPEG or uncompressed") from error
    if decoder.is_native:
        return ""
    for name in DECODERS:
        if name in decoder.available_plugins:
            return name
    if any(line.startswith("pillow") for line in decoder.missing_dependencies):
        raise MissingExtra(f"DICOM in {syntax.name}", "pillow", "dicom")
    raise UnsupportedError(f"no decoder for DICOM in {syntax.name} is installed: re-save it as JPEG or uncompressed")


def _native(file: BinaryIO, header: Header) -> Iterator[bytes]:
    """Yields the bytes of each uncompressed frame; one that breaks off ends the iteration."""
    size = header.rows * header.columns * header.samples
    if header.photometric == "YBR_FULL_422":
        size = size // 3 * 2
    implicit = header.syntax.is_implicit_VR
    order = "little" if header.syntax.is_little_endian else "big"
    file.seek(header.pixel_offset)
    element = file.read(8 if implicit else 12)
    length = int.from_bytes(element[-4:], "little" if order == "little" else "big")
    end = min(file.tell() + length, os.fstat(file.fileno()).st_size)
    # one pad byte is legal at the end (PS3.5 8.1.1)
    while end - file.tell() >= size:
        yield file.read(size)


def _encapsulated(file: BinaryIO, header: Header) -> Iterator[bytes]:
    """Yields the bytes of each compressed frame, whole ones only."""
    from pydicom.encaps import generate_frames

    start = header.pixel_offset + 12
    whole_until = _last_whole_byte(file, start)
    file.seek(start)
    table = None
    if "ExtendedOffsetTable" in header.dataset and "ExtendedOffsetTableLengths" in header.dataset:
        table = (header.dataset.ExtendedOffsetTable, header.dataset.ExtendedOffsetTableLengths)
    window = _Window(file, start, whole_until)
    held: bytes | None = None
    for data in generate_frames(window, number_of_frames=header.frames, extended_offsets=table):
        if held is not None:
            _check_jpeg(held, header)
            yield held
        held = data
    # where the file breaks off, the last frame may lack fragments: its own end marker must be there (T.81, T.800)
    if held is not None and (whole_until is None or b"\xff\xd9" in held[-16:]):
        _check_jpeg(held, header)
        yield held


def _last_whole_byte(file: BinaryIO, start: int) -> int | None:
    """Walks the fragments; None if the sequence is closed, else the end of the last whole fragment."""
    size = os.fstat(file.fileno()).st_size
    at = start
    while True:
        file.seek(at)
        item = file.read(8)
        if item[:4] == b"\xfe\xff\xdd\xe0":
            return None
        length = int.from_bytes(item[4:8], "little")
        if len(item) < 8 or item[:4] != b"\xfe\xff\x00\xe0" or at + 8 + length > size:
            return at
        at += 8 + length


class _Window:
    """The file up to the end of its last whole fragment, for pydicom to read from."""

    def __init__(self, file: BinaryIO, start: int, end: int | None) -> None:
        self._file = file
        self._end = os.fstat(file.fileno()).st_size if end is None else end

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._end - self._file.tell())
        return self._file.read(left if size is None or size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


def _check_jpeg(data: bytes, header: Header) -> None:
    """Refuses a JPEG that breaks off or claims another size than the header (a bomb, or damage).

    Markers: ITU-T T.81 table B.1; SOFn carry precision, rows and columns.
    """
    if data[:2] != b"\xff\xd8":
        return
    if b"\xff\xd9" not in data[-16:]:
        raise FrameError("the JPEG breaks off")
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            rows, columns = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            if (rows, columns) != (header.rows, header.columns):
                raise FrameError(f"the JPEG says {rows}x{columns} rows x columns, the header says otherwise")
            return
        at += 2 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def _geometry(
    header: Header,
) -> tuple[tuple[float, float] | None, tuple[int, int, int, int] | None, tuple[str, ...]]:
    """Returns the spacing in mm, the box of the largest region that fits the picture, and notes for people."""
    regions, misfit = [], False
    for item in header.dataset.get("SequenceOfUltrasoundRegions") or []:
        box = _region_box(item, header)
        if item.get("RegionSpatialFormat") != TISSUE_2D:
            continue
        if box is None:
            misfit = True
            continue
        regions.append((box, _region_spacing(item)))
    if misfit:
        return None, None, ("the ultrasound region does not fit the picture, which was resized or cut: no spacing",)
    if regions:
        box, spacing = max(regions, key=lambda pair: pair[0][2] * pair[0][3])
        others = [other for _, other in regions if other is not None]
        if spacing is not None and any(not np.allclose(other, spacing, rtol=0.01) for other in others):
            return None, box, ("several regions of different depth: no spacing for the whole picture",)
        return spacing, box, () if spacing else ("the ultrasound region has no spacing in cm",)
    plain = header.dataset.get("PixelSpacing")
    if plain is not None and len(plain) == 2 and all(1e-4 < float(value) < 100 for value in plain):
        return (float(plain[0]), float(plain[1])), None, ()
    return None, None, ("the DICOM file gives no spacing: measurements are in pixels",)


def _region_box(item: Any, header: Header) -> tuple[int, int, int, int] | None:
    """(row, column, height, width), or None where it does not lie in the picture (1 pixel of slack)."""
    x0, y0 = int(item.RegionLocationMinX0), int(item.RegionLocationMinY0)
    x1, y1 = int(item.RegionLocationMaxX1), int(item.RegionLocationMaxY1)
    if x1 - x0 < 8 or y1 - y0 < 8 or x1 > header.columns or y1 > header.rows:
        return None
    return y0, x0, min(y1, header.rows - 1) - y0 + 1, min(x1, header.columns - 1) - x0 + 1


def _region_spacing(item: Any) -> tuple[float, float] | None:
    units = item.get("PhysicalUnitsXDirection"), item.get("PhysicalUnitsYDirection")
    spacing = abs(float(item.get("PhysicalDeltaY") or 0)) * 10.0, abs(float(item.get("PhysicalDeltaX") or 0)) * 10.0
    return spacing if units == (CENTIMETRE, CENTIMETRE) and all(1e-4 < value < 100 for value in spacing) else None


def _frame_times_ns(header: Header) -> list[int] | None:
    """Start of each frame on the file's own clock, ns, or None if it tells no time."""
    dataset = header.dataset
    try:
        vector = dataset.get("FrameTimeVector")
        if vector is not None and len(vector) == header.frames:
            return [int(total) for total in np.cumsum([float(step) * 1e6 for step in vector])]
        period_ms = float(dataset.get("FrameTime") or 0)
    except (TypeError, ValueError):
        return None
    return [int(index * period_ms * 1e6) for index in range(header.frames)] if 0 < period_ms < 1e6 else None


__all__ = [
    "CENTIMETRE",
    "DECODERS",
    "MAX_FILE_BYTES",
    "MAX_FRAMES",
    "MAX_SAMPLES",
    "MAX_SIDE",
    "SUFFIXES",
    "TAGS",
    "TISSUE_2D",
    "DicomSource",
    "Header",
    "accepts",
    "open_source",
    "probe",
]
