"""ShmWriter: frames into a shared-memory ring.

As runtime/capi/shm_writer.c does it, in Python for replays and tests.

Python's stores into a mapping have no fences of their own; on x86 and for a replay that is enough, and the pixels
always carry their CRC. A scanner's process takes the C writer. It does not know pacing or faults.
"""

from __future__ import annotations

import time
import zlib

import numpy as np

from tinyusfm_runtime.frame import Frame, VideoRange
from tinyusfm_runtime.transport import shm_ring as ring
from tinyusfm_runtime.transport.owned_ring import FOLDER, NAME, SLOTS, OwnedRing, RingKind

_KIND = RingKind(
    magic=ring.MAGIC,
    version=ring.VERSION,
    slot_header_bytes=ring.HEADER_BYTES,
    title="shared-memory ring",
    payload="frame",
)


class ShmWriter(OwnedRing):
    """A ring that is there from the moment this is made.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``.
        pixel_bytes: room for the largest frame, 64 .. MAX_PIXEL_BYTES.

    Raises:
        OutputError: the name cannot be used, or there is no shared memory or no room in it.
    """

    def __init__(self, name: str, pixel_bytes: int) -> None:
        super().__init__(name, pixel_bytes, _KIND)
        self.pixel_bytes = pixel_bytes

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
        seq = frame.seq if seq is None else seq
        time_ns = frame.t_source_ns if t_source_ns is None else t_source_ns
        number, crc = self.published + 1, zlib.crc32(pixels.data)
        self.publish(lambda: pack_slot(frame, number, crc, seq, time_ns), pixels, spoil_at=spoil_at)


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
