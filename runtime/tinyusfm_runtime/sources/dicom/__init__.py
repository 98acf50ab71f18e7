"""Source for DICOM: single images and cines, by pydicom.

Decoded one frame at a time.

Tags are promises: lengths, counts, codestreams and samples are measured first (layout.py), and where a tag is wrong the
data win and a doubt says so. Frames are decoded by pydicom.pixels and its plug-ins (decode.py); millimetres and times
are in geometry.py. More than 8 bits need a window. Deflated files are unpacked under a limit (deflated.py); a video
inside is read as a video file is (video.py).

Every whole frame that is there is given. A file that breaks off, or holds fewer than it promises, says so after them.

It knows neither patient nor study: only the tags named in header.py are read. pydicom's log and warnings are silenced
while it works, since they quote element values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyusfm_runtime.errors import EdgeError, FrameError, IncompleteError, MissingExtra, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.images.quiet import quiet_pydicom
from tinyusfm_runtime.images.whole import check_scans
from tinyusfm_runtime.images.window import Window, check_window
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.sources._crop import Box, cropped
from tinyusfm_runtime.sources._source import ReportingSource
from tinyusfm_runtime.sources._spacing import SpacingRule
from tinyusfm_runtime.sources.dicom.codestream import inspect
from tinyusfm_runtime.sources.dicom.decode import DECODERS, FrameDecoder
from tinyusfm_runtime.sources.dicom.fragments import read_frames
from tinyusfm_runtime.sources.dicom.geometry import Geometry, frame_times_ns, geometry_of
from tinyusfm_runtime.sources.dicom.header import DicomHeader, read_header
from tinyusfm_runtime.sources.dicom.layout import Layout, exchanged, find_layout, fit_codestream
from tinyusfm_runtime.sources.dicom.video import DicomVideo, is_video

SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})


def available() -> Availability:
    """Works where pydicom is installed; says which JPEG decoder it has."""
    try:
        import pydicom
        from pydicom.pixels import get_decoder

        found = get_decoder(pydicom.uid.JPEGBaseline8Bit).available_plugins
    except ImportError:
        return Availability(usable=False, reason="pydicom is not installed", extra="dicom")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"pydicom is broken: {type(error).__name__}", extra="dicom")
    jpeg = next((name for name in DECODERS if name in found), None)
    decoder = f"JPEG by {jpeg}" if jpeg else "no JPEG decoder: compressed files cannot be read"
    return Availability(usable=True, reason=f"pydicom {pydicom.__version__}, {decoder}", extra="dicom")


def accepts(location: str) -> bool:
    """True for a DICOM suffix or a file with ``DICM`` at byte 128."""
    if location.startswith("dicom:") or Path(location).suffix.lower() in SUFFIXES:
        return True
    try:
        with Path(location).open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except (OSError, ValueError):
        return False


def open_source(
    location: str,
    *,
    spacing_mm: tuple[float, float] | None = None,
    region: bool = False,
    crop: Box | None = None,
    window: Window | None = None,
) -> DicomSource | DicomVideo:
    """Reads the header, measures the pixel data and refuses what cannot be read.

    No pixel is decoded yet.

    Args:
        location: the file, with or without ``dicom:`` in front.
        spacing_mm: (row, column) spacing that overrules the file's, mm, or None.
        region: True crops every frame to the file's largest ultrasound region.
        crop: (row, column, height, width) to crop every frame to; millimetres are those of the region it lies in.
        window: (code that becomes 0, code that becomes 255) for more than 8 bits, after the file's rescale, or None.

    Returns:
        The source.

    Raises:
        SourceError: not a DICOM file, damaged, too large or of a kind that is refused.
        MissingExtra: pydicom or the decoder for this file is not installed.
        UnsupportedError: the decoder for this file is in no extra; the message names the package.
    """
    try:
        import pydicom
    except ImportError as error:
        raise MissingExtra("reading DICOM", "pydicom", "dicom") from error
    if window is not None:
        check_window(window)
    path = Path(location.removeprefix("dicom:"))
    with _mapped("the DICOM header cannot be read"):
        header = read_header(pydicom, path)
        turned = False
        if header.length is not None:
            with header.open() as file:
                turned = exchanged(file, header)
        header = replace(header, rows=header.columns, columns=header.rows) if turned else header
    with _mapped("the ultrasound regions cannot be read"):
        geometry = geometry_of(header, "region" if region else crop)
    if region and geometry.region is None:
        raise SourceError("the DICOM file marks no ultrasound region that fits its image: give crop in pixels")
    if is_video(str(header.syntax)) and header.length is None:
        with _mapped("the video cannot be read"):
            box = geometry.region if region else crop
            return DicomVideo(path, header, geometry, spacing_mm=spacing_mm, crop=box)
    with _mapped("the pixel data cannot be read"), header.open() as file:
        layout = find_layout(file, header)
        if turned:
            layout = layout.but("Rows and Columns are exchanged: read by the lines of the image itself")
        decoder = FrameDecoder(header, layout, window)
    return DicomSource(
        path=path,
        header=header,
        layout=layout,
        decoder=decoder,
        geometry=geometry,
        spacing_mm=spacing_mm,
        crop=geometry.region if region else crop,
    )


class DicomSource(ReportingSource):
    """Decodes frame by frame; memory holds two frames at most."""

    def __init__(
        self,
        *,
        path: Path,
        header: DicomHeader,
        layout: Layout,
        decoder: FrameDecoder,
        geometry: Geometry,
        spacing_mm: tuple[float, float] | None,
        crop: Box | None,
    ) -> None:
        self._path, self.header, self.layout, self._decoder, self._geometry = path, header, layout, decoder, geometry
        self.crop = crop
        super().__init__((), layout.doubts)
        self._rule = SpacingRule(spacing_mm, self.findings)
        with _mapped("the spacing cannot be used"):
            self.spacing_mm = self._spacing_of(0)
        for text in geometry.notes if spacing_mm is None else ():
            self.findings.note(text)
        with _mapped("the frame times cannot be read"):
            doubts = [*geometry.doubts] if spacing_mm is None else []
            self._times_ns, notes = frame_times_ns(header.dataset, layout.frames, doubts)
        for text in notes:
            self.findings.note(text)
        for text in doubts:
            self.findings.doubt(text)

    @property
    def path(self) -> Path:
        """The file; for objects that refer to it, never for messages."""
        return self._path

    @property
    def decoder(self) -> str:
        """Name of pydicom's plug-in that decodes the frames; "" for uncompressed ones."""
        return self._decoder.plugin

    @property
    def notes(self) -> tuple[str, ...]:
        """What was obeyed or neglected so far, one line each."""
        return (*self.findings.notes, *self._decoder.notes)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Where tags and data contradict each other so far, one line each."""
        return (*self.findings.doubts, *self._decoder.doubts)

    def __len__(self) -> int:
        return self.layout.frames

    def __iter__(self) -> Iterator[Frame]:
        # nothing is silenced while a frame is out: the caller's own warnings are its own
        layout = self.layout
        with _opened(self.header) as file:
            pieces = self._pieces(file)
            for seq in range(layout.frames):
                try:
                    with _mapped(f"frame {seq} of {layout.frames} (from 0) cannot be decoded"):
                        frame = self._frame(self._decoder.decode(self._checked(next(pieces))), seq)
                except SourceError as error:
                    raise (IncompleteError if seq else SourceError)(str(error)) from error
                yield frame
        if layout.promised is not None and layout.frames < layout.promised:
            raise IncompleteError(
                f"the DICOM file promises {layout.promised} frames but holds {layout.frames} whole ones"
            )

    def _spacing_of(self, seq: int) -> tuple[float, float] | None:
        geometry = self._geometry
        own = geometry.per_frame[seq] if seq < len(geometry.per_frame) else geometry.spacing_mm
        # a spacing of the file's own already knows the shape of its pixels
        return self._rule.of((self.header.rows, self.header.columns), own, None if own else geometry.aspect)

    def _pieces(self, file: BinaryIO) -> Iterator[bytes]:
        if self.layout.encapsulated:
            yield from read_frames(file, [list(spans) for spans in self.layout.spans])
            return
        file.seek(self.header.offset)
        for _ in range(self.layout.frames):
            yield file.read(self.layout.frame_bytes)

    def _checked(self, data: bytes) -> bytes:
        """A compressed frame whose own header fits the file.

        Decoders pass one that breaks off.
        """
        if not self.layout.encapsulated:
            return data
        stream = inspect(data)
        if stream is None:
            if data[:2] == b"\xff\xd8":
                raise FrameError("the JPEG breaks off")
            return data
        if not stream.whole:
            raise FrameError(f"the {stream.family} breaks off")
        if stream.family == "JPEG":
            check_scans(data, stream.rows, stream.columns)
        fitted = fit_codestream(self.layout, stream, self.header)
        if (fitted.samples, fitted.allocated, fitted.syntax) != (
            self.layout.samples,
            self.layout.allocated,
            self.layout.syntax,
        ):
            raise FrameError(f"the {stream.family} has other channels, depth or codec than the frames before")
        return data

    def _frame(self, pixels: np.ndarray, seq: int) -> Frame:
        frame = Frame(
            pixels=pixels,
            pixel_format=PixelFormat.GREY if pixels.ndim == 2 else PixelFormat.RGB,
            spacing_mm=self._spacing_of(seq),
            seq=seq,
            t_source_ns=None if self._times_ns is None else self._times_ns[seq],
            t_recv_ns=time.monotonic_ns(),
        )
        return frame if self.crop is None else cropped(frame, self.crop)


def _opened(header: DicomHeader) -> BinaryIO:
    with _mapped("the DICOM file cannot be read"):
        return header.open()


@contextmanager
def _mapped(what: str) -> Iterator[None]:
    """The one place where pydicom's errors become ours.

    It raises almost anything on damaged files.
    """
    try:
        with quiet_pydicom():
            yield
    except FrameError as error:
        raise SourceError(f"{what}: {error}") from error
    except EdgeError:
        raise
    except OSError as error:
        raise SourceError(f"{what}: {error.strerror or 'it breaks off'}") from error
    except Exception as error:
        raise SourceError(f"{what}: damaged or not DICOM ({type(error).__name__})") from error


__all__ = ["DECODERS", "SUFFIXES", "DicomSource", "DicomVideo", "accepts", "available", "open_source"]
