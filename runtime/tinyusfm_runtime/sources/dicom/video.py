"""Video inside DICOM, read by PyAV as a video file is.

MPEG-2, H.264 and HEVC (PS3.5 A.4.5 to A.4.11). The fragments of the pixel data, put together, are one video with its
own count, times and colour; millimetres come from the DICOM tags. What NumberOfFrames promises is held against what
was decoded. It knows no codec.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from tinyusfm_runtime.errors import IncompleteError, MissingExtra, SourceError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.sources._crop import Box, cropped
from tinyusfm_runtime.sources._source import ReportingSource
from tinyusfm_runtime.sources._spacing import SpacingRule
from tinyusfm_runtime.sources.dicom import fragments
from tinyusfm_runtime.sources.dicom.geometry import Geometry
from tinyusfm_runtime.sources.dicom.header import DicomHeader
from tinyusfm_runtime.sources.video import frames_of, pyav
from tinyusfm_runtime.sources.video.reading import Extent

FIRST, LAST = 100, 108
"""Last numbers of the transfer syntaxes 1.2.840.10008.1.2.4.N that are video."""


def is_video(syntax: str) -> bool:
    """True for a transfer syntax that is a video, fragmentable ones (``.1``) too."""
    number = syntax.removeprefix("1.2.840.10008.1.2.4.").partition(".")[0]
    return syntax.startswith("1.2.840.10008.1.2.4.") and number.isdecimal() and FIRST <= int(number) <= LAST


class SpanFile(io.RawIOBase):
    """Spans of a file, read as one file.

    Args:
        file: the file; it stays its opener's to close.
        spans: (offset, length), in order.
    """

    def __init__(self, file: BinaryIO, spans: list[fragments.Span]) -> None:
        super().__init__()
        self._file, self._spans, self._at = file, spans, 0
        self._size = sum(length for _, length in spans)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Place in the spans, bytes."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Goes to a place in the spans."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer as far as the span goes that the place lies in."""
        before = 0
        for offset, length in self._spans:
            if self._at < before + length:
                inside = self._at - before
                self._file.seek(offset + inside)
                data = self._file.read(min(len(buffer), length - inside))
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            before += length
        return 0


class DicomVideo(ReportingSource):
    """Frames of a video inside a DICOM file."""

    def __init__(
        self,
        path: Path,
        header: DicomHeader,
        geometry: Geometry,
        *,
        spacing_mm: tuple[float, float] | None,
        crop: Box | None,
    ) -> None:
        try:
            import av
        except ImportError as error:
            raise MissingExtra("video inside DICOM", "av", "video") from error
        self._av, self.path, self.header, self.geometry, self.crop = av, path, header, geometry, crop
        super().__init__()
        self._rule = SpacingRule(spacing_mm, self.findings)
        for text in geometry.notes if spacing_mm is None else ():
            self.findings.note(text)
        for text in geometry.doubts if spacing_mm is None else ():
            self.findings.doubt(text)
        with header.open() as file:
            found = fragments.walk(file, header.offset)
        if not found.spans:
            raise SourceError("the video of the DICOM file breaks off before its first fragment")
        self._spans = list(found.spans)
        if not found.closed:
            self.findings.doubt("the DICOM file breaks off inside its video")

    def __iter__(self) -> Iterator[Frame]:
        head, count, extent = self.header, 0, Extent()
        with head.open() as file:
            images = pyav.read(self._av, SpanFile(file, self._spans), extent, self.findings, colour=False)
            # the rule of a video knows no spacing of its own: it is set below, from the tags
            frames = frames_of(images, extent, self.findings, SpacingRule(None, self.findings))
            while (frame := self._next(frames)) is not None:
                count += 1
                yield self._placed(frame)
        if head.promised is not None and count < head.promised:
            raise IncompleteError(f"the DICOM file promises {head.promised} frames and its video holds {count}")
        if head.promised is not None and count > head.promised:
            self.findings.doubt(
                f"the DICOM file promises {head.promised} frames and its video holds {count}: all are read"
            )

    def _next(self, frames: Iterator[Frame]) -> Frame | None:
        try:
            return next(frames, None)
        except SourceError as error:
            name = self.header.syntax.name
            text = f"{error}; it is DICOM in {name}: re-save it uncompressed where another program reads it"
            raise type(error)(text) from error

    def _placed(self, frame: Frame) -> Frame:
        shape = frame.pixels.shape[:2]
        if shape != (self.header.rows, self.header.columns):
            raise SourceError(
                f"the video says {shape[0]}x{shape[1]} rows x columns, the DICOM tags say "
                f"{self.header.rows}x{self.header.columns}"
            )
        own = self.geometry.spacing_mm
        frame = replace(frame, spacing_mm=self._rule.of(shape, own, None if own else self.geometry.aspect))
        return frame if self.crop is None else cropped(frame, self.crop)


__all__ = ["FIRST", "LAST", "DicomVideo", "SpanFile", "is_video"]
