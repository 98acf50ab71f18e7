"""Images into a Video4Linux output device.

By write() where the driver takes that, else through its own buffers.

v4l2loopback takes ``write`` once the format is set. vivid of Linux 6.1 offers it (V4L2_CAP_READWRITE) and then refuses
every image with EINVAL, since the kernel's emulation of write() hands it a payload of 0 bytes; streaming works there:
REQBUFS, QUERYBUF and mmap once, then QBUF and DQBUF, with STREAMON in between (linux/videodev2.h, 64-bit layout).

What is shown and how it is coded is the caller's matter.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import select
import struct
import time
from collections.abc import Callable
from typing import Any, Protocol

from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.transport import v4l2

REQUEST_BUFFERS, QUERY_BUFFER, QUEUE, DEQUEUE = 0xC0145608, 0xC0585609, 0xC058560F, 0xC0585611
STREAM_ON, STREAM_OFF = 0x40045612, 0x40045613
BUFFERS = struct.Struct("<IIII4x")
"""struct v4l2_requestbuffers: count, type, memory, capabilities."""
BUFFER = struct.Struct("<IIIII4xqq16xIIQI12x")
"""struct v4l2_buffer of a 64-bit kernel: index, type, bytesused, flags, field, timestamp (s, us), sequence, memory,
offset, length."""
MEMORY_MMAP = 1
WANTED_BUFFERS = 3
TAKES_MS = 2000
"""A device that takes no image for so long is not shown by anybody, or broken."""
DRAIN_S = 0.3
_log = logging.getLogger(__name__)


class OutputDevice(Protocol):
    """An open device file, as far as it is needed here."""

    def ioctl(self, request: int, argument: bytearray) -> None: ...

    def write(self, data: memoryview) -> int: ...

    def map(self, length: int, offset: int) -> Any: ...

    def wait(self, timeout_ms: int) -> bool: ...

    def close(self) -> None: ...


class DeviceFile:
    """The real one. Every call raises OSError as the kernel says."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def ioctl(self, request: int, argument: bytearray) -> None:
        """Asks the driver; the answer stands in the argument."""
        import fcntl

        fcntl.ioctl(self.file, request, argument)

    def write(self, data: memoryview) -> int:
        """Hands an image over, or raises BlockingIOError."""
        return os.write(self.file, data)

    def map(self, length: int, offset: int) -> Any:
        """Memory of the driver's, to be filled; ``close`` on it gives it back."""
        return mmap.mmap(self.file, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)

    def wait(self, timeout_ms: int) -> bool:
        """True as soon as an image can be handed over."""
        poll = select.poll()
        poll.register(self.file, select.POLLOUT)
        return any(event & select.POLLOUT and not event & select.POLLERR for _, event in poll.poll(timeout_ms))

    def close(self) -> None:
        """Lets the file go."""
        os.close(self.file)


class Buffers:
    """Streaming: the driver's buffers, filled in turn.

    Args:
        device: open, its format set.
        size: bytes of an image.

    Raises:
        OutputError: the driver gives no buffers for images of this size.
    """

    def __init__(self, device: OutputDevice, size: int) -> None:
        self._device, self._size = device, size
        self._maps: list[Any] = []
        self._free: list[int] = []
        self._on = False
        asked = bytearray(BUFFERS.pack(WANTED_BUFFERS, v4l2.OUTPUT_TYPE, MEMORY_MMAP, 0))
        try:
            device.ioctl(REQUEST_BUFFERS, asked)
            for index in range(BUFFERS.unpack(asked)[0]):
                answer = self._described(index)
                device.ioctl(QUERY_BUFFER, answer)
                *_, offset, length = BUFFER.unpack(answer)
                if length < size:
                    raise OutputError("the video output device's buffers are too small for its own format")
                self._maps.append(device.map(length, offset))
        except OSError as error:
            self.close()
            raise _refused(error) from error
        except BaseException:
            self.close()
            raise
        self._free = list(range(len(self._maps)))
        if not self._free:
            raise OutputError("the video output device gives no buffers")

    def show(self, data: memoryview) -> None:
        """Queues an image; waits for a buffer where all of them are still to be shown.

        Raises:
            OutputError: the device takes none in time.
        """
        try:
            if not self._free:
                self._free.append(_in_time(self._device, self._dequeued))
            index = self._free.pop(0)
            self._maps[index][: self._size] = data
            self._device.ioctl(QUEUE, self._described(index, bytes_used=self._size))
            if not self._on:
                self._device.ioctl(STREAM_ON, bytearray(struct.pack("<i", v4l2.OUTPUT_TYPE)))
                self._on = True
        except OSError as error:
            raise _refused(error) from error

    def close(self) -> None:
        """Waits for queued images, stops and returns the buffers. Idempotent.

        It waits a moment until what is queued was shown.
        """
        maps, self._maps = self._maps, []
        end_s = time.monotonic() + DRAIN_S
        try:
            # the last one stays on the screen, so the driver keeps it
            while self._on and len(self._free) < len(maps) - 1 and time.monotonic() < end_s:
                if self._device.wait(50):
                    self._free.append(self._dequeued())
            if self._on:
                self._device.ioctl(STREAM_OFF, bytearray(struct.pack("<i", v4l2.OUTPUT_TYPE)))
        except OSError:
            pass  # unplugged: nothing is left to be stopped
        self._on = False
        for each in maps:
            each.close()

    def _dequeued(self) -> int:
        answer = self._described(0)
        self._device.ioctl(DEQUEUE, answer)
        index: int = BUFFER.unpack(answer)[0]
        return index

    @staticmethod
    def _described(index: int, *, bytes_used: int = 0) -> bytearray:
        now_us = time.monotonic_ns() // 1000
        seconds, micros = divmod(now_us, 1_000_000)
        return bytearray(
            BUFFER.pack(index, v4l2.OUTPUT_TYPE, bytes_used, 0, v4l2.FIELD_NONE, seconds, micros, 0, MEMORY_MMAP, 0, 0)
        )


class Writes:
    """write(): one call an image."""

    def __init__(self, device: OutputDevice) -> None:
        self._device = device

    def show(self, data: memoryview) -> None:
        """Hands an image over.

        Raises:
            OutputError: the device takes none in time, or takes a part only.
            OSError: EINVAL, which says that this driver cannot be written to.
        """
        try:
            taken = _in_time(self._device, lambda: self._device.write(data))
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise
            raise _refused(error) from error
        if taken != len(data):
            raise OutputError("the video output device took a part of the image only")

    def close(self) -> None:
        """Nothing is held."""


class VideoOutput:
    """One output device that shows images of one size and coding.

    Attributes:
        way: ``write`` or ``buffers``, as it turned out; empty before the first image.
    """

    def __init__(self, path: str, open_device: Any = DeviceFile) -> None:
        """Opens the device.

        Args:
            path: such as /dev/video2.
            open_device: path -> Device.

        Raises:
            OutputError: it cannot be opened, or does not say what it can.
        """
        self._path, self._open = path, open_device
        self._device: OutputDevice | None = None
        self._format: tuple[int, int, str, int] | None = None
        self._carrier: Writes | Buffers | None = None
        self.way = ""
        try:
            self._device = open_device(path)
            self._caps = v4l2.capabilities(self._device.ioctl)
        except OSError as error:
            self.close()
            raise OutputError(f"the video output device cannot be opened: {error.strerror}") from error

    def set_format(self, *, width: int, height: int, fourcc: str, row_bytes: int) -> None:
        """Tells the device what will be shown.

        Args:
            width: columns.
            height: rows.
            fourcc: such as ``GREY`` or ``YUYV``.
            row_bytes: from row to row.

        Raises:
            UnsupportedError: the device refuses, or would take another size or format.
            OutputError: it was closed.
        """
        v4l2.set_output_format(self._live().ioctl, width=width, height=height, fourcc=fourcc, row_bytes=row_bytes)
        self._format = (width, height, fourcc, row_bytes)

    def show(self, data: memoryview) -> None:
        """Shows one image.

        Args:
            data: its bytes, contiguous, of the format that was set.

        Raises:
            OutputError: the device takes none, or was closed.
        """
        device = self._live()
        if self._carrier is None:
            if self._caps & v4l2.READWRITE:
                self._carrier, self.way = Writes(device), "write"
            else:
                self._stream(len(data))
        assert self._carrier is not None
        try:
            self._carrier.show(data)
        except OSError as error:
            if not self._caps & v4l2.STREAMING:
                raise _refused(error) from error
            _log.info("the video output device refuses write(): its buffers are used")
            self._reopen()
            self._stream(len(data))
            self._carrier.show(data)

    def close(self) -> None:
        """Stops and lets the device go. Idempotent."""
        carrier, self._carrier = self._carrier, None
        device, self._device = self._device, None
        if carrier is not None:
            carrier.close()
        if device is not None:
            device.close()

    def _stream(self, size: int) -> None:
        self._carrier, self.way = Buffers(self._live(), size), "buffers"

    def _reopen(self) -> None:
        """A driver that was written to gives no buffers until its file was closed."""
        self.close()
        try:
            self._device = self._open(self._path)
        except OSError as error:
            raise OutputError(f"the video output device cannot be opened: {error.strerror}") from error
        assert self._format is not None
        width, height, fourcc, row_bytes = self._format
        self.set_format(width=width, height=height, fourcc=fourcc, row_bytes=row_bytes)

    def _live(self) -> OutputDevice:
        if self._device is None:
            raise OutputError("the video output device was closed")
        return self._device


def _in_time(device: OutputDevice, attempt: Callable[[], int]) -> int:
    """What an attempt gives as soon as the device is ready for it, within TAKES_MS."""
    end_s = time.monotonic() + TAKES_MS / 1e3
    while (left_s := end_s - time.monotonic()) > 0:
        try:
            return attempt()
        except BlockingIOError:
            if not device.wait(max(1, round(left_s * 1e3))):
                break
    raise OutputError(f"the video output device took no image for {TAKES_MS / 1e3:.0f} s")


def _refused(error: OSError) -> OutputError:
    return OutputError(f"the video output device takes no image: {error.strerror or type(error).__name__}")


__all__ = [
    "BUFFER",
    "BUFFERS",
    "DEQUEUE",
    "DRAIN_S",
    "MEMORY_MMAP",
    "QUERY_BUFFER",
    "QUEUE",
    "REQUEST_BUFFERS",
    "STREAM_OFF",
    "STREAM_ON",
    "TAKES_MS",
    "WANTED_BUFFERS",
    "Buffers",
    "DeviceFile",
    "OutputDevice",
    "VideoOutput",
    "Writes",
]
