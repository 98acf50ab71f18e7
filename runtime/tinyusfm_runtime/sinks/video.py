"""Sink: an MP4 in which every frame carries its mask, its ellipse and its reading.

H.264 where the PyAV wheel has an encoder for it (browsers and tablets play that), MPEG-4 part 2
otherwise; ``codec`` on the sink says which. The video carries no metadata of ours. It shows what
the source gave, so crop there what must not be stored.

A live result that is withheld, late or without an answer is an image without a mask that says so;
one that is merely late keeps its mask and says so.

Images stand at the source's own times, so a variable rate stays one; where the source tells none, or its clock jumps,
they follow one another at the given rate.

Until it is closed the video stands beside its goal under a hidden name, in fragments of a second, so that it plays up
to the last of them if the program is killed; the next run to the same place keeps that as ``NAME.recovered-1.mp4``. On
closing it is put in order for players (index first) and takes its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_runtime.atomic import PendingFile, temporary_name
from tinyusfm_runtime.errors import InputError, MissingExtra, OutputError, UnsupportedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.overlay import (
    MODEL_RGB,
    TEXT_RGB,
    WARNING_RGB,
    as_rgb,
    captions,
    draw,
    draw_shapes,
    write_line,
)
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveResult, Prediction
from tinyusfm_runtime.sinks import FileSink, shown

CODECS = ("libx264", "libopenh264", "mpeg4")
"""Preference; the first that the wheel can encode."""
OPTIONS = {"libx264": {"preset": "veryfast", "crf": "18"}}
BIT_RATE = 8_000_000
"""For encoders without a quality setting, bit/s."""
FRAGMENTS = {"movflags": "empty_moov+default_base_moof", "frag_duration": "1000000", "flush_packets": "1"}
"""How it is written while it grows: what is on the disk can be played."""
TIME_BASE = Fraction(1, 60_000)
"""Of the written times: 24, 25, 30, 50 and 60 Hz are whole in it, and MPEG-4 takes no denominator above 65535."""
LONGEST_S = 10.0
"""A longer step of the source's clock is a jump and not a pause."""


def available() -> Availability:
    """Works where PyAV is installed; says which codec it would use."""
    try:
        import av

        return Availability(usable=True, reason=f"PyAV {av.__version__}, {_choose_codec(av)}", extra="video")
    except ImportError:
        return Availability(usable=False, reason="PyAV is not installed", extra="video")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"PyAV is broken: {type(error).__name__}", extra="video")


def open_sink(location: str, *, rate_hz: float = 25.0, labels: Sequence[str] = ()) -> VideoSink:
    """Opens the file; its size comes with the first frame.

    Args:
        location: path of the MP4.
        rate_hz: images per second, 0.1 to 240.
        labels: names of a classifier's classes, whose probabilities are then written.

    Raises:
        InputError: not an .mp4 name, or the rate is out of range.
        OutputError: the file cannot be written.
        MissingExtra: PyAV is not installed.
    """
    if not location.lower().endswith(".mp4"):
        raise InputError("the overlay video is an MP4: give a name that ends in .mp4")
    if not 0.1 <= rate_hz <= 240:
        raise InputError(f"video rate {rate_hz}: give 0.1 to 240 images per second")
    try:
        import av
    except ImportError as error:
        raise MissingExtra("writing an overlay video", "av", "video") from error
    return VideoSink(av, location, rate_hz, labels)


class VideoSink(FileSink):
    """Encodes as frames come.

    The file gets its name at the end, with what there is of it.
    """

    def __init__(self, av: Any, location: str, rate_hz: float, labels: Sequence[str] = ()) -> None:
        self._labels = tuple(labels)
        self._av, self._rate = av, Fraction(rate_hz).limit_denominator(1001)
        self.codec = _choose_codec(av)
        self._clock = Clock(rate_hz)
        self._pending = PendingFile(location, "the overlay video", recover=True)
        for left in self._pending.recovered:
            _cut_half_fragment(left)
        self._container: Any = None
        self._stream: Any = None
        self._size: tuple[int, int] | None = None
        self._open, self._broken = True, False

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Appends one image.

        Raises:
            OutputError: no room, or the frames change their size.
        """
        self._append(draw(frame, prediction, labels=self._labels), frame.t_source_ns)

    def write_live(self, result: LiveResult) -> None:
        """Appends one image of the live loop; what may not be shown is left out and named.

        Raises:
            OutputError: no room, or the frames change their size.
        """
        self._append(draw_live(result, self._labels), result.frame.t_source_ns)

    def _append(self, image_HWC: np.ndarray, t_source_ns: int | None) -> None:
        image_HWC = _even(image_HWC)
        if self._size is None:
            self._start(image_HWC.shape[1], image_HWC.shape[0])
        if image_HWC.shape[:2] != self._size:
            raise OutputError("cannot write the overlay video: the frames change their size, a video cannot")
        image = self._av.VideoFrame.from_ndarray(image_HWC, format="rgb24")
        image.pts, image.time_base = self._clock.next(t_source_ns), TIME_BASE
        self._mux(image)

    def close(self) -> None:
        """Finishes and publishes the video; one without an image is not written.

        Raises:
            OutputError: no room.
        """
        if not self._open:
            return
        self._open = False
        if self._container is None:
            self._pending.discard()
            return
        failed, was_broken = None, self._broken
        if not was_broken:
            try:
                self._mux(None)
            except OutputError as error:
                failed = error
        container, self._container = self._container, None
        try:
            container.close()
        except (OSError, self._av.FFmpegError) as error:
            failed = failed or self._failed(error)
        if self._broken:  # what was encoded before the disk was full is kept all the same
            _cut_half_fragment(self._pending.path)
        if self._index_first():
            self._pending.publish()
        else:
            self._pending.discard()
        if failed is not None and not was_broken:  # else the writer had the error already
            raise failed

    def _start(self, width: int, height: int) -> None:
        try:
            self._container = self._av.open(str(self._pending.path), "w", format="mp4", options=FRAGMENTS)
            self._stream = self._container.add_stream(self.codec, rate=self._rate, options=OPTIONS.get(self.codec, {}))
            self._stream.codec_context.time_base = TIME_BASE
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            if self.codec not in OPTIONS:
                self._stream.bit_rate = BIT_RATE
        except (OSError, ValueError, self._av.FFmpegError) as error:
            raise self._failed(error) from error
        self._size = (height, width)

    def _mux(self, image: Any) -> None:
        try:
            for packet in self._stream.encode(image):
                self._container.mux(packet)
        except (OSError, ValueError, self._av.FFmpegError) as error:
            raise self._failed(error) from error

    def _index_first(self) -> int:
        """Writes the packets once more, index first.

        Without room for that the fragments stay. Returns their number.
        """
        fragments, ordered = self._pending.path, temporary_name(self._pending.goal)
        packets = 0
        try:
            with (
                self._av.open(str(fragments)) as given,
                self._av.open(str(ordered), "w", format="mp4", options={"movflags": "+faststart"}) as taken,
            ):
                stream = taken.add_stream_from_template(given.streams.video[0])
                for packet in given.demux(given.streams.video[0]):
                    if packet.dts is not None:
                        packets += 1
                        packet.stream = stream
                        taken.mux(packet)
            ordered.replace(fragments)
        except (OSError, ValueError, IndexError, self._av.FFmpegError):
            with suppress(OSError):
                ordered.unlink(missing_ok=True)
        return packets

    def _failed(self, error: Exception) -> OutputError:
        """The error to raise; what was encoded until then is published by ``close``."""
        self._broken = True
        reason = getattr(error, "strerror", None) or type(error).__name__
        return OutputError(f"cannot write the overlay video: {reason}")


class Clock:
    """Presentation times.

    The source's, as long as they rise, else one period after another.

    Args:
        rate_hz: images per second where the source tells no time.
    """

    def __init__(self, rate_hz: float) -> None:
        self._period = max(1, round(1 / (rate_hz * TIME_BASE)))
        self._last: int | None = None
        self._source_ns: int | None = None
        self._rest = 0.0

    def next(self, t_source_ns: int | None) -> int:
        """Time of the next image in units of TIME_BASE, always above the one before.

        Args:
            t_source_ns: the source's own clock, or None.
        """
        before, self._source_ns = self._source_ns, t_source_ns
        if self._last is None:
            self._last = 0
            return 0
        step_s = None if before is None or t_source_ns is None else (t_source_ns - before) / 1e9
        if step_s is None or not 0 < step_s <= LONGEST_S:
            step = self._period
        else:
            exact = step_s / float(TIME_BASE) + self._rest
            step = max(1, round(exact))
            self._rest = exact - step
        self._last += step
        return self._last


def draw_live(result: LiveResult, labels: Sequence[str] = ()) -> np.ndarray:
    """The image of one live result.

    Args:
        result: what was answered.
        labels: names of a classifier's classes.

    Returns:
        uint8 HWC (RGB, full range), a new array.
    """
    if result.models:
        return _draw_several(result)
    prediction = shown(result)
    if prediction is None:
        image_HWC = as_rgb(result.frame)
        write_line(image_HWC, "STALE" if result.withheld else "NO ANSWER", 0, WARNING_RGB)
        return image_HWC
    image_HWC = draw(result.frame, prediction, labels=labels)
    words = [word for word, so in (("STALE", result.stale), ("DEGRADED", result.degraded)) if so]
    first = len(captions(prediction, labels))
    for line, word in enumerate(words):
        write_line(image_HWC, word, first + line, WARNING_RGB)
    return image_HWC


def _draw_several(result: LiveResult) -> np.ndarray:
    """Every model's mask, ellipse and words in a colour of its own."""
    image_HWC = as_rgb(result.frame)
    lines: list[tuple[str, tuple[int, int, int]]] = []
    for number, each in enumerate(result.models):
        colour, prediction = MODEL_RGB[number % len(MODEL_RGB)], shown(each)
        if prediction is not None:
            draw_shapes(image_HWC, prediction, outline_rgb=colour, ellipse_rgb=colour)
            said = [(words, colour if own == TEXT_RGB else own) for words, own in captions(prediction, each.labels)]
        elif each.skipped is not None:
            said = [(f"SKIPPED - {each.skipped}", colour)]
        else:
            said = [("STALE" if each.withheld else "NO ANSWER", WARNING_RGB)]
        flags = (("STALE", each.stale and prediction is not None), ("DEGRADED", each.degraded))
        said += [(word, WARNING_RGB) for word, so in flags if so and (word, WARNING_RGB) not in said]
        lines += [(f"{each.model}: {words}", own) for words, own in said]
    for line, (words, own) in enumerate(lines):
        write_line(image_HWC, words, line, own)
    return image_HWC


def _cut_half_fragment(path: Path) -> None:
    """Ends a fragmented MP4 behind its last whole fragment.

    Boxes: ISO/IEC 14496-12, 4.2.
    """
    with suppress(OSError), path.open("r+b") as file:
        size, at, whole = path.stat().st_size, 0, 0
        while at + 8 <= size:
            file.seek(at)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:16], "big") if length == 1 else length
            if length < 8 or at + length > size:
                break
            at += length
            if head[4:8] in (b"moov", b"mdat"):
                whole = at
        if whole:
            file.truncate(whole)


def _choose_codec(av: Any) -> str:
    for name in CODECS:
        try:
            av.codec.Codec(name, "w")
        except Exception:  # PyAV names this error differently over its versions
            continue
        return name
    raise UnsupportedError(f"this PyAV has none of the encoders {', '.join(CODECS)}")


def _even(image_HWC: np.ndarray) -> np.ndarray:
    """Repeats the last row or column where a side is odd.

    4:2:0 video needs even sides.
    """
    rows, cols = image_HWC.shape[:2]
    if rows % 2 or cols % 2:
        image_HWC = np.pad(image_HWC, ((0, rows % 2), (0, cols % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(image_HWC)


__all__ = [
    "BIT_RATE",
    "CODECS",
    "FRAGMENTS",
    "LONGEST_S",
    "OPTIONS",
    "TIME_BASE",
    "Clock",
    "VideoSink",
    "available",
    "draw_live",
    "open_sink",
]
