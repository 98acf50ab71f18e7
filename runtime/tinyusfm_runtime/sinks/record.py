"""Sink: a recording that can be replayed.

Frames without loss, results and changes of state.

The folder holds ``clip.mha`` (MetaImage, uncompressed: every frame that was answered, byte by byte, with its spacing),
``frames.jsonl`` (one line per image of the clip: ``image clip seq t_recv_ns t_source_ns``) and ``results.jsonl`` (the
JSON lines sink's, states among them). Where size, channels or spacing of frames change, the recording goes on in
``clip-2.mha`` and so on. ``tinyusfm-edge replay FOLDER/clip.mha`` plays it.

**It stores images of patients.** Nothing else in the runtime does so unasked; this sink is off unless it is named.

The number of images in the header has a fixed width and is kept true while frames come, so that what a killed run
leaves can be played too. The folder takes its name when it is closed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.numerics.preprocess import to_grey
from tinyusfm_runtime.overlay import as_rgb
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveResult, Prediction, StateChange
from tinyusfm_runtime.sinks import FileSink, PendingFolder
from tinyusfm_runtime.sinks.jsonl import JsonLinesSink

COUNT_DIGITS = 9
"""Of the number of images in the header; a clip ends there at the latest."""


def available() -> Availability:
    """Always works: standard library and numpy."""
    return Availability(usable=True, reason="standard library and numpy; stores images", extra=None)


def open_sink(location: str, *, labels: tuple[str, ...] = ()) -> RecordSink:
    """Reserves the folder.

    Args:
        location: path of the folder, which must not exist.
        labels: names of a classifier's classes, as for JSON lines.

    Raises:
        OutputError: something of that name is there, or the folder above is missing or not writable.
    """
    return RecordSink(location, labels)


@dataclass(frozen=True, slots=True)
class _Kind:
    """What all images of one clip share."""

    rows: int
    columns: int
    channels: int
    spacing_mm: tuple[float, float] | None


class _Clip:
    """One MetaImage file that grows."""

    def __init__(self, path: Path, kind: _Kind) -> None:
        self.name, self.kind, self.images = path.name, kind, 0
        lines = ["ObjectType = Image", "NDims = 3", f"DimSize = {kind.columns} {kind.rows} "]
        self._count_at = len("\n".join(lines).encode("ascii"))
        lines[-1] += "0" * COUNT_DIGITS
        lines += ["BinaryData = True", "CompressedData = False", "ElementType = MET_UCHAR"]
        if kind.channels > 1:
            lines.append(f"ElementNumberOfChannels = {kind.channels}")
        if kind.spacing_mm is not None:
            row_mm, column_mm = kind.spacing_mm
            lines.append(f"ElementSpacing = {column_mm!r} {row_mm!r} 1")
        lines += ["ElementDataFile = LOCAL", ""]
        self._file: BinaryIO = path.open("wb+")
        self._file.write("\n".join(lines).encode("ascii"))

    def add(self, pixels: np.ndarray) -> None:
        """Appends one image."""
        self._file.write(np.ascontiguousarray(pixels).tobytes())
        self.images += 1
        self._write_count()

    def close(self) -> None:
        """Closes the file; idempotent."""
        if not self._file.closed:
            self._file.close()

    def _write_count(self) -> None:
        self._file.flush()
        self._file.seek(self._count_at)
        self._file.write(f"{self.images:0{COUNT_DIGITS}d}".encode("ascii"))
        self._file.seek(0, 2)
        self._file.flush()


class RecordSink(FileSink):
    """Records frames, results and states.

    Attributes:
        images: how many frames were stored.
    """

    def __init__(self, location: str, labels: tuple[str, ...] = ()) -> None:
        self._pending = PendingFolder(location, "the recording", recover=True)
        self._open = True
        self._clip: _Clip | None = None
        self._clips = 0
        self.images = 0
        try:
            self._results = JsonLinesSink(str(self._pending.path / "results.jsonl"), labels)
            self._frames = (self._pending.path / "frames.jsonl").open("a", encoding="ascii")
        except OSError as error:
            raise self._pending.failed(error) from error

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Records one frame and its result.

        Raises:
            OutputError: no room.
        """
        if self._open:
            self._store(frame)
            self._results.write(frame, prediction)

    def write_live(self, result: LiveResult) -> None:
        """Records one frame and its live result, whatever that says.

        Raises:
            OutputError: no room.
        """
        if self._open:
            self._store(result.frame)
            self._results.write_live(result)

    def on_state(self, change: StateChange) -> None:
        """Records a change of state; one that comes after the end is dropped.

        Raises:
            OutputError: no room.
        """
        if self._open:
            self._results.on_state(change)

    def close(self) -> None:
        """Publishes the folder.

        Raises:
            OutputError: the disk fails, or something took the name meanwhile.
        """
        if not self._open:
            return
        self._open = False
        self._shut()
        if self.images:
            self._pending.publish()
        else:
            self._pending.discard()

    def _shut(self) -> None:
        self._results.close()
        self._frames.close()
        if self._clip is not None:
            self._clip.close()

    def _store(self, frame: Frame) -> None:
        pixels = stored_pixels(frame)
        rows, columns = pixels.shape[:2]
        kind = _Kind(rows, columns, 1 if pixels.ndim == 2 else pixels.shape[2], frame.spacing_mm)
        try:
            if self._clip is None or self._clip.kind != kind:
                self._clip = self._next(kind)
            self._clip.add(pixels)
            times = {"t_recv_ns": frame.t_recv_ns, "t_source_ns": frame.t_source_ns}
            place = {"image": self._clip.images - 1, "clip": self._clip.name, "seq": frame.seq}
            self._frames.write(json.dumps(place | times) + "\n")
        except OSError as error:
            self._open = False
            raise OutputError(f"cannot write the recording: {error.strerror or 'no room'}") from error
        self.images += 1

    def _next(self, kind: _Kind) -> _Clip:
        if self._clip is not None:
            self._clip.close()
        self._clips += 1
        name = "clip.mha" if self._clips == 1 else f"clip-{self._clips}.mha"
        return _Clip(self._pending.path / name, kind)


def stored_pixels(frame: Frame) -> np.ndarray:
    """A frame's pixels as a clip holds them: grey or RGB, 0 black and 255 white.

    Full-range grey and RGB are stored as they are; other codes are brought to what the model sees.

    Args:
        frame: any frame.

    Returns:
        uint8 HW or HWC with 3 channels.
    """
    kind, limited = PixelFormat(frame.pixel_format), VideoRange(frame.video_range) is VideoRange.LIMITED
    if kind is PixelFormat.GREY:
        return to_grey(frame.pixels, kind, VideoRange.LIMITED) if limited else frame.pixels
    return frame.pixels if kind is PixelFormat.RGB and not limited else as_rgb(frame)


__all__ = ["COUNT_DIGITS", "RecordSink", "available", "open_sink", "stored_pixels"]
