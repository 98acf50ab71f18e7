"""Source ``camera:N``: a Video4Linux capture device, by OpenCV.

HDMI, SDI or VGA grabber, UVC camera.

A thread grabs without pause and keeps the newest image: a driver queues four of its own, and whoever reads slowly
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
from types import TracebackType
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import FrameError, MissingExtra, SourceError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.sources._slot import SlotSource
from tinyusfm_runtime.sources._spacing import SpacingRule
from tinyusfm_runtime.transport import v4l2

RETRY_S = 0.1
"""Pause between two attempts to open a device that went away."""
READ_TIMEOUT_S = 1
"""A device that gives nothing for so long is opened again. Whole seconds: OpenCV's V4L2 takes it from the environment
(OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT) and from nowhere else; its own default is 10."""
PLANES = {"GREY": "whole", "YUYV": "even", "UYVY": "odd", "NV12": "top", "YU12": "top", "YV12": "top"}
"""FourCC -> where its brightness stands in what OpenCV hands over without conversion."""


def available() -> Availability:
    """Works with OpenCV and at least one capture device; names it."""
    try:
        import cv2
    except ImportError:
        return Availability(usable=False, reason="OpenCV is not installed", extra="opencv")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"OpenCV is broken: {type(error).__name__}", extra="opencv")
    found = [node for node in v4l2.nodes() if node.capture]
    if not found:
        return Availability(
            usable=False, reason="no Video4Linux capture device (/dev/video*) that can be opened: connect one"
        )
    return Availability(
        usable=True, reason=f"OpenCV {cv2.__version__}, {found[0].path}: {found[0].card}", extra="opencv"
    )


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
        spacing_mm: (row, column) spacing of every image, mm, or None.
        orientation: PLUS letters of every image, or None.
        width: columns to ask for, or None for what the device has.
        height: rows to ask for, or None.
        rate_hz: images per second to ask for, or None.
        fourcc: coding to ask for, such as ``YUYV``, or None.
        video_range: what the codes mean, ``full`` or ``limited``; None is limited for YUV and full else.
        colour: True for BGR images, converted by OpenCV to full range.

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
    requested = {
        cv2.CAP_PROP_FOURCC: cv2.VideoWriter.fourcc(*fourcc) if fourcc else None,
        cv2.CAP_PROP_FRAME_WIDTH: width,
        cv2.CAP_PROP_FRAME_HEIGHT: height,
        cv2.CAP_PROP_FPS: rate_hz,
    }
    device = CaptureDevice(cv2, path, {key: value for key, value in requested.items() if value is not None}, colour)
    if not device.open():
        raise SourceError("the camera cannot be opened: no such device, in use, or no permission (group video)")
    chosen = None if video_range is None else VideoRange(video_range)
    return CameraSource(device, spacing_mm=spacing_mm, orientation=orientation, video_range=chosen)


class CaptureDevice:
    """One capture device: opened, asked for an image, let go.

    Used by one thread at a time.
    """

    def __init__(self, cv2: Any, path: str, requested: dict[int, float], colour: bool) -> None:
        self._cv2, self._path, self._requested, self._colour = cv2, path, requested, colour
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
            for key, value in self._requested.items():
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
        """The next image, what it is and the driver's time, ns.

        None if the device is gone.

        Raises:
            FrameError: an image of an unexpected shape.
        """
        cv2 = self._cv2
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            good, image = self._capture.read()
            time_ms = self._capture.get(cv2.CAP_PROP_POS_MSEC) if good else 0.0
        except cv2.error:
            good, image, time_ms = False, None, 0.0
        finally:
            cv2.utils.logging.setLogLevel(level)
        if not good or image is None:
            return None
        rows = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        return (*brightness(np.asarray(image), self.coding, rows), round(time_ms * 1e6) if time_ms > 0 else None)

    def close(self) -> None:
        """Releases the device. Idempotent."""
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.release()


def brightness(image: np.ndarray, coding: str, rows: int) -> tuple[np.ndarray, PixelFormat, VideoRange]:
    """The brightness plane of what OpenCV handed over.

    Or all of it where OpenCV converted.

    Args:
        image: uint8 as ``VideoCapture.read`` gave it.
        coding: the device's FourCC, or ``converted``.
        rows: of the image; planar codings carry colour below.

    Returns:
        Pixels that are a copy, their format and their range.

    Raises:
        FrameError: the array does not have the shape of its coding.
    """
    place = PLANES.get(coding)
    if place is None:
        if image.ndim == 2:
            return image.copy(), PixelFormat.GREY, VideoRange.FULL
        return image.copy(), PixelFormat.BGR, VideoRange.FULL
    if place == "whole" and image.ndim == 2:
        return image.copy(), PixelFormat.GREY, VideoRange.FULL
    if place in ("even", "odd") and image.ndim == 3 and image.shape[2] == 2:
        return image[..., 0 if place == "even" else 1].copy(), PixelFormat.GREY, VideoRange.LIMITED
    if place == "top" and image.ndim == 2 and image.shape[0] == rows * 3 // 2:
        return image[:rows].copy(), PixelFormat.GREY, VideoRange.LIMITED
    raise FrameError(f"the camera said {coding} and gave an array of {image.shape}")


class CameraSource(SlotSource):
    """A grabbing thread and the newest image.

    The thread runs while the source is entered.
    """

    def __init__(
        self,
        device: CaptureDevice,
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
            self.findings.note("a camera knows no spacing: measurements are in pixels; --spacing MM gives millimetres")
        self._rule = SpacingRule(spacing_mm, self.findings)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
                    self.refuse("lost", "the camera gives no image (unplugged, or no signal); it is opened again")
                    self._device.close()
                    is_open = False
                    continue
                self._hand_over(answer, seq)
            except FrameError as error:
                self.refuse("frame", str(error))
            seq += 1
        self._device.close()

    def _hand_over(self, answer: tuple[np.ndarray, PixelFormat, VideoRange, int | None], seq: int) -> None:
        pixels, pixel_format, video_range, t_source_ns = answer
        self._contact_ns = time.monotonic_ns()
        frame = Frame(
            pixels=pixels,
            pixel_format=pixel_format,
            video_range=self.video_range or video_range,
            spacing_mm=self._rule.of(pixels.shape),
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
    "CaptureDevice",
    "accepts",
    "available",
    "brightness",
    "open_source",
]
