"""Sink: an MP4 in which every frame carries its mask, its ellipse and its reading.

H.264 where the PyAV wheel has an encoder for it (browsers and tablets play that), MPEG-4 part 2
otherwise; ``codec`` on the sink says which. The video carries no metadata of ours. It shows what
the source gave, so crop there what must not be stored.

A live result that is withheld, late or without an answer is a picture without a mask that says so;
one that is merely late keeps its mask and says so.

Pictures run at a constant rate; the source's own times are in the JSON lines, not here.
"""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import InputError, MissingExtra, OutputError, UnsupportedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live_result import LiveResult
from tinyusfm_runtime.overlay import WARNING_RGB, as_rgb, captions, draw, write_line
from tinyusfm_runtime.plugins import Probe
from tinyusfm_runtime.session import Prediction
from tinyusfm_runtime.sinks import PendingFile, WholeFile, shown

CODECS = ("libx264", "libopenh264", "mpeg4")
"""Preference; the first that the wheel can encode."""
OPTIONS = {"libx264": {"preset": "veryfast", "crf": "18"}}
BIT_RATE = 8_000_000
"""For encoders without a quality setting, bit/s."""


def probe() -> Probe:
    """Works where PyAV is installed; says which codec it would use."""
    try:
        import av

        return Probe(works=True, reason=f"PyAV {av.__version__}, {_choose_codec(av)}", extra="video")
    except ImportError:
        return Probe(works=False, reason="PyAV is not installed", extra="video")
    except Exception as error:  # a broken installation may raise anything
        return Probe(works=False, reason=f"PyAV is broken: {type(error).__name__}", extra="video")


def open_sink(location: str, *, rate_hz: float = 25.0) -> VideoSink:
    """Opens the file; its size comes with the first frame.

    Args:
        location: path of the MP4.
        rate_hz: pictures a second, 0.1 to 240.

    Raises:
        InputError: not an .mp4 name, or the rate is out of range.
        OutputError: the file cannot be written.
        MissingExtra: PyAV is not installed.
    """
    if not location.lower().endswith(".mp4"):
        raise InputError("the overlay video is an MP4: give a name that ends in .mp4")
    if not 0.1 <= rate_hz <= 240:
        raise InputError(f"video rate {rate_hz}: give 0.1 to 240 pictures a second")
    try:
        import av
    except ImportError as error:
        raise MissingExtra("writing an overlay video", "av", "video") from error
    return VideoSink(av, location, rate_hz)


class VideoSink(WholeFile):
    """Encodes as frames come; the file gets its name at the end."""

    def __init__(self, av: Any, location: str, rate_hz: float) -> None:
        self._av, self._rate = av, Fraction(rate_hz).limit_denominator(1001)
        self.codec = _choose_codec(av)
        self._pending = PendingFile(location, "the overlay video")
        self._container: Any = None
        self._stream: Any = None
        self._size: tuple[int, int] | None = None

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Appends one picture.

        Raises:
            OutputError: no room, or the frames change their size.
        """
        self._append(draw(frame, prediction))

    def write_live(self, result: LiveResult) -> None:
        """Appends one picture of the live loop; what may not be shown is left out and named.

        Raises:
            OutputError: no room, or the frames change their size.
        """
        self._append(draw_live(result))

    def _append(self, picture_HWC: np.ndarray) -> None:
        picture_HWC = _even(picture_HWC)
        if self._size is None:
            self._start(picture_HWC.shape[1], picture_HWC.shape[0])
        if picture_HWC.shape[:2] != self._size:
            self._discard()
            raise OutputError("cannot write the overlay video: the frames change their size, a video cannot")
        self._mux(self._av.VideoFrame.from_ndarray(picture_HWC, format="rgb24"))

    def close(self) -> None:
        """Finishes and publishes the video; one without a picture is not written.

        Raises:
            OutputError: no room.
        """
        if self._container is None:
            self._pending.discard()
            return
        self._mux(None)
        container, self._container = self._container, None
        try:
            container.close()
        except (OSError, self._av.FFmpegError) as error:
            raise self._failed(error) from error
        self._pending.publish()

    def _start(self, width: int, height: int) -> None:
        try:
            self._container = self._av.open(
                str(self._pending.path), "w", format="mp4", options={"movflags": "+faststart"}
            )
            self._stream = self._container.add_stream(self.codec, rate=self._rate, options=OPTIONS.get(self.codec, {}))
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            if self.codec not in OPTIONS:
                self._stream.bit_rate = BIT_RATE
        except (OSError, ValueError, self._av.FFmpegError) as error:
            raise self._failed(error) from error
        self._size = (height, width)

    def _mux(self, picture: Any) -> None:
        try:
            for packet in self._stream.encode(picture):
                self._container.mux(packet)
        except (OSError, ValueError, self._av.FFmpegError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> OutputError:
        self._discard()
        reason = getattr(error, "strerror", None) or type(error).__name__
        return OutputError(f"cannot write the overlay video: {reason}")

    def _discard(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            # the file is thrown away, whatever the encoder says to that
            with suppress(Exception):
                container.close()
        self._pending.discard()


def draw_live(result: LiveResult) -> np.ndarray:
    """The picture of one live result.

    Returns:
        uint8 HWC (RGB, full range), a new array.
    """
    prediction = shown(result)
    if prediction is None:
        picture_HWC = as_rgb(result.frame)
        write_line(picture_HWC, "STALE" if result.withheld else "NO ANSWER", 0, WARNING_RGB)
        return picture_HWC
    picture_HWC = draw(result.frame, prediction)
    words = [word for word, so in (("STALE", result.stale), ("DEGRADED", result.degraded)) if so]
    first = len(captions(prediction))
    for line, word in enumerate(words):
        write_line(picture_HWC, word, first + line, WARNING_RGB)
    return picture_HWC


def _choose_codec(av: Any) -> str:
    for name in CODECS:
        try:
            av.codec.Codec(name, "w")
        except Exception:  # PyAV names this error differently over its versions
            continue
        return name
    raise UnsupportedError(f"this PyAV has none of the encoders {', '.join(CODECS)}")


def _even(picture_HWC: np.ndarray) -> np.ndarray:
    """Repeats the last row or column where a side is odd: 4:2:0 video needs even sides."""
    rows, cols = picture_HWC.shape[:2]
    if rows % 2 or cols % 2:
        picture_HWC = np.pad(picture_HWC, ((0, rows % 2), (0, cols % 2), (0, 0)), mode="edge")
    return np.ascontiguousarray(picture_HWC)


__all__ = ["BIT_RATE", "CODECS", "OPTIONS", "VideoSink", "draw_live", "open_sink", "probe"]
