"""Outlets: what carries replayed frames to a receiver.

An OpenIGTLink server, a shared-memory ring, a video device.

All three keep one small contract (``Outlet``), so that pacing and faults need not know which it is.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Protocol

import numpy as np

from tinyusfm_runtime.errors import OutputError, UnsupportedError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import to_grey
from tinyusfm_runtime.transport import v4l2
from tinyusfm_runtime.transport.igtl_server import IgtlServer
from tinyusfm_runtime.transport.igtl_wire import HEADER_BYTES
from tinyusfm_runtime.transport.shm_writer import ShmWriter
from tinyusfm_runtime.transport.v4l2_output import VideoOutput

KINDS = ("igtl", "shm", "camera")


class Outlet(Protocol):
    """Where steps of a replay go."""

    @property
    def address(self) -> str:
        """What a receiver is given as its source."""
        ...

    def send(self, frame: Frame, *, seq: int, t_unix_ns: int, damage: random.Random | None) -> None:
        """Sends a frame; ``damage`` draws which bytes are changed on the way, or is None."""
        ...

    def keep_alive(self) -> None:
        """Says that the probe lives, where the transport has a way to."""
        ...

    def close(self) -> None:
        """Ends it; idempotent."""
        ...


class IgtlOutlet:
    """Frames as messages of a server."""

    def __init__(self, server: IgtlServer) -> None:
        self.server = server

    @property
    def address(self) -> str:
        """Host and port."""
        return self.server.address

    def wait_for_client(self, stop_s: float) -> bool:
        """True as soon as somebody is connected, False after so many seconds."""
        end = time.monotonic() + stop_s
        while self.server.clients == 0 and time.monotonic() < end:
            time.sleep(0.01)
        return self.server.clients > 0

    def send(self, frame: Frame, *, seq: int, t_unix_ns: int, damage: random.Random | None) -> None:
        """Sends a frame; damage changes bytes behind the header and leaves the CRC."""
        data = self.server.pack(frame, t_unix_ns)
        if damage is not None:
            spoilt = bytearray(data)
            for _ in range(8):
                spoilt[damage.randrange(HEADER_BYTES, len(spoilt))] ^= damage.randrange(1, 256)
            data = bytes(spoilt)
        self.server.send(data)

    def keep_alive(self) -> None:
        """A STATUS message."""
        self.server.keep_alive()

    def close(self) -> None:
        """Stops listening."""
        self.server.close()


class ShmOutlet:
    """Frames into a ring, which is made again, larger, when a frame does not fit."""

    def __init__(self, name: str) -> None:
        self._name, self._writer = name, ShmWriter(name, 1 << 16)

    @property
    def address(self) -> str:
        """The ring's name."""
        return self._writer.address

    def send(self, frame: Frame, *, seq: int, t_unix_ns: int, damage: random.Random | None) -> None:
        """Publishes a frame; damage changes pixels after their CRC was taken."""
        if frame.pixels.nbytes > self._writer.pixel_bytes:
            larger = ShmWriter(self._name, frame.pixels.nbytes)
            self._writer.close()
            self._writer = larger
        spoil = None if damage is None else damage.randrange(frame.pixels.size)
        self._writer.write(frame, seq=seq, t_source_ns=t_unix_ns, spoil_at=spoil)

    def keep_alive(self) -> None:
        """A beat of the heart."""
        self._writer.keep_alive()

    def close(self) -> None:
        """Takes the ring away."""
        self._writer.close()


class CameraOutlet:
    """Frames into a Video4Linux output device (v4l2loopback, vivid).

    Grey where it takes that, else YUYV.
    """

    def __init__(self, path: str | None) -> None:
        self._path = find_output(path)
        self._output = VideoOutput(self._path)
        self._shape: tuple[int, int] | None = None
        self._fourcc = ""

    @property
    def address(self) -> str:
        """The device that is written to; a loopback shows it under the same name."""
        return f"camera:{self._path}"

    @property
    def way(self) -> str:
        """How images are handed over, ``write`` or ``buffers``; empty before the first."""
        return self._output.way

    def send(self, frame: Frame, *, seq: int, t_unix_ns: int, damage: random.Random | None) -> None:
        """Shows a frame; a video line carries neither times nor checksums."""
        grey = as_grey(frame)
        if self._shape is None:
            self._choose_format(grey)
        if grey.shape != self._shape:
            raise OutputError("a video device shows one size: the clip changes its own")
        data = grey if self._fourcc == "GREY" else as_yuyv(grey)
        self._output.show(np.ascontiguousarray(data).data.cast("B"))

    def keep_alive(self) -> None:
        """A video line has no sign of life but images."""

    def close(self) -> None:
        """Lets the device go."""
        self._output.close()

    def _choose_format(self, grey: np.ndarray) -> None:
        rows, columns = grey.shape
        for fourcc, pixel_bytes in (("GREY", 1), ("YUYV", 2)):
            try:
                self._output.set_format(width=columns, height=rows, fourcc=fourcc, row_bytes=columns * pixel_bytes)
            except UnsupportedError as error:
                reason = str(error)
                continue
            self._shape, self._fourcc = (rows, columns), fourcc
            return
        raise UnsupportedError(reason)


def find_output(path: str | None) -> str:
    """The output device that was asked for, or the first there is.

    Args:
        path: such as /dev/video2, or None.

    Returns:
        Its path.

    Raises:
        UnsupportedError: there is none; the message says how to get one and what else there is.
    """
    if path is not None:
        node = v4l2.ask(path) if v4l2.PATH.fullmatch(path) else None
        if node is not None and node.output:
            return path
        raise UnsupportedError("that is no Video4Linux output device: give /dev/videoN of a v4l2loopback")
    found = next((node.path for node in v4l2.nodes() if node.output), None)
    if found is None:
        how = "load v4l2loopback (modprobe v4l2loopback)" if sys.platform == "linux" else "use Linux"
        raise UnsupportedError(f"a camera needs a Video4Linux output device: {how}, or replay as igtl or shm instead")
    return found


def as_grey(frame: Frame) -> np.ndarray:
    """A frame's brightness, uint8 HW in full range, by preprocessing's own weights."""
    return to_grey(frame.pixels, frame.pixel_format, frame.video_range)


def as_yuyv(grey: np.ndarray) -> np.ndarray:
    """Full-range grey as YUYV in limited range: Y = 16 + 219 v / 255, rounded.

    No colour (ITU-R BT.601).

    Args:
        grey: uint8 HW.

    Returns:
        uint8 HW2.
    """
    luma = 16 + (219 * grey.astype(np.uint32) + 127) // 255
    return np.stack([luma, np.full_like(luma, 128)], axis=-1).astype(np.uint8)


__all__ = [
    "KINDS",
    "CameraOutlet",
    "IgtlOutlet",
    "Outlet",
    "ShmOutlet",
    "as_grey",
    "as_yuyv",
    "find_output",
]
