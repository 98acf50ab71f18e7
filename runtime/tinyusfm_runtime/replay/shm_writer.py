"""ShmWriter: frames into a shared-memory ring, as runtime/capi/shm_writer.c does it, in Python for replays and tests.

Python's stores into a mapping have no fences of their own; on x86 and for a replay that is enough, and the pixels
always carry their CRC. A scanner's process takes the C writer. It does not know pacing or faults.
"""

from __future__ import annotations

import mmap
import os
import re
import time
import zlib
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from tinyusfm_runtime import shm_ring as ring
from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.frame import Frame, VideoRange

FOLDER = Path("/dev/shm")
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
SLOTS = 4


class ShmWriter:
    """A ring that is there from the moment this is made.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``.
        pixel_bytes: room for the largest frame, 64 .. MAX_PIXEL_BYTES.

    Raises:
        OutputError: the name cannot be used, or there is no shared memory or no room in it.
    """

    def __init__(self, name: str, pixel_bytes: int) -> None:
        if not NAME.fullmatch(name) or not 64 <= pixel_bytes <= ring.MAX_PIXEL_BYTES:
            raise OutputError("a ring needs a name of letters, digits, . _ - and room for 64 bytes to 1 GiB a frame")
        self.name, self.published = name, 0
        self._stride = -(-(ring.HEADER_BYTES + pixel_bytes) // 64) * 64
        self.pixel_bytes = pixel_bytes
        size = ring.HEADER_BYTES + SLOTS * self._stride
        temporary = FOLDER / f".{name}.{os.getpid()}"
        self._path = FOLDER / name
        try:
            temporary.unlink(missing_ok=True)
            file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.posix_fallocate(file, 0, size)
                self._memory = mmap.mmap(file, size)
                facts = os.fstat(file)
            finally:
                os.close(file)
            self._identity = (facts.st_dev, facts.st_ino)
            self._fill_header()
            temporary.rename(self._path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OutputError(f"the shared-memory ring cannot be made: {error.strerror}") from error

    def __enter__(self) -> ShmWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """What a reader is given."""
        return f"shm:{self.name}"

    def write(
        self, frame: Frame, *, seq: int | None = None, t_source_ns: int | None = None, spoil_at: int | None = None
    ) -> None:
        """Publishes a frame.

        Args:
            frame: any frame.
            seq: running number instead of the frame's own, 0 .. 2^63 - 1.
            t_source_ns: source time instead of the frame's own.
            spoil_at: byte of the pixels to change after their CRC was taken, or None.

        Raises:
            OutputError: it is larger than a slot.
        """
        pixels = np.ascontiguousarray(frame.pixels)
        if pixels.nbytes > self.pixel_bytes:
            raise OutputError(f"a frame of {pixels.nbytes} bytes does not fit into slots of {self.pixel_bytes}")
        number = self.published + 1
        at = ring.HEADER_BYTES + self.published % SLOTS * self._stride
        time_ns = frame.t_source_ns if t_source_ns is None else t_source_ns
        header = pack_slot(frame, number, zlib.crc32(pixels.data), frame.seq if seq is None else seq, time_ns)
        memory = self._memory
        memory[at : at + 8] = (2 * number - 1).to_bytes(8, "little")
        memory[at + 8 : at + ring.HEADER_BYTES] = header[8:]
        start = at + ring.HEADER_BYTES
        memory[start : start + pixels.nbytes] = pixels.reshape(-1).data
        if spoil_at is not None:
            memory[start + spoil_at] ^= 0xFF
        memory[at : at + 8] = (2 * number).to_bytes(8, "little")
        self.published = number
        memory[ring.STATE_OFFSET : ring.STATE_OFFSET + 8] = number.to_bytes(8, "little")
        self.keep_alive()

    def keep_alive(self) -> None:
        """Says that the writer lives."""
        at = ring.STATE_OFFSET + 8
        self._memory[at : at + 8] = time.monotonic_ns().to_bytes(8, "little")

    def close(self) -> None:
        """Lets go of the memory and takes the name away if it still means this ring; twice is harmless."""
        if self._memory.closed:
            return
        with suppress(OSError):
            facts = self._path.stat()
            if (facts.st_dev, facts.st_ino) == self._identity:
                self._path.unlink()
        self._memory.close()

    def _fill_header(self) -> None:
        fixed = (ring.VERSION, SLOTS, self._stride, self.pixel_bytes, time.time_ns(), os.getpid())
        unsigned = ring.RING.pack(ring.MAGIC, *fixed, 0, b"", 0, time.monotonic_ns(), b"")
        crc = zlib.crc32(unsigned[: ring.RING_CHECKED_BYTES])
        whole = ring.RING.pack(ring.MAGIC, *fixed, crc, b"", 0, time.monotonic_ns(), b"")
        self._memory[8 : ring.HEADER_BYTES] = whole[8:]
        self._memory[:8] = whole[:8]


def pack_slot(frame: Frame, number: int, pixels_crc: int, seq: int, t_source_ns: int | None) -> bytes:
    """A slot's header, lock included.

    Args:
        frame: what it describes; its pixels are taken to be contiguous.
        number: of the frame in the ring, from 1.
        pixels_crc: CRC-32 of the pixels.
        seq: the source's running number.
        t_source_ns: the source's clock, or None.

    Returns:
        HEADER_BYTES bytes.
    """
    rows, columns = frame.pixels.shape[:2]
    kind = ring.FORMATS.index(frame.pixel_format)
    flags = ring.CHECKED
    flags |= ring.SPACING if frame.spacing_mm else 0
    flags |= ring.CROP if frame.crop else 0
    flags |= ring.LIMITED if frame.video_range is VideoRange.LIMITED else 0
    header = ring.SLOT.pack(
        2 * number, number, seq, ring.NO_TIME if t_source_ns is None else t_source_ns, time.monotonic_ns(),
        rows, columns, kind, columns * ring.CHANNELS[kind], flags, pixels_crc,
        *(frame.spacing_mm or (0.0, 0.0)), *(frame.crop or (0, 0, 0, 0)),
        (frame.orientation or "").encode("ascii", "ignore")[:8], b"", 0,
    )  # fmt: skip
    return header[:124] + zlib.crc32(header[ring.SLOT_CHECKED]).to_bytes(4, "little")


__all__ = ["FOLDER", "NAME", "SLOTS", "ShmWriter", "pack_slot"]
