"""A ring of slots in shared memory, from its writer's side.

Made, filled slot by slot, unlinked.
What a slot holds is the affair of shm_writer.py (frames) and shm_result.py (readings); shm_ring.py has the layout of
the ring's own header. Each slot begins with a lock word that is odd while the slot is written.
"""

from __future__ import annotations

import mmap
import os
import re
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.transport import shm_ring as ring
from tinyusfm_runtime.transport.closing import ClosedOnExit
from tinyusfm_runtime.transport.ring_wait import Waker, can_wake

FOLDER = Path("/dev/shm")
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
SLOTS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RingKind:
    """What distinguishes one kind of ring from another.

    Attributes:
        magic: first eight bytes.
        version: of the layout.
        slot_header_bytes: of the header of each slot.
        title: of the ring, for messages.
        payload: what follows the header of a slot, for messages.
    """

    magic: bytes
    version: int
    slot_header_bytes: int
    title: str
    payload: str


class OwnedRing(ClosedOnExit):
    """A ring that is there from the moment this is made.

    A context manager.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``.
        payload_bytes: room for the largest payload, 64 .. 2^30.
        kind: of ring.

    Raises:
        OutputError: the name cannot be used, or there is no shared memory or no room in it.
    """

    def __init__(self, name: str, payload_bytes: int, kind: RingKind) -> None:
        if not NAME.fullmatch(name) or not 64 <= payload_bytes <= ring.MAX_PIXEL_BYTES:
            raise OutputError(
                f"a ring needs a name of letters, digits, . _ - and room for 64 bytes to 1 GiB for a {kind.payload}"
            )
        self.name, self.published, self._kind, self._room = name, 0, kind, payload_bytes
        self._stride = -(-(kind.slot_header_bytes + payload_bytes) // 64) * 64
        self._path = FOLDER / name
        size = ring.HEADER_BYTES + SLOTS * self._stride
        temporary = FOLDER / f".{name}.{os.getpid()}"
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
            self._waker = Waker(self._memory)
            temporary.rename(self._path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise OutputError(f"the {kind.title} cannot be made: {error.strerror}") from error

    def publish(self, header: Callable[[], bytes], payload: np.ndarray | None, *, spoil_at: int | None = None) -> None:
        """Fills the next slot and wakes whoever waits for it.

        Args:
            header: makes the slot's header, once the payload is there: the time in it is that of publishing. Its first
                eight bytes are the lock and are not taken.
            payload: uint8, C order, or None.
            spoil_at: byte of the payload to change behind its checksum's back, or None.

        Raises:
            OutputError: the payload is larger than a slot.
        """
        size = 0 if payload is None else payload.nbytes
        if size > self._room:
            raise OutputError(f"a {self._kind.payload} of {size} bytes does not fit into slots of {self._room}")
        number = self.published + 1
        at = ring.HEADER_BYTES + self.published % SLOTS * self._stride
        start, memory = at + self._kind.slot_header_bytes, self._memory
        memory[at : at + 8] = (2 * number - 1).to_bytes(8, "little")
        if payload is not None:
            memory[start : start + size] = payload.reshape(-1).data
        if spoil_at is not None:
            memory[start + spoil_at] ^= 0xFF
        memory[at + 8 : start] = header()[8:]
        memory[at : at + 8] = (2 * number).to_bytes(8, "little")
        self.published = number
        memory[ring.STATE_OFFSET : ring.STATE_OFFSET + 8] = number.to_bytes(8, "little")
        self.keep_alive()
        self._waker.wake()

    def keep_alive(self) -> None:
        """Says that the writer lives."""
        at = ring.STATE_OFFSET + 8
        self._memory[at : at + 8] = time.monotonic_ns().to_bytes(8, "little")

    def close(self) -> None:
        """Unmaps the memory and unlinks the name if it still means this ring. Idempotent."""
        if self._memory.closed:
            return
        with suppress(OSError):
            facts = self._path.stat()
            if (facts.st_dev, facts.st_ino) == self._identity:
                self._path.unlink()
        self._waker.close()
        self._memory.close()

    def _fill_header(self) -> None:
        fixed = (self._kind.version, SLOTS, self._stride, self._room, time.time_ns(), os.getpid())
        unsigned = ring.RING.pack(self._kind.magic, *fixed, 0, b"", 0, time.monotonic_ns(), can_wake(), b"")
        crc = zlib.crc32(unsigned[: ring.RING_CHECKED_BYTES])
        whole = ring.RING.pack(self._kind.magic, *fixed, crc, b"", 0, time.monotonic_ns(), can_wake(), b"")
        self._memory[8 : ring.HEADER_BYTES] = whole[8:]
        self._memory[:8] = whole[:8]


__all__ = ["FOLDER", "NAME", "SLOTS", "OwnedRing", "RingKind"]
