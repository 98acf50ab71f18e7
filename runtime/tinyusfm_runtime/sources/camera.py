"""Source ``camera:N``: a Video4Linux capture device (HDMI, SDI or VGA grabber, UVC camera), by OpenCV.

A thread grabs without pause and keeps the newest picture: a driver queues four of its own, and whoever reads slowly
gets old ones. Brightness is handed over as the device codes it where that can be had (grey, YUYV, UYVY, NV12, YU12: no
conversion, limited range); what OpenCV must convert (MJPEG, RGB) comes as BGR in full range. A device that goes away
is opened again until the source is closed.

Captured screens carry names and rulers: give a crop. It does not know spacing: a grabber sees pixels, so the caller
gives it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinyusfm_runtime import v4l2
from tinyusfm_runtime.errors import FrameError, MissingExtra, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.plugins import Probe
from tinyusfm_runtime.slot import SlotSource

RETRY_S = 0.1
"""Pause between two attempts to open a device that went away."""
READ_TIMEOUT_S = 1
"""A device that gives nothing for so long is opened again. Whole seconds: OpenCV's V4L2 takes it from the environment
(OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT) and from nowhere else; its own default is 10."""
PLANES = {"GREY": "whole", "YUYV": "even", "UYVY": "odd", "NV12": "top", "YU12": "top", "YV12": "top"}
"""FourCC -> where its brightness stands in what OpenCV hands over without conversion."""


def probe() -> Probe:
    """Works with OpenCV and at least one capture device; names it."""
    try:
        import cv2
    except ImportError:
        return Probe(works=False, reason="OpenCV is not installed", extra="opencv")
    except Exception as error:  # a broken installation may raise anything
        return Probe(works=False, reason=f"OpenCV is broken: {type(error).__name__}", extra="opencv")
    found = [node for node in v4l2.nodes() if node.capture]
    if not found:
        return Probe(
            works=False, reason="no Video4Linux capture device (/dev/video*) that can be opened", extra="opencv"
        )
    return Probe(works=True, reason=f"OpenCV {cv2.__version__}, {found[0].path}: {found[0].card}", extra="opencv")


def accepts(location: str) -> bool:
    """True for the scheme ``camera:`` and for a video device's path."""
    return location.startswith("camera:") or v4l2.PATH.fullmatch(location) is not None


def open_source(
    location: str,
    *,
    spacing_mm: tuple[float, float] | None = None,
    orientation: str | None = None,
    width: int | None = None,
    height: int | None = None,
    rate_hz: float | None = None,
    fourcc: str | None = None,
    video_range: str | None = None,
    colour: bool = False,
) -> CameraSource:
    """Opens the device, so that a wrong name is seen at once.

    Args:
        location: ``camera:0`` or ``camera:/dev/video0``.
        spacing_mm: (row, column) spacing of every picture, mm, or None.
        orientation: PLUS letters of every picture, or None.
        width: columns to ask for, or None for what the device has.
        height: rows to ask for, or None.
        rate_hz: pictures a second to ask for, or None.
        fourcc: coding to ask for, such as ``YUYV``, or None.
        video_range: what the codes mean, ``full`` or ``limited``; None is limited for YUV and full else.
        colour: True for BGR pictures, converted by OpenCV to full range.

    Returns:
        The source.

    Raises:
        SourceError: no such device, or it cannot be opened.
        MissingExtra: OpenCV is not installed.
    """
    name = location.removeprefix("camera:")
    path = f"/dev/video{int(name)}" if re.fullmatch(r"\d{1,3}", name) else name
    if not v4l2.PATH.fullmatch(path) or video_range not in (None, "full", "limited"):
        raise SourceError("a camera is written camera:N or camera:/dev/videoN; video_range is full or limited")
    if fourcc is not None and not re.fullmatch(r"[\x20-\x7e]{4}", fourcc):
        raise SourceError("fourcc has four characters, such as YUYV")
    try:
        import cv2
    except ImportError as error:
        raise MissingExtra("reading a camera", "opencv-python-headless", "opencv") from error
    wishes = {
        cv2.CAP_PROP_FOURCC: cv2.VideoWriter.fourcc(*fourcc) if fourcc else None,
        cv2.CAP_PROP_FRAME_WIDTH: width,
        cv2.CAP_PROP_FRAME_HEIGHT: height,
        cv2.CAP_PROP_FPS: rate_hz,
    }
    device = Device(cv2, path, {key: value for key, value in wishes.items() if value is not None}, colour)
    if not device.open():
        raise SourceError("the camera cannot be opened: no such device, in use, or no permission (group video)")
    chosen = None if video_range is None else VideoRange(video_range)
    return CameraSource(device, spacing_mm=spacing_mm, orientation=orientation, video_range=chosen)


class Device:
    """One capture device: opened, asked for a picture, let go; used by one thread at a time."""

    def __init__(self, cv2: Any, path: str, wishes: dict[int, float], colour: bool) -> None:
        self._cv2, self._path, self._wishes, self._colour = cv2, path, wishes, colour
        self._capture: Any = None
        self.coding = ""

    def open(self) -> bool:
        """Opens it: False if it is not there."""
        cv2 = self._cv2
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        # read when the first device is opened; whoever set it before is right
        os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", str(READ_TIMEOUT_S))
        try:
            capture = cv2.VideoCapture(self._path, cv2.CAP_V4L2)
            if not capture.isOpened():
                capture.release()
                return False
            for key, value in self._wishes.items():
                capture.set(key, value)
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            self.coding = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").decode("ascii", "replace").strip()
            raw = self.coding in PLANES and not self._colour
            if raw and not capture.set(cv2.CAP_PROP_CONVERT_RGB, 0):
                self.coding = "converted"
        except cv2.error:
            return False
        finally:
            cv2.utils.logging.setLogLevel(level)
        if self._colour:
            self.coding = "converted"
        self._capture = capture
        return True

    def read(self) -> tuple[np.ndarray, PixelFormat, VideoRange, int | None] | None:
        """The next picture, what it is and the driver's time, ns; None if the device is gone.

        Raises:
            FrameError: a picture of an unexpected shape.
        """
        cv2 = self._cv2
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            good, picture = self._capture.read()
            time_ms = self._capture.get(cv2.CAP_PROP_POS_MSEC) if good else 0.0
        except cv2.error:
            good, picture, time_ms = False, None, 0.0
        finally:
            cv2.utils.logging.setLogLevel(level)
        if not good or picture is None:
            return None
        rows = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        return (*brightness(np.asarray(picture), self.coding, rows), round(time_ms * 1e6) if time_ms > 0 else None)

    def close(self) -> None:
        """Lets it go; twice is harmless."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.release()


def brightness(picture: np.ndarray, coding: str, rows: int) -> tuple[np.ndarray, PixelFormat, VideoRange]:
    """The brightness plane of what OpenCV handed over, or all of it where OpenCV converted.

    Args:
        picture: uint8 as ``VideoCapture.read`` gave it.
        coding: the device's FourCC, or ``converted``.
        rows: of the picture; planar codings carry colour below.

    Returns:
        Pixels that are a copy, their format and their range.

    Raises:
        FrameError: the array does not have the shape of its coding.
    """
    place = PLANES.get(coding)
    if place is None:
        if picture.ndim == 2:
            return picture.copy(), PixelFormat.GREY, VideoRange.FULL
        return picture.copy(), PixelFormat.BGR, VideoRange.FULL
    if place == "whole" and picture.ndim == 2:
        return picture.copy(), PixelFormat.GREY, VideoRange.FULL
    if place in ("even", "odd") and picture.ndim == 3 and picture.shape[2] == 2:
        return picture[..., 0 if place == "even" else 1].copy(), PixelFormat.GREY, VideoRange.LIMITED
    if place == "top" and picture.ndim == 2 and picture.shape[0] == rows * 3 // 2:
        return picture[:rows].copy(), PixelFormat.GREY, VideoRange.LIMITED
    raise FrameError(f"the camera said {coding} and gave an array of {picture.shape}")


class CameraSource(SlotSource):
    """A grabbing thread and the newest picture; the thread runs while the source is entered."""

    def __init__(
        self,
        device: Device,
        *,
        spacing_mm: tuple[float, float] | None = None,
        orientation: str | None = None,
        video_range: VideoRange | None = None,
    ) -> None:
        super().__init__()
        self._device, self.spacing_mm, self.orientation = device, spacing_mm, orientation
        self.video_range = video_range
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        if spacing_mm is None:
            self.notes = ("a camera knows no spacing: measurements are in pixels",)

    def __enter__(self) -> CameraSource:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
        if self._thread is not None:
            self._thread.join()
        self._device.close()

    def __iter__(self) -> Iterator[Frame]:
        if self._thread is None and not self.slot.closed:
            self._thread = threading.Thread(target=self._grab, name="camera", daemon=True)
            self._thread.start()
        yield from super().__iter__()

    def close(self) -> None:
        """Ends the iteration; the device itself is let go within READ_TIMEOUT_S."""
        self._stop.set()
        super().close()
        if self._thread is None:
            self._device.close()

    def _grab(self) -> None:
        seq = 0
        is_open = True
        while not self._stop.is_set():
            if not is_open:
                self._stop.wait(RETRY_S)
                is_open = self._device.open()
                self.tally.add("reconnects", int(is_open))
                continue
            try:
                answer = self._device.read()
                if answer is None:
                    self.tally.add("lost")
                    self._device.close()
                    is_open = False
                    continue
                self._hand_over(answer, seq)
            except FrameError:
                self.tally.add("frame")
            seq += 1
        self._device.close()

    def _hand_over(self, answer: tuple[np.ndarray, PixelFormat, VideoRange, int | None], seq: int) -> None:
        pixels, pixel_format, video_range, t_source_ns = answer
        self._contact_ns = time.monotonic_ns()
        frame = Frame(
            pixels=pixels,
            pixel_format=pixel_format,
            video_range=self.video_range or video_range,
            spacing_mm=self.spacing_mm,
            seq=seq,
            t_source_ns=t_source_ns,
            t_recv_ns=self._contact_ns,
            orientation=self.orientation,
        )
        if self.slot.put(frame):
            self.tally.add("overtaken")


__all__ = [
    "PLANES",
    "READ_TIMEOUT_S",
    "RETRY_S",
    "CameraSource",
    "Device",
    "accepts",
    "brightness",
    "open_source",
    "probe",
]
