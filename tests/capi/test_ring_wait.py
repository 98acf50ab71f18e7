"""Waiting at a ring, copies from a guarded mapping, lent memory for frames, and the times that the program tells."""

from __future__ import annotations

import ctypes as c
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ring_latency import overheads_ms, read_times
from tests.capi.binding import Failed, Library, Session
from tests.capi.conftest import MakeStub
from tests.capi.test_ring import CWriter, RingFunctions, fresh_name, start_quiet
from tests.conftest import child_environment
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.transport.owned_ring import SLOTS
from tinyusfm_runtime.transport.ring_wait import Waiter, can_wake
from tinyusfm_runtime.transport.shm_result import ResultReader, ResultWriter, RingReading
from tinyusfm_runtime.transport.shm_ring import HEADER_BYTES, STATE_OFFSET, WAKES_OFFSET
from tinyusfm_runtime.transport.shm_writer import ShmWriter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="POSIX shared memory is /dev/shm of Linux")
PATIENCE_S = 120.0
SIDE = 64


@pytest.fixture(scope="module")
def rings(library: Library) -> RingFunctions:
    return RingFunctions(library)


@pytest.fixture
def name() -> Iterator[str]:
    yield from fresh_name()


def picture(seq: int) -> Frame:
    return Frame(pixels=np.full((SIDE, SIDE), seq % 251, np.uint8), seq=seq)


def counted_on_quietly(writer: ShmWriter) -> None:
    """Publishes a number without waking anybody."""
    at = STATE_OFFSET
    writer._memory[at : at + 8] = (writer.published + 1).to_bytes(8, "little")


@pytest.mark.skipif(not can_wake(), reason="Python cannot wake on this machine")
@pytest.mark.parametrize("reads", ["c", "python"])
@pytest.mark.parametrize("wakes", [True, False])
def test_a_reader_sleeps_until_it_is_woken(rings: RingFunctions, name: str, reads: str, wakes: bool) -> None:
    """Woken it comes back long before its time; where the number moves without a wake-up it sleeps on to the end."""
    slept: list[float] = []
    allowed = PATIENCE_S if wakes else 0.5
    with ShmWriter(name, SIDE * SIDE) as writer:
        writer.write(picture(1))
        file = os.open(f"/dev/shm/{name}", os.O_RDONLY)
        reader, waiter = rings.attach(name), Waiter(file, os.pread(file, HEADER_BYTES, 0))
        assert rings.frame(reader)[0] == 1 and reader.wakes == 1 and waiter.usable

        def wait() -> None:
            begin = time.monotonic()
            if reads == "c":
                assert rings.lib.tue_shm_wait(c.byref(reader), allowed * 1e3) == 1
            else:
                assert waiter.wait(1, allowed)
            slept.append(time.monotonic() - begin)

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        if wakes:
            writer.write(picture(2))
        else:
            counted_on_quietly(writer)
        thread.join()
        waiter.close()
        os.close(file)
        rings.lib.tue_shm_detach(c.byref(reader))
    assert slept and (slept[0] < PATIENCE_S / 2 if wakes else slept[0] >= 0.45)


def test_frames_of_a_writer_that_does_not_wake_are_seen_by_looking(rings: RingFunctions, name: str) -> None:
    with ShmWriter(name, SIDE * SIDE) as writer:
        writer._memory[WAKES_OFFSET] = 0
        writer.write(picture(1))
        reader = rings.attach(name)
        assert rings.frame(reader)[0] == 1 and reader.wakes == 0
        quiet = threading.Timer(0.1, counted_on_quietly, [writer])
        quiet.start()
        begin = time.monotonic()
        assert rings.lib.tue_shm_wait(c.byref(reader), PATIENCE_S * 1e3) == 1
        assert time.monotonic() - begin < PATIENCE_S / 2
        quiet.join()
        file = os.open(f"/dev/shm/{name}", os.O_RDONLY)
        waiter = Waiter(file, os.pread(file, HEADER_BYTES, 0))
        assert not waiter.usable and not waiter.wait(1, 1.0), "the caller has to look by itself"
        waiter.close()
        os.close(file)
        rings.lib.tue_shm_detach(c.byref(reader))


def test_waiting_at_a_ring_that_was_cut_short_or_is_away(rings: RingFunctions, name: str) -> None:
    reader = rings.attach(name)
    assert rings.lib.tue_shm_wait(c.byref(reader), 5.0) == 0, "there is no ring"
    with ShmWriter(name, SIDE * SIDE) as writer:
        writer.write(picture(1))
        assert rings.frame(reader)[0] == 1
        file = os.open(f"/dev/shm/{name}", os.O_RDWR)
        waiter = Waiter(file, os.pread(file, HEADER_BYTES, 0))
        os.truncate(file, 0)
        assert rings.lib.tue_shm_wait(c.byref(reader), 5.0) == 0
        assert waiter.wait(1, 0.005), "the kernel refuses the address, and nobody dies"
        assert rings.frame(reader)[0] == 2 and reader.damaged == 1
        waiter.close()
        os.close(file)
        rings.lib.tue_shm_detach(c.byref(reader))


GUARDED = """
import ctypes as c, os, signal, sys
import numpy as np
from tests.capi.binding import Library
from tests.capi.test_ring import RingFunctions
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.transport.shm_writer import ShmWriter
library, name, handler = sys.argv[1:]
rings = RingFunctions(Library(library))
assert rings.lib.tue_shm_guard() == 0
side = 512
with ShmWriter(name, side * side) as writer:
    reader = rings.attach(name)
    for seq in range(8):
        writer.write(Frame(pixels=np.full((side, side), seq, np.uint8), seq=seq))
        found, fields, pixels = rings.frame(reader)
        assert found == 1 and (pixels[: side * side] == seq).all()
    assert reader.map_bytes > 4 * side * side, "the whole ring is mapped"
    writer.write(Frame(pixels=np.full((side, side), 9, np.uint8), seq=9))
    if handler == "none":
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
    end = 128 + (writer.published - 1) % 4 * writer._stride + 4 * 4096
    os.truncate(f"/dev/shm/{name}", end)  # the slot's header is there, most of its pixels are not
    assert rings.frame(reader)[0] == 2 and reader.damaged == 1 and reader.map is None
    assert rings.frame(reader)[0] == 0, "what is left is no ring"
    rings.lib.tue_shm_detach(c.byref(reader))
print("survived")
"""


@pytest.mark.parametrize("handler", ["ours", "none"])
def test_a_writer_that_takes_memory_away_costs_a_frame_not_the_reader(
    build_folder: Path, name: str, handler: str
) -> None:
    """The control has no handler, and dies."""
    command = [sys.executable, "-c", GUARDED, str(build_folder / "libtinyusfm.so"), name, handler]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False, timeout=600)
    wanted = 0 if handler == "ours" else -signal.SIGBUS
    assert done.returncode == wanted, done.stderr
    assert (done.stdout == "survived\n") == (handler == "ours")


def test_a_foreign_sigbus_ends_a_guarded_program_as_ever(build_folder: Path, tmp_path: Path) -> None:
    script = (
        "import ctypes as c, mmap, os, sys\nfrom tests.capi.binding import Library\n"
        "assert Library(sys.argv[1]).lib.tue_shm_guard() == 0\n"
        "f = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT); os.truncate(f, 8192)\n"
        "m = mmap.mmap(f, 8192); os.truncate(f, 0)\n"
        "print(m[5000])"
    )
    command = [sys.executable, "-c", script, str(build_folder / "libtinyusfm.so"), str(tmp_path / "file")]
    done = subprocess.run(command, env=child_environment(), capture_output=True, check=False, timeout=600)
    assert done.returncode == -signal.SIGBUS, done.stderr


def test_the_program_outlives_a_writer_that_takes_memory_away(
    build_folder: Path, make_stub: MakeStub, name: str
) -> None:
    program = start_quiet(build_folder, make_stub(), f"shm:{name}", "--sink", f"shm-out:{name}-out")
    reader, seq = ResultReader(f"{name}-out"), 0
    try:
        for _round in range(6):
            seen, end = None, time.monotonic() + 900
            with ShmWriter(name, 512 * 512) as writer:
                while seen is None and time.monotonic() < end:
                    seq += 1
                    writer.write(Frame(pixels=np.full((512, 512), seq % 251, np.uint8), seq=seq))
                    time.sleep(0.005)
                    found = reader.newest()
                    seen = found if found is not None and found.seq > seq - 50 else None
                assert seen is not None and program.poll() is None
                writer.write(Frame(pixels=np.full((512, 512), 7, np.uint8), seq=seq + 1))
                at = 128 + (writer.published - 1) % SLOTS * writer._stride
                os.truncate(f"/dev/shm/{name}", at + 3 * mmap.PAGESIZE)
                time.sleep(0.02)
                seq += 1
        assert program.poll() is None
    finally:
        program.terminate()
        program.wait()


def test_checksums_of_masks_are_those_of_zlib(rings: RingFunctions, name: str) -> None:
    rng, writer, reader = np.random.default_rng(5), CWriter(), ResultReader(name)
    assert rings.lib.tue_res_open(c.byref(writer), name.encode(), 70000) == 0
    with ResultWriter(f"{name}-b", 70000) as other:
        theirs = rings.attach(f"{name}-b")
        for rows, columns in [*((1, n) for n in range(1, 300)), (200, 331), (256, 256), (3, 4095)]:
            mask = rng.integers(0, 256, (rows, columns), np.uint8)
            slot = bytearray(256)
            slot[48:56] = rows.to_bytes(4, "little") + columns.to_bytes(4, "little")
            raw = (c.c_uint8 * 256).from_buffer(slot)
            assert rings.lib.tue_res_write(c.byref(writer), raw, mask.ctypes.data) == 0
            found = reader.newest()
            assert found is not None and reader.damaged == 0, (rows, columns, zlib.crc32(mask.data))
            np.testing.assert_array_equal(found.mask_HW, mask)
            other.write(RingReading(seq=1, mask_HW=mask))
            back = np.zeros(70000, np.uint8)
            assert rings.lib.tue_res_newest(c.byref(theirs), raw, back.ctypes.data, 70000) == 1
            np.testing.assert_array_equal(back[: mask.size].reshape(mask.shape), mask)
        rings.lib.tue_shm_detach(c.byref(theirs))
    rings.lib.tue_shm_close(c.byref(writer), 1)


def test_frames_in_lent_memory_are_read_like_copied_ones(library: Library, make_stub: MakeStub) -> None:
    rng = np.random.default_rng(2)
    with Session(library, make_stub()) as session:
        for seq in range(12):
            rows, columns, more = (int(n) for n in (*rng.integers(40, 120, 2), seq % 3 * 5))
            pixels = rng.integers(0, 256, (rows, columns + more), np.uint8)
            place = session.room(pixels.size)
            assert session.room(10) == place, "until it is submitted it stays the same"
            c.memmove(place, pixels.ctypes.data, pixels.size)
            wanted: dict[str, int] = (
                {"roi_row": 3, "roi_column": 4, "roi_rows": 30, "roi_columns": 31} if seq % 2 else {}
            )
            facts = {"rows": rows, "columns": columns, "row_stride": columns + more, "seq": 2 * seq, **wanted}
            results = []
            for number, address in enumerate((place, pixels.ctypes.data)):
                frame = library.make("frame", **{**facts, "seq": 2 * seq + number, "pixels": address})
                session.submit(frame)
                found = None
                while found is None:
                    found = session.newest(1000.0)
                results.append((bytes(c.string_at(found.mask, found.mask_rows * found.mask_columns)), found.area_px))
            assert results[0] == results[1]


def test_a_frame_that_leaves_lent_memory_is_refused(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub()) as session:
        place = session.room(64 * 64)
        frame = library.make("frame", pixels=place, rows=65, columns=64, row_stride=64)
        with pytest.raises(Failed, match="tusfm_room") as failed:
            session.submit(frame)
        assert failed.value.code == "FRAME"
        for count in (0, -1, 1 << 40):
            with pytest.raises(Failed, match="bytes"):
                session.room(count)
        session.submit(library.make("frame", pixels=place, rows=64, columns=64, row_stride=64))


def test_the_program_says_when_frames_and_readings_were_published(
    build_folder: Path, make_stub: MakeStub, name: str, tmp_path: Path
) -> None:
    words = [f"shm:{name}", "--sink", f"shm-out:{name}-out", "--frames", "12", "--times", str(tmp_path / "times")]
    program = start_quiet(build_folder, make_stub(), *words)
    seq, published = 0, dict[int, RingReading]()
    with ShmWriter(name, SIDE * SIDE) as writer:
        reader = ResultReader(f"{name}-out")
        while program.poll() is None:
            seq += 1
            writer.write(picture(seq))
            time.sleep(0.01)
            if (found := reader.newest()) is not None:
                published[found.seq] = found
        assert program.wait() == 0
    times = read_times(tmp_path / "times")
    assert len(times) == 12 and published
    assert (times[:, 1] < times[:, 2]).all() and (times[:, 2] <= times[:, 3]).all() and (times[:, 4] > 0).all()
    assert (overheads_ms(times) > 0).all()
    for line in times:
        if (found := published.get(int(line[0]))) is not None:
            assert found.t_recv_ns == line[1] and line[2] <= found.t_publish_ns <= line[3]
