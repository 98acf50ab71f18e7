"""Header of a DICOM file: what its tags promise about the pixels.

And where the pixel data begin.

Only the tags named here are read; nothing about the patient. Promises are range-checked here and held against the data
in layout.py. It decodes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from tinyusfm_runtime.errors import FrameError, SourceError
from tinyusfm_runtime.images.limits import MAX_FRAMES, check_frames, check_image
from tinyusfm_runtime.sources.dicom.deflated import inflate

MAX_FILE_BYTES = 4 << 30
"""A file above this is refused unread."""
MAX_SIDE = 16384
MAX_SAMPLES = 1 << 37
"""rows * columns * channels * frames; 20 minutes of 1080p colour at 30 frames per second fit."""
LATER = dict.fromkeys((f"1.2.840.10008.1.2.4.{number}" for number in (110, 111, 112)), "JPEG XL")
"""Transfer syntaxes that pydicom does not know yet, and their names."""
UNDEFINED = 0xFFFFFFFF
PIXEL_TAGS = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
LONG_VRS = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
"""Value representations whose length has 4 bytes behind 2 reserved ones (PS3.5 7.1.2)."""
CHANNELS = {"MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1, "RGB": 3, "YBR_FULL": 3, "YBR_FULL_422": 3,
            "YBR_ICT": 3, "YBR_RCT": 3, "YBR_PARTIAL_420": 3}  # fmt: skip
"""Photometric interpretations that are read (PS3.3 C.7.6.3.1.2) and their samples per pixel."""
TAGS = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelSpacing", "PixelAspectRatio",
    "FrameTime", "FrameTimeVector", "CineRate",
    "RecommendedDisplayFrameRate", "ActualFrameDuration", "SequenceOfUltrasoundRegions", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth",
    "PresentationLUTShape", "PixelPresentation",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData",
    "BluePaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class DicomHeader:
    """What is needed to decode the frames; nothing about the patient.

    Attributes:
        rows: rows of each frame.
        columns: columns of each frame.
        promised: how many frames the file promises, or None where it does not say.
        samples: channels per pixel as the tags say.
        photometric: as the tags say.
        planar: True if each channel is a plane of its own, as the tags say.
        allocated: bits of a stored sample, as the tags say.
        stored: of these, bits in use, as the tags say.
        high: number of the highest bit in use, as the tags say.
        signed: samples may be negative, as the tags say.
        syntax: transfer syntax UID (pydicom's type).
        keyword: ``PixelData``, or one of its two float kin.
        vr: value representation of the pixel data, such as ``OW``.
        offset: byte where the value of the pixel data begins.
        length: its length in bytes, or None where it is encapsulated.
        file_bytes: size of the whole file.
        dataset: the tags above, for palettes and geometry.
        path: the file.
        content: a deflated file unpacked, whose places the numbers above are, else None.
    """

    rows: int
    columns: int
    promised: int | None
    samples: int
    photometric: str
    planar: bool
    allocated: int
    stored: int
    high: int
    signed: bool
    syntax: Any
    keyword: str
    vr: str
    offset: int
    length: int | None
    file_bytes: int
    dataset: Any
    path: Path
    content: bytes | None = field(default=None, repr=False)

    def open(self) -> BinaryIO:
        """The bytes that the places lie in: the file, or what was unpacked of it."""
        return self.path.open("rb") if self.content is None else BytesIO(self.content)

    @property
    def available(self) -> int:
        """Bytes of pixel data that are really there."""
        there = max(0, self.file_bytes - self.offset)
        return there if self.length is None else min(self.length, there)


def read_header(pydicom: Any, path: Path) -> DicomHeader:
    """Reads the tags in front of the pixel data.

    Also the head of the pixel data themselves.

    Args:
        pydicom: the library.
        path: the file.

    Raises:
        SourceError: not DICOM, no image, too large, or of a kind that is refused.
    """
    if not path.is_file():
        raise SourceError("the DICOM file does not exist")
    size = path.stat().st_size
    if not size:
        raise SourceError("the DICOM file is empty: copy or export it again")
    if size > MAX_FILE_BYTES:
        raise SourceError(f"the DICOM file is larger than {MAX_FILE_BYTES >> 30} GiB")
    try:
        meta = pydicom.filereader.read_file_meta_info(path)
    except pydicom.errors.InvalidDicomError as error:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                raise SourceError("the file is compressed by gzip: unpack it first, with gunzip") from error
        raise SourceError(
            "not a DICOM file: DICM is missing at byte 128; a bare data set can be made one with dcmconv"
        ) from error
    syntax = meta.get("TransferSyntaxUID")
    if syntax is None:
        raise SourceError("the file carries no DICOM transfer syntax: not a DICOM file, or cut off")
    if str(syntax) not in pydicom.uid.UID_dictionary or not syntax.is_transfer_syntax:
        name = LATER.get(str(syntax), "an unknown codec")
        raise SourceError(
            f"DICOM in transfer syntax {str(syntax)[:64]} ({name}) is not read: re-save it uncompressed, for instance "
            "with dcmconv or gdcmconv --raw"
        )
    content = None
    if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
        content, syntax = inflate(pydicom, path, meta), pydicom.uid.ExplicitVRLittleEndian
        size = len(content)
    with path.open("rb") if content is None else BytesIO(content) as file:
        dataset = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(TAGS))
        keyword, vr, length = _element_head(file, syntax)
        header = _checked(dataset, syntax, keyword, vr, file.tell(), length, size, path)
    if content is not None:
        frames = header.promised or 1
        try:
            check_frames(frames, frames * header.rows * header.columns * header.samples, path.stat().st_size)
        except FrameError as error:
            raise SourceError(f"the deflated DICOM file: {error}") from error
    return replace(header, content=content)


def _element_head(file: BinaryIO, syntax: Any) -> tuple[str, str, int | None]:
    """Reads tag, VR and length where the pixel data begin.

    Leaves the file at their value (PS3.5 7.1).
    """
    order = "<" if syntax.is_little_endian or syntax.is_encapsulated else ">"
    byte_order: Any = "little" if order == "<" else "big"
    start = file.read(8)
    group, element = (int.from_bytes(start[at : at + 2], byte_order) for at in (0, 2))
    keyword = PIXEL_TAGS.get(group << 16 | element)
    if len(start) < 8 or keyword is None:
        raise SourceError("the DICOM file holds no image: it has no pixel data, or breaks off before them")
    vr = start[4:6]
    # some writers mix both kinds of heads: an explicit one has two capital letters, an implicit one a length
    explicit = vr.isalpha() and vr.isupper()
    if not explicit:
        length = int.from_bytes(start[4:8], byte_order)
        return keyword, "OW", None if length == UNDEFINED else length
    length_bytes = file.read(4) if vr in LONG_VRS else start[6:8]
    length = int.from_bytes(length_bytes, byte_order)
    return keyword, vr.decode("ascii"), None if length == UNDEFINED else length


def _checked(
    dataset: Any, syntax: Any, keyword: str, vr: str, offset: int, length: int | None, file_bytes: int, path: Path
) -> DicomHeader:
    try:
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        tagged = str(dataset.get("PhotometricInterpretation") or "").strip().upper()
        photometric = tagged or ("RGB" if dataset.get("SamplesPerPixel") == 3 else "MONOCHROME2")
        promised = _count(dataset.get("NumberOfFrames"))
        samples = int(dataset.get("SamplesPerPixel") or CHANNELS.get(photometric, 1))
        allocated = int(dataset.BitsAllocated)
        stored = int(dataset.get("BitsStored") or allocated)
        high = int(dataset.get("HighBit") or stored - 1)
        signed = bool(int(dataset.get("PixelRepresentation") or 0))
        planar = bool(int(dataset.get("PlanarConfiguration") or 0))
    except (AttributeError, TypeError, ValueError) as error:
        raise SourceError("the DICOM file holds no image, or its image tags are damaged") from error
    if not (8 <= rows <= MAX_SIDE and 8 <= columns <= MAX_SIDE):
        raise SourceError(f"DICOM image of {rows}x{columns} rows x columns: each side must be 8 to {MAX_SIDE}")
    frames = 1 if promised is None else promised
    if not 1 <= frames <= MAX_FRAMES or rows * columns * samples * frames > MAX_SAMPLES:
        raise SourceError(
            f"the DICOM file promises {frames} frames of {rows}x{columns}: too many ({MAX_FRAMES} at most)"
        )
    try:
        check_image(rows, columns, samples * max(allocated, 8) // 8)
    except FrameError as error:
        raise SourceError(f"DICOM: {error}") from error
    if photometric not in CHANNELS:
        raise SourceError(f"DICOM in colour space {photometric[:20]} is not read: convert it to RGB or MONOCHROME2")
    if samples not in (1, 3):
        raise SourceError(f"DICOM with {samples} samples per pixel is not read: only 1 (grey, palette) and 3 (colour)")
    if allocated not in (8, 16, 32, 64) or not 1 <= stored <= allocated:
        what = "1 bit (a mask)" if allocated == 1 else f"{stored} of {allocated} bits"
        raise SourceError(f"DICOM with {what} a sample is not read: convert it to 8 or 16 bits")
    return DicomHeader(
        rows=rows, columns=columns, promised=promised, samples=samples, photometric=photometric, planar=planar,
        allocated=allocated, stored=stored, high=high, signed=signed, syntax=syntax, keyword=keyword, vr=vr,
        offset=offset, length=length, file_bytes=file_bytes, dataset=dataset,
        path=path,
    )  # fmt: skip


def _count(value: Any) -> int | None:
    """NumberOfFrames, or None where it is missing, empty or 0."""
    return int(value) or None if value not in (None, "") else None


__all__ = [
    "CHANNELS",
    "LATER",
    "LONG_VRS",
    "MAX_FILE_BYTES",
    "MAX_SAMPLES",
    "MAX_SIDE",
    "PIXEL_TAGS",
    "TAGS",
    "UNDEFINED",
    "DicomHeader",
    "read_header",
]
