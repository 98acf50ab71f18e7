"""The shared-memory ring of runtime/capi/tue_shm_ring.h, seen from Python.

Layout, and a reader that trusts nothing.

The reader copies with ``preadv`` instead of mapping: a writer that shrinks the object under a mapping kills whoever
reads it with SIGBUS, while a read comes back short and is refused. Every size is held against the object's own before
memory is asked for. ``multiprocessing.shared_memory`` is not used: up to Python 3.12 a process that merely attaches
destroys the segment for everybody when it ends.

It does not know names, waiting or writers that come back.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import time
import zlib
from dataclasses import dataclass

import numpy as np

from tinyusfm_runtime.errors import FrameError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange

MAGIC = b"TERING01"
VERSION = 1
HEADER_BYTES = 128
"""Of the ring's header and of each slot's."""
MAX_SLOTS = 64
MAX_PIXEL_BYTES = 1 << 30
NO_TIME = -(1 << 63)
SPACING, CROP, LIMITED, CHECKED = 1, 2, 4, 8
"""enum tue_shm_flags."""
FORMATS = (PixelFormat.GREY, PixelFormat.RGB, PixelFormat.BGR, PixelFormat.RGBA)
CHANNELS = (1, 3, 3, 4)
RING = struct.Struct("<8sIIQQQII16sQQI44s")
"""tue_shm_ring."""
RING_CHECKED_BYTES = 44
STATE = struct.Struct("<QQ")
STATE_OFFSET = 64
"""published and heartbeat_ns."""
WAKES_OFFSET = 80
"""1 where the writer wakes whoever waits (ring_wait.py); outside the CRC, since it harms nobody."""
SLOT = struct.Struct("<QQQqQ6I2d4I8s20sI")
"""tue_shm_slot."""
SLOT_CHECKED = slice(8, 124)


class RingError(FrameError):
    """The ring or one of its frames cannot be used.

    Args:
        reason: one word to count it by: ``torn``, ``ring``, ``crc``, ``generation``, ``field``, ``size`` or ``pixels``.
        message: what was wrong.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(f"shared-memory ring: {message}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RingHeader:
    """What the writer fixed when it made the ring.

    Attributes:
        slots: how many, 2 .. MAX_SLOTS.
        slot_stride: bytes from slot to slot.
        pixel_bytes: room for pixels in each.
        created_ns: the writer's wall clock when it was made.
        writer_pid: its process.
    """

    slots: int
    slot_stride: int
    pixel_bytes: int
    created_ns: int
    writer_pid: int


def unpack_ring(data: bytes, object_bytes: int) -> RingHeader:
    """Checks a ring's header.

    Args:
        data: its first HEADER_BYTES bytes.
        object_bytes: size of the whole object.

    Returns:
        The header; every slot lies inside the object.

    Raises:
        RingError: it is no ring, not finished, damaged, or larger than its object.
    """
    if len(data) != HEADER_BYTES:
        raise RingError("ring", "the object is smaller than its header")
    magic, version, slots, stride, pixel_bytes, created_ns, pid, crc, reserved, *_ = RING.unpack(data)
    if magic != MAGIC or version != VERSION:
        raise RingError("ring", "no ring of this version, or not finished yet")
    if crc != zlib.crc32(data[:RING_CHECKED_BYTES]) or any(reserved):
        raise RingError("ring", "the CRC does not match its header")
    if not (2 <= slots <= MAX_SLOTS and stride % 64 == 0 and 64 <= pixel_bytes <= min(MAX_PIXEL_BYTES, stride - 128)):
        raise RingError("ring", "slots or sizes are out of range")
    if HEADER_BYTES + slots * stride > object_bytes:
        raise RingError("ring", "its slots do not fit into the object")
    return RingHeader(slots=slots, slot_stride=stride, pixel_bytes=pixel_bytes, created_ns=created_ns, writer_pid=pid)


class RingReader:
    """Reads frames out of an open object.

    Args:
        file: descriptor, open for reading; it stays the caller's.
        check_crc: False only to show that damage would pass without it.

    Raises:
        RingError: it is no ring.
    """

    def __init__(self, file: int, *, check_crc: bool = True) -> None:
        self._file, self._check_crc = file, check_crc
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise RingError("ring", "no shared-memory object")
        self.identity = (facts.st_dev, facts.st_ino)
        self.raw_header = self._read(HEADER_BYTES, 0)
        self.header = unpack_ring(self.raw_header, facts.st_size)

    def state(self) -> tuple[int, int]:
        """Number of the newest frame and the writer's heartbeat.

        0 before the first frame; ns on the monotonic clock.

        Raises:
            RingError: the object was cut short.
        """
        published, heartbeat_ns = STATE.unpack(self._read(STATE.size, STATE_OFFSET))
        return published, heartbeat_ns

    def read(self, number: int) -> Frame:
        """Copies a frame.

        Args:
            number: counted from 1, as ``state`` gave it.

        Returns:
            A frame that owns its pixels; it was received when the writer published it, on the clock both share.

        Raises:
            RingError: reason ``torn`` if the writer was there meanwhile (ask for the newest again), else it is damaged.
        """
        if not 0 < number < 1 << 62:
            raise RingError("generation", "the count of frames is out of range")
        at = HEADER_BYTES + (number - 1) % self.header.slots * self.header.slot_stride
        data = self._read(HEADER_BYTES, at)
        lock = int.from_bytes(data[:8], "little")
        if lock != 2 * number:
            raise RingError("torn" if lock & 1 or lock > 2 * number else "generation", "the slot holds another frame")
        rows, columns, row_stride = self._check_slot(data, number)
        pixels = np.empty(rows * row_stride, np.uint8)
        if os.preadv(self._file, [pixels.data], at + HEADER_BYTES) != pixels.size:
            raise RingError("size", "the object was cut short")
        if self._read(8, at) != data[:8]:
            raise RingError("torn", "the writer came round")
        return self._frame(data, pixels, rows, columns, row_stride)

    def _check_slot(self, data: bytes, number: int) -> tuple[int, int, int]:
        if self._check_crc and zlib.crc32(data[SLOT_CHECKED]) != int.from_bytes(data[124:], "little"):
            raise RingError("crc", "the CRC does not match the slot's header")
        fields = SLOT.unpack(data)
        generation, seq, published_ns = fields[1], fields[2], fields[4]
        rows, columns, pixel_format, row_stride, flags = fields[5:10]
        if generation != number:
            raise RingError("generation", "the slot holds another frame")
        if seq >> 63 or published_ns > time.monotonic_ns() + 1_000_000_000 or flags > 15 or any(fields[18]):
            raise RingError("field", "a running number, a time or a flag is out of range")
        if not (8 <= rows <= 16384 and 8 <= columns <= 16384) or pixel_format >= len(FORMATS):
            raise RingError("size", "rows, columns or format are out of range")
        if row_stride < columns * CHANNELS[pixel_format] or rows * row_stride > self.header.pixel_bytes:
            raise RingError("size", "the image does not fit into its slot")
        return rows, columns, row_stride

    def _frame(self, data: bytes, pixels: np.ndarray, rows: int, columns: int, row_stride: int) -> Frame:
        fields = SLOT.unpack(data)
        flags, pixels_crc = fields[9], fields[10]
        if self._check_crc and flags & CHECKED and zlib.crc32(pixels.data) != pixels_crc:
            raise RingError("pixels", "the CRC does not match the pixels")
        channels = CHANNELS[fields[7]]
        used = pixels.reshape(rows, row_stride)[:, : columns * channels]
        spacing, crop = fields[11:13], fields[13:17]
        orientation = fields[17].rstrip(b"\0")
        if flags & SPACING and not all(math.isfinite(side) and 1e-4 < side < 100 for side in spacing):
            raise RingError("field", "the spacing does not lie between 0.0001 and 100 mm")
        if not (orientation.isalpha() or orientation == b"") or (flags & CROP and crop[2:] != (rows, columns)):
            raise RingError("field", "orientation or crop is out of range")
        return Frame(
            pixels=used if channels == 1 else used.reshape(rows, columns, channels),
            pixel_format=FORMATS[fields[7]],
            video_range=VideoRange.LIMITED if flags & LIMITED else VideoRange.FULL,
            spacing_mm=(spacing[0], spacing[1]) if flags & SPACING else None,
            seq=fields[2],
            t_source_ns=None if fields[3] == NO_TIME else fields[3],
            t_recv_ns=min(fields[4], time.monotonic_ns()),
            orientation=orientation.decode("ascii") or None,
            crop=(crop[0], crop[1], crop[2], crop[3]) if flags & CROP else None,
        )

    def _read(self, count: int, at: int) -> bytes:
        data = os.pread(self._file, count, at)
        if len(data) != count:
            raise RingError("size", "the object was cut short")
        return data


__all__ = [
    "CHANNELS",
    "CHECKED",
    "CROP",
    "FORMATS",
    "HEADER_BYTES",
    "LIMITED",
    "MAGIC",
    "MAX_PIXEL_BYTES",
    "MAX_SLOTS",
    "NO_TIME",
    "RING",
    "RING_CHECKED_BYTES",
    "SLOT",
    "SLOT_CHECKED",
    "SPACING",
    "STATE",
    "STATE_OFFSET",
    "VERSION",
    "WAKES_OFFSET",
    "RingError",
    "RingHeader",
    "RingReader",
    "unpack_ring",
]
