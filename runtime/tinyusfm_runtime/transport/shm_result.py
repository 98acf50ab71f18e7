"""The ring of readings of runtime/capi/tue_shm_result.h.

A writer and a reader in Python.

``tinyusfm-run --sink shm-out:NAME`` writes such a ring; a program that shows readings takes the newest one, in C or
here. Locking, numbering and heartbeat are those of the ring of frames (shm_ring.py), and as there the reader copies
with ``pread`` and trusts no field.

Shapes: HW = rows, columns of the model's input.
"""

from __future__ import annotations

import math
import os
import stat
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.transport import shm_ring as ring
from tinyusfm_runtime.transport.owned_ring import FOLDER, NAME, SLOTS, OwnedRing, RingKind

MAGIC, VERSION = b"TUERES01", 1
SLOT_BYTES = 256
_KIND = RingKind(magic=MAGIC, version=VERSION, slot_header_bytes=SLOT_BYTES, title="ring of readings", payload="mask")
"""A slot's header."""
SLOT = struct.Struct("<QQqqq4I4i4i2i10d2qI2i8fiI4B2I")
"""tue_res_slot."""
FLAGS = ("valid", "verified", "degraded", "stale", "withheld", "measured", "found", "touches_border", "answered")
"""enum tue_res_flags, the first is 1."""
STATES = ("live", "stale", "frozen", "lost", "degraded")
TRUST = ("unchecked", "good", "doubtful", "none")
REASONS = ("confidence", "agreement", "border", "sector", "size", "spacing", "drift")
"""enum tusfm_reason, the first is 1."""
SECOND_PASS = ("never", "not needed", "done", "off")
DRIFT = ("not checked", "checked", "not applied")
MAX_SCORES = 8
_NUMBERS = (
    "hc_mm", "major_mm", "minor_mm", "centre_row", "centre_column", "major_px", "minor_px", "angle_deg", "confidence",
    "infer_ms",
)  # fmt: skip
_DEAD_NS, _RENEWED_NS = 1_000_000_000, 50_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RingReading:
    """One reading as it stands in the ring.

    Attributes:
        seq: of the frame.
        t_recv_ns: ``time.monotonic_ns`` at the frame's reception, or None.
        t_publish_ns: when it was written; filled in by the writer.
        valid, verified, degraded, stale, withheld, measured, found, touches_border, answered: as in ``LiveResult`` and
            its prediction.
        state: of the stream, a LiveState's value.
        mask_HW: uint8 labels at the input's size, or None.
        crop: (row, column, height, width) of the frame that the model saw.
        box: where that lies in the mask.
        frame_size: (rows, columns) of the frame.
        hc_mm, major_mm, minor_mm, centre_row, centre_column, major_px, minor_px, angle_deg, confidence, infer_ms:
            numbers, NaN where they are not known.
        area_px: of the component.
        dropped: frames left out since the last reading.
        trust: ``unchecked``, ``good``, ``doubtful`` or ``none``.
        level: place of the artefact among the bundle's, 0 is the chosen one.
        scores: of a classifier, at most eight.
        exit_index: of a model with early exits, or -1.
        reasons: what speaks against it, names of ``reading.Reason``.
        second_pass: what became of the second pass.
        drift_status: whether the frame was compared with the calibration frames.
        strange: it was, and does not look like them.
        cut_by_sector: the edge of the field of view cuts the mask.
    """

    seq: int
    t_recv_ns: int | None = None
    t_publish_ns: int = 0
    valid: bool = False
    verified: bool = False
    degraded: bool = False
    stale: bool = False
    withheld: bool = False
    measured: bool = False
    found: bool = False
    touches_border: bool = False
    answered: bool = True
    state: str = "live"
    mask_HW: np.ndarray | None = None
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    frame_size: tuple[int, int] = (0, 0)
    hc_mm: float = math.nan
    major_mm: float = math.nan
    minor_mm: float = math.nan
    centre_row: float = math.nan
    centre_column: float = math.nan
    major_px: float = math.nan
    minor_px: float = math.nan
    angle_deg: float = math.nan
    confidence: float = math.nan
    infer_ms: float = math.nan
    area_px: int = 0
    dropped: int = 0
    trust: str = "unchecked"
    level: int = 0
    scores: tuple[float, ...] = ()
    exit_index: int = -1
    reasons: tuple[str, ...] = ()
    second_pass: str = "never"
    drift_status: str = "not checked"
    strange: bool = False
    cut_by_sector: bool = False


def pack_reading(made: RingReading, number: int) -> bytes:
    """A slot's header, the lock of a whole reading included.

    Args:
        made: what it says.
        number: of the reading in the ring, from 1.
    """
    flags = sum(1 << bit for bit, name in enumerate(FLAGS) if getattr(made, name))
    mask = made.mask_HW
    shape, crc = (
        (0, 0) if mask is None else mask.shape,
        0 if mask is None else zlib.crc32(np.ascontiguousarray(mask).data),
    )
    scores = (*made.scores[:MAX_SCORES], *[0.0] * (MAX_SCORES - len(made.scores[:MAX_SCORES])))
    body = SLOT.pack(
        2 * number, number, made.seq, ring.NO_TIME if made.t_recv_ns is None else made.t_recv_ns, time.monotonic_ns(),
        flags, STATES.index(made.state), *shape, *made.crop, *made.box, *made.frame_size,
        *(getattr(made, name) for name in _NUMBERS), made.area_px, made.dropped, TRUST.index(made.trust), made.level,
        min(len(made.scores), MAX_SCORES), *scores, made.exit_index,
        sum(1 << bit for bit, name in enumerate(REASONS) if name in made.reasons), SECOND_PASS.index(made.second_pass),
        DRIFT.index(made.drift_status), made.strange, made.cut_by_sector, crc, 0,
    )  # fmt: skip
    return body[:-4] + zlib.crc32(body[8:-4]).to_bytes(4, "little")


def unpack_reading(data: bytes, number: int, mask_bytes: int) -> tuple[RingReading, int]:
    """Checks a slot's header.

    Args:
        data: its SLOT_BYTES bytes.
        number: of the reading that it should hold.
        mask_bytes: room for a mask in a slot.

    Returns:
        The reading, its mask zeros of the right shape or None, and the CRC-32 that the mask's bytes must have.

    Raises:
        RingError: it is damaged.
    """
    if zlib.crc32(data[8:-4]) != int.from_bytes(data[-4:], "little"):
        raise ring.RingError("crc", "the CRC does not match the slot's header")
    (_, generation, seq, t_recv_ns, t_publish_ns, flags, state, rows, columns, *rest) = SLOT.unpack(data)
    crop, box, size = tuple(rest[0:4]), tuple(rest[4:8]), tuple(rest[8:10])
    numbers, (area, dropped, trust, level, count) = rest[10:20], rest[20:25]
    scores, exit_index, mask_crc = rest[25:33], rest[33], rest[39]
    reasons, second_pass, drift, strange, cut = rest[34:39]
    if generation != number:
        raise ring.RingError("generation", "the slot holds another reading")
    if (
        flags >> len(FLAGS)
        or state >= len(STATES)
        or trust >= len(TRUST)
        or not 0 <= count <= MAX_SCORES
        or reasons >> len(REASONS)
        or second_pass >= len(SECOND_PASS)
        or drift >= len(DRIFT)
        or strange > 1
        or cut > 1
    ):
        raise ring.RingError("field", "a flag, a state or a count is out of range")
    if rows > 4096 or columns > 4096 or rows * columns > mask_bytes or min(*crop, *box) < 0:
        raise ring.RingError("size", "the mask does not fit into its slot")
    fits = box[0] + box[2] <= rows and box[1] + box[3] <= columns
    if rows and not (fits and crop[0] + crop[2] <= size[0] and crop[1] + crop[3] <= size[1]):
        raise ring.RingError("size", "crop or box lie outside")
    named = {name: bool(flags >> bit & 1) for bit, name in enumerate(FLAGS)}
    made = RingReading(
        seq=seq, t_recv_ns=None if t_recv_ns == ring.NO_TIME else t_recv_ns, t_publish_ns=t_publish_ns, **named,
        state=STATES[state], mask_HW=np.zeros((rows, columns), np.uint8) if rows else None, crop=crop, box=box,
        frame_size=size, **dict(zip(_NUMBERS, numbers, strict=True)), area_px=area, dropped=dropped,
        trust=TRUST[trust], level=level, scores=tuple(scores[:count]), exit_index=exit_index,
        reasons=tuple(name for bit, name in enumerate(REASONS) if reasons >> bit & 1),
        second_pass=SECOND_PASS[second_pass], drift_status=DRIFT[drift], strange=bool(strange), cut_by_sector=bool(cut),
    )  # fmt: skip
    return made, mask_crc


class ResultWriter(OwnedRing):
    """A ring of readings that is there from the moment this is made.

    A context manager.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``.
        mask_bytes: room for the largest mask, 64 .. 2^30.

    Raises:
        OutputError: the name cannot be used, or there is no shared memory or no room in it.
    """

    def __init__(self, name: str, mask_bytes: int) -> None:
        super().__init__(name, mask_bytes, _KIND)

    def write(self, made: RingReading) -> None:
        """Publishes a reading.

        Raises:
            OutputError: its mask is larger than a slot.
        """
        mask = None if made.mask_HW is None else np.ascontiguousarray(made.mask_HW, np.uint8)
        number = self.published + 1
        self.publish(lambda: pack_reading(made, number), mask)


class ResultReader:
    """Takes the newest reading of a ring.

    Attaches by itself, and again after a writer that came back.

    Args:
        name: of the ring; it need not be there yet.

    Raises:
        InputError: the name cannot be used.

    Attributes:
        damaged: readings that were refused.
        torn: reads that met the writer.
    """

    def __init__(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise InputError("a ring of readings is named with letters, digits, . _ and -")
        self.damaged = self.torn = 0
        self._path: Path = FOLDER / name
        self._file: int | None = None
        self._taken = self._stride = self._mask_bytes = self._slots = 0
        self._identity = (0, 0)
        self._looked_ns = 0

    def newest(self) -> RingReading | None:
        """The newest reading that was not taken yet.

        None if there is none, the ring is away, or it is damaged.
        """
        if self._file is None and not self._attach():
            return None
        assert self._file is not None
        try:
            number, heartbeat_ns = ring.STATE.unpack(self._read(ring.STATE.size, ring.STATE_OFFSET))
            now_ns = time.monotonic_ns()
            if not self._taken and now_ns - heartbeat_ns > _DEAD_NS:
                self._taken = number  # the last reading of a writer that died is not one of now
            if number <= self._taken or number >> 62:
                self._come_over(now_ns)
                return None
            made = self._take(number)
        except ring.RingError as error:
            if error.reason == "torn":
                self.torn += 1
                return None
            self.damaged += 1
            self.close()
            return None
        self._taken, self._looked_ns = number, now_ns
        return made

    def close(self) -> None:
        """Detaches from the ring; the next call attaches again."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def __del__(self) -> None:
        self.close()

    def _take(self, number: int) -> RingReading:
        at = ring.HEADER_BYTES + (number - 1) % self._slots * self._stride
        data = self._read(SLOT_BYTES, at)
        lock = int.from_bytes(data[:8], "little")
        if lock != 2 * number:
            raise ring.RingError(
                "torn" if lock & 1 or lock > 2 * number else "generation", "the slot holds another reading"
            )
        made, mask_crc = unpack_reading(data, number, self._mask_bytes)
        if made.mask_HW is not None:
            raw = self._read(made.mask_HW.size, at + SLOT_BYTES)
            if self._read(8, at) != data[:8]:
                raise ring.RingError("torn", "the writer came round")
            if zlib.crc32(raw) != mask_crc:
                raise ring.RingError("pixels", "the CRC does not match the mask")
            made.mask_HW[:] = np.frombuffer(raw, np.uint8).reshape(made.mask_HW.shape)
        return made

    def _attach(self) -> bool:
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        self._file = file
        try:
            facts = os.fstat(file)
            if not stat.S_ISREG(facts.st_mode):
                raise ring.RingError("ring", "no shared-memory object")
            self._slots, self._stride, self._mask_bytes = _checked_header(
                self._read(ring.HEADER_BYTES, 0), facts.st_size
            )
        except ring.RingError:
            self.damaged += 1
            self.close()
            return False
        self._taken, self._identity, self._looked_ns = 0, (facts.st_dev, facts.st_ino), time.monotonic_ns()
        return True

    def _come_over(self, now_ns: int) -> None:
        if now_ns - self._looked_ns < _RENEWED_NS:
            return
        self._looked_ns = now_ns
        try:
            facts = self._path.lstat()
            same = self._identity == (facts.st_dev, facts.st_ino)
        except OSError:
            same = False
        if not same:
            self.close()

    def _read(self, count: int, at: int) -> bytes:
        assert self._file is not None
        data = os.pread(self._file, count, at)
        if len(data) != count:
            raise ring.RingError("size", "the object was cut short")
        return data


def _checked_header(data: bytes, object_bytes: int) -> tuple[int, int, int]:
    """Slots, bytes from slot to slot, room for a mask."""
    magic, version, slots, stride, mask_bytes, _, _, crc, reserved, *_ = ring.RING.unpack(data)
    if magic != MAGIC or version != VERSION:
        raise ring.RingError("ring", "no ring of readings of this version, or not finished yet")
    if crc != zlib.crc32(data[: ring.RING_CHECKED_BYTES]) or any(reserved):
        raise ring.RingError("ring", "the CRC does not match its header")
    fits = 2 <= slots <= ring.MAX_SLOTS and stride % 64 == 0 and mask_bytes + SLOT_BYTES <= stride
    if not fits or ring.HEADER_BYTES + slots * stride > object_bytes:
        raise ring.RingError("ring", "slots or sizes are out of range")
    return slots, stride, mask_bytes


__all__ = [
    "DRIFT",
    "FLAGS",
    "MAGIC",
    "MAX_SCORES",
    "REASONS",
    "SECOND_PASS",
    "SLOT",
    "SLOTS",
    "SLOT_BYTES",
    "STATES",
    "TRUST",
    "VERSION",
    "ResultReader",
    "ResultWriter",
    "RingReading",
    "pack_reading",
    "unpack_reading",
]
