"""Ten thousand damaged OpenIGTLink messages and as many damaged ring headers: none crashes, hangs or passes as valid.

Damage to what the receiver believes must show: pixels, size, type and geometry are those that were sent, or there is
no frame. Each fuzz is run again on a reader without its CRC, which must let damage through, or the fuzz proves nothing.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.transport import shm_ring
from tinyusfm_runtime.transport.igtl_stream import EndOfStream, MessageReader
from tinyusfm_runtime.transport.igtl_wire import (
    HEADER_BYTES,
    IgtlEnvelope,
    WireError,
    pack_image,
    pack_status,
    unpack_image,
)
from tinyusfm_runtime.transport.shm_writer import FOLDER, ShmWriter

NUM_MUTANTS = 10_000
SPACING_MM = (0.25, 0.5)
PIXELS = np.random.default_rng(5).integers(0, 256, (12, 16), dtype=np.uint8)
RUBBISH = [b"\xff" * 8, b"\0" * 8, b"\x7f\xff\xff\xff\xff\xff\xff\xff", b"IMAGE\0\0\0", b"\x00\x02\x00\x0c\0\0\0\0"]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to three changes: a bit, a byte, a stretch, a cut, an insertion, two stretches exchanged."""
    spoilt = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        # half of the damage hits the first 160 bytes, where lengths and types are
        at = draw.randrange(min(len(spoilt), 160) if draw.random() < 0.5 else len(spoilt))
        kind = draw.randrange(6)
        if kind == 0:
            spoilt[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            spoilt[at] = draw.randrange(256)
        elif kind == 2:
            piece = draw.choice(RUBBISH)
            spoilt[at : at + len(piece)] = piece
        elif kind == 3:
            del spoilt[at : at + draw.randrange(1, 40)]
        elif kind == 4:
            spoilt[at:at] = draw.randbytes(draw.randrange(1, 40))
        else:
            other = draw.randrange(len(spoilt))
            spoilt[at : at + 8], spoilt[other : other + 8] = spoilt[other : other + 8], spoilt[at : at + 8]
        if not spoilt:
            spoilt = bytearray(b"\0")
    return bytes(spoilt)


def chunks(data: bytes, draw: random.Random) -> Iterator[bytes]:
    while data:
        size = draw.choice([1, 7, 58, 500, 100_000])
        yield data[:size]
        data = data[size:]


class Pipe:
    """A non-blocking stream in memory."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def receive_into(self, room: memoryview) -> int:
        count = min(len(room), len(self._data) - self._at)
        room[:count] = self._data[self._at : self._at + count]
        self._at += count
        return count


def received(stream: bytes, check_crc: bool) -> tuple[list[np.ndarray], list[tuple[float, float]], Counter[str]]:
    """What a receiver makes of a stream: images, their spacing, refusals."""
    reader = MessageReader(Pipe(stream).receive_into, check_crc=check_crc, max_body_bytes=1 << 20)
    images, spacings, refused = [], [], Counter[str]()
    while reader.in_step:
        try:
            message, _ = reader.read()
            if message.header.kind == "IMAGE":
                image = unpack_image(message)
                images.append(image.pixels)
                spacings.append(image.spacing_mm)
        except WireError as error:
            refused[error.reason] += 1
        except EndOfStream:
            break
    return images, spacings, refused


def igtl_fuzz(count: int, check_crc: bool) -> tuple[int, Counter[str], float]:
    """How many wrong images were believed, what was refused, and the slowest stream in seconds."""
    draw = random.Random(20261125)
    wrong, refused, slowest = 0, Counter[str](), 0.0
    for index in range(count):
        version = 1 + index % 2
        around = IgtlEnvelope(
            device="probe",
            t_unix_ns=10**18 + index,
            header_version=version,
            metadata={"k": "v"} if version == 2 else {},
        )
        good = pack_image(PIXELS, around, spacing_mm=SPACING_MM)
        begun = time.perf_counter()
        images, spacings, reasons = received(mutated(good, draw) + pack_status(around) + good, check_crc)
        slowest = max(slowest, time.perf_counter() - begun)
        refused += reasons
        wrong += sum(not same(image, spacing) for image, spacing in zip(images, spacings, strict=True))
    return wrong, refused, slowest


def same(pixels: np.ndarray, spacing_mm: tuple[float, float] | None) -> bool:
    return pixels.dtype == np.uint8 and np.array_equal(pixels, PIXELS) and spacing_mm == SPACING_MM


def test_ten_thousand_damaged_messages() -> None:
    wrong, refused, slowest = igtl_fuzz(NUM_MUTANTS, check_crc=True)
    assert wrong == 0
    assert sum(refused.values()) > NUM_MUTANTS // 2 and {"crc", "header", "size"} <= set(refused), refused
    assert slowest < 1, "no stream takes a second"


def test_without_the_crc_damaged_messages_pass() -> None:
    wrong, _, _ = igtl_fuzz(500, check_crc=False)
    assert wrong > 50


def test_a_stream_in_crumbs_is_the_same_stream() -> None:
    good = pack_image(PIXELS, IgtlEnvelope(device="probe"), spacing_mm=SPACING_MM)
    pieces = list(chunks(good + good, random.Random(1)))
    waiting: list[bytes] = []

    def receive_into(room: memoryview) -> int:
        if not waiting:
            raise BlockingIOError
        piece = waiting.pop()
        count = min(len(room), len(piece))
        room[:count] = piece[:count]
        if count < len(piece):
            waiting.append(piece[count:])
        return count

    reader, seen = MessageReader(receive_into), 0
    for piece in pieces:
        waiting.append(piece)
        with suppress(BlockingIOError):
            while True:
                np.testing.assert_array_equal(unpack_image(reader.read()[0]).pixels, PIXELS)
                seen += 1
    assert seen == 2 and reader.half_since_ns is None


def test_a_length_that_lies_is_seen_before_its_bytes_are_waited_for() -> None:
    good = bytearray(pack_image(PIXELS, IgtlEnvelope(device="probe")))
    good[42:50] = (1 << 19).to_bytes(8, "big")
    images, _, refused = received(bytes(good), check_crc=True)
    assert not images and refused == {"size": 1}
    assert len(good) > HEADER_BYTES


# the ring


@pytest.fixture
def ring_bytes() -> bytes:
    """A ring of two frames, as bytes."""
    if not FOLDER.is_dir():
        pytest.skip("no /dev/shm here")
    with ShmWriter(f"tinyusfm-fuzz-{os.getpid()}", PIXELS.nbytes) as writer:
        writer.write(Frame(pixels=PIXELS[::-1], spacing_mm=SPACING_MM, seq=1), t_source_ns=1)
        writer.write(Frame(pixels=PIXELS, spacing_mm=SPACING_MM, seq=2, orientation="MF"), t_source_ns=2)
        return (FOLDER / writer.name).read_bytes()


def ring_fuzz(data: bytes, place: Path, count: int, check_crc: bool) -> tuple[int, Counter[str], float]:
    """How many wrong frames were believed, what was refused, and the slowest read in seconds."""
    draw = random.Random(7)
    stride = shm_ring.unpack_ring(data[:128], len(data)).slot_stride
    headers = [range(128), range(128, 256), range(128 + stride, 256 + stride)]
    wrong, refused, slowest = 0, Counter[str](), 0.0
    place.write_bytes(data)
    file = os.open(place, os.O_RDWR)
    try:
        for _ in range(count):
            spoilt = bytearray(data)
            for _ in range(draw.choice([1, 1, 2, 3])):
                at = draw.choice(draw.choice(headers))
                piece = draw.choice(
                    [bytes([spoilt[at] ^ 1 << draw.randrange(8)]), draw.randbytes(1), b"\xff" * 8, b"\0" * 8]
                )
                spoilt[at : at + len(piece)] = piece
            if draw.random() < 0.05:
                spoilt = spoilt[: draw.randrange(len(spoilt))]
            os.ftruncate(file, len(spoilt))
            os.pwrite(file, spoilt, 0)
            begun = time.perf_counter()
            try:
                reader = shm_ring.RingReader(file, check_crc=check_crc)
                frame = reader.read(reader.state()[0])
                wrong += not (
                    same(frame.pixels, frame.spacing_mm) and frame.seq == 2 and frame.orientation == "MF"
                ) and (
                    # a count that was set back points at the older frame; the source does not go back to it
                    not np.array_equal(frame.pixels, PIXELS[::-1]) or frame.seq != 1 or reader.state()[0] != 1
                )
            except shm_ring.RingError as error:
                refused[error.reason] += 1
            except Exception as error:
                if check_crc:
                    raise
                refused[type(error).__name__] += 1
            slowest = max(slowest, time.perf_counter() - begun)
    finally:
        os.close(file)
    return wrong, refused, slowest


def test_ten_thousand_damaged_ring_headers(ring_bytes: bytes, tmp_path: Path) -> None:
    wrong, refused, slowest = ring_fuzz(ring_bytes, tmp_path / "ring", NUM_MUTANTS, check_crc=True)
    assert refused["ring"] > 1000 and refused["crc"] + refused["generation"] > 1000, refused
    assert wrong == 0 and slowest < 1


def test_without_the_crc_damaged_ring_headers_pass(ring_bytes: bytes, tmp_path: Path) -> None:
    wrong, _, _ = ring_fuzz(ring_bytes, tmp_path / "ring", 1000, check_crc=False)
    assert wrong > 20


def test_pixels_changed_in_the_ring_are_seen(ring_bytes: bytes, tmp_path: Path) -> None:
    stride = shm_ring.unpack_ring(ring_bytes[:128], len(ring_bytes)).slot_stride
    spoilt = bytearray(ring_bytes)
    spoilt[256 + stride + 5] ^= 1
    (tmp_path / "ring").write_bytes(spoilt)
    with (tmp_path / "ring").open("rb") as file:
        with pytest.raises(shm_ring.RingError) as caught:
            shm_ring.RingReader(file.fileno()).read(2)
        assert caught.value.reason == "pixels"
        assert np.array_equal(shm_ring.RingReader(file.fileno(), check_crc=False).read(2).pixels, spoilt_pixels())


def spoilt_pixels() -> np.ndarray:
    changed = PIXELS.copy()
    changed.reshape(-1)[5] ^= 1
    return changed
