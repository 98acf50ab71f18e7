"""Frames of a stream answered in their caller's thread: rules and readings are those of submitted ones."""

from __future__ import annotations

import ctypes as c
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.capi.binding import HOLDS, LOOK, STATES, Failed, Frame, Library, Session
from tests.capi.conftest import MakeStub
from tests.capi.test_stream import OPENING, moving, wait_for
from tests.conftest import child_environment, tiny_spec

SUBMITTED = ("seq", "valid", "found", "area_px", "hc_mm", "confidence", "trust", "reasons", "second_pass", "verified")


def looks(library: Library, holds: list[bool]) -> tuple[object, list[int]]:
    """A lease that says in turn whether the frame is still there, and its calls of ``look``."""
    told: list[int] = []
    lease = library.make("lease")
    lease.look = LOOK(lambda _user, begins: told.append(begins))
    lease.holds = HOLDS(lambda _user: int(holds.pop(0) if len(holds) > 1 else holds[0]))
    return lease, told


def test_readings_are_those_of_submitted_frames(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub()) as one, Session(library, make_stub()) as other:
        assert one.info().in_place == 1
        for number in range(8):
            frame = moving(library, number)
            here = one.answer(frame)
            other.submit(frame)
            there = other.newest(20_000)
            assert here is not None and there is not None
            assert [getattr(here, name) for name in SUBMITTED] == [getattr(there, name) for name in SUBMITTED]
            assert here.index == number and here.dropped_since_last == 0
        overlay = one.overlay()
        assert overlay is not None and overlay.seq == 7
        assert one.newest() is None, "every reading was given away"
        counters = one.counters()
        assert (counters.received, counters.processed, counters.unseen) == (8, 8, 0) and counters.balanced


def test_a_region_with_a_stride_is_answered_from_where_it_lies(library: Library, make_stub: MakeStub) -> None:
    whole = np.random.default_rng(0).integers(0, 255, (200, 240), np.uint8)
    whole[20:116, 30:126] = moving(library, 3).kept
    region = library.frame(whole, seq=1, roi_row=20, roi_column=30, roi_rows=96, roi_columns=96)
    region.spacing_row_mm = region.spacing_column_mm = 0.3
    with Session(library, make_stub()) as session:
        cut, plain = session.answer(region), session.answer(moving(library, 3, seq=2))
        assert cut is not None and plain is not None and cut.area_px == plain.area_px > 0 and cut.hc_mm == plain.hc_mm


def test_old_and_bad_frames_give_nothing_and_are_counted(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub()) as session:
        assert session.answer(moving(library, 5)) is not None
        assert session.answer(moving(library, 5)) is None and session.answer(moving(library, 4)) is None
        bad = moving(library, 6)
        bad.rows = 1
        with pytest.raises(Failed, match="FRAME"):
            session.answer(bad)
        last = session.answer(moving(library, 7))
        assert last is not None and last.dropped_since_last == 3
        counters = session.counters()
        assert (counters.duplicate, counters.out_of_order, counters.rejected) == (1, 1, 1) and counters.balanced


def test_a_frame_that_was_overwritten_gives_no_reading(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub()) as session:
        torn, told = looks(library, [False])
        assert session.answer(moving(library, 0), torn) is None
        whole, told = looks(library, [True])
        assert session.answer(moving(library, 1), whole) is not None
        assert told.count(1) >= 2 and told[-1] == 0, "once for the answer, once to keep the frame"
        late, _ = looks(library, [True, False])
        assert session.answer(moving(library, 2), late) is None, (
            "it was whole when the input was prepared, and later not"
        )
        early, told = looks(library, [True, False])
        assert session.answer(moving(library, 3), early) is not None, "from then on frames are copied first"
        counters = session.counters()
        assert (counters.processed, counters.overtaken) == (2, 2) and counters.balanced


def test_a_still_image_is_seen_though_the_buffer_is_the_same(library: Library, make_stub: MakeStub) -> None:
    pixels = moving(library, 0).kept.copy()
    with Session(library, make_stub()) as session:
        states = []
        for number in range(30):
            frame = library.frame(pixels, seq=number, spacing_row_mm=0.3, spacing_column_mm=0.3)
            assert session.answer(frame) is not None
            states.append(STATES[session.counters().state])
            time.sleep(0.01)
        assert "frozen" not in states[:9] and states[-1] == "frozen"
        for number in range(30, 34):
            pixels[:] = moving(library, number).kept  # one buffer, filled again and again
            assert session.answer(library.frame(pixels, seq=number)) is not None
        assert STATES[session.counters().state] != "frozen"


def test_golden_frames_find_an_engine_that_answers_nonsense(library: Library, make_stub: MakeStub) -> None:
    told: list[str] = []
    with Session(
        library, make_stub("shift_from=30"), recheck_s=0.02, log=lambda _l, text: told.append(text)
    ) as session:
        for number in range(2000):
            reading = session.answer(moving(library, number))
            if reading is None or not reading.answered:
                break
            time.sleep(0.004)
        assert reading is not None and not reading.answered and not reading.valid and reading.degraded
        assert any("golden frame" in line for line in told)


def test_a_slow_call_is_told_and_cancelled_while_it_goes_on(library: Library, make_stub: MakeStub) -> None:
    told: list[str] = []
    options = {"deadline_ms": 30, "give_up_ms": 90, "recheck_s": 0.0}
    bundle = make_stub(f"sleep=60000 sleep_from={OPENING}")
    with Session(library, bundle, log=lambda _l, text: told.append(text), **options) as session:
        begin = time.monotonic()
        for number in range(20):
            reading = session.answer(moving(library, number))
            if reading is not None and not reading.answered:
                break
        assert time.monotonic() - begin < 50, "the engine would sleep for a minute"
        assert reading is not None and b"cancelled" in reading.error and reading.degraded and not reading.valid
        assert any("passed its deadline" in line for line in told) and session.counters().balanced


def test_with_a_fallback_frames_have_to_be_submitted(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub("", ""), fallback=1) as session:
        assert session.info().in_place == 0
        with pytest.raises(Failed, match=r"UNSUPPORTED.*submit"):
            session.answer(moving(library, 0))
        session.submit(moving(library, 1))
        assert session.newest(20_000) is not None


def test_a_swap_while_frames_are_answered_here(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub(), recheck_s=0.05) as session:
        stop: list[bool] = []

        def feed() -> None:
            number = 0
            while not stop:
                session.answer(moving(library, number))
                number += 1
                time.sleep(0.004)

        thread = threading.Thread(target=feed)
        thread.start()
        try:
            wait_for(lambda: session.counters().processed > 3)
            other = make_stub(spec=tiny_spec(name="other"))
            report = session.swap(other, patience_s=60.0, shadow_frames=5, min_dice=0.9)
        finally:
            stop.append(True)
            thread.join()
        assert report.outcome == 0, report.reason
        assert report.shadow_frames == 5 and report.dice_mean == 1.0 and session.info().model == b"other"


def test_closing_waits_for_the_frame_in_the_engine(library: Library, make_stub: MakeStub) -> None:
    session = Session(library, make_stub(f"sleep=300 sleep_from={OPENING}"))
    session.answer(moving(library, 0))
    handle, given = session.handle, []
    thread = threading.Thread(target=lambda: given.append(_answer_with(session, handle, moving(library, 1))))
    thread.start()
    time.sleep(0.1)
    session.close()
    thread.join(60)
    assert given in ([True], [False])


def _answer_with(session: Session, handle: c.c_void_p, frame: Frame) -> bool:
    kept = Session.__new__(Session)
    kept.library, kept.handle = session.library, handle
    try:
        return kept.answer(frame) is not None
    except Failed as error:  # it was closed before the call began
        assert error.code == "ENGINE"
        return False


BORROWED = """
import ctypes as c, os, sys
import numpy as np
from tests.capi.binding import Library
from tests.capi.test_ring import RingFunctions
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.transport.shm_ring import SLOT
from tinyusfm_runtime.transport.shm_writer import ShmWriter
library, name = sys.argv[1:]
rings = RingFunctions(Library(library))
lib, side = rings.lib, 512
lib.tue_shm_borrow.argtypes = [c.c_void_p, c.c_void_p, c.c_void_p]
lib.tue_shm_look.argtypes = [c.c_void_p, c.c_int32]
lib.tue_shm_expect.argtypes = [c.c_void_p, c.c_double]
slot, place = (c.c_uint8 * 128)(), c.c_void_p()
def borrow():
    return lib.tue_shm_borrow(c.byref(reader), slot, c.byref(place))
def pixels():
    lib.tue_shm_look(c.byref(reader), 1)
    copy = np.ctypeslib.as_array((c.c_uint8 * side ** 2).from_address(place.value)).copy()
    lib.tue_shm_look(c.byref(reader), 0)
    return copy
with ShmWriter(name, side * side) as writer:
    reader = rings.attach(name)
    writer.write(Frame(pixels=np.zeros((side, side), np.uint8), seq=0))
    assert borrow() == 3, "without the guard a ring is not mapped"
    assert lib.tue_shm_guard() == 0
    lib.tue_shm_detach(c.byref(reader))
    reader = rings.attach(name)
    lib.tue_shm_expect(c.byref(reader), 1.0)
    assert borrow() == 1 and not pixels().any() and lib.tue_shm_holds(c.byref(reader)) == 1 and borrow() == 0
    for seq in range(1, 9):
        writer.write(Frame(pixels=np.full((side, side), seq, np.uint8), seq=seq))
        assert lib.tue_shm_wait(c.byref(reader), 900e3) == 1 and borrow() == 1
        assert (pixels() == seq).all() and lib.tue_shm_holds(c.byref(reader)) == 1
    writer.write(Frame(pixels=np.full((side, side), 9, np.uint8), seq=9), spoil_at=5)
    assert borrow() == 2 and reader.damaged == 1, "its CRC is that of other pixels"
    writer.write(Frame(pixels=np.full((side, side), 9, np.uint8), seq=9))
    assert borrow() == 1
    for more in range(4):
        assert lib.tue_shm_holds(c.byref(reader)) == 1, "there are four slots"
        writer.write(Frame(pixels=np.full((side, side), 9, np.uint8), seq=9 + more))
    assert lib.tue_shm_holds(c.byref(reader)) == 0, "the fourth frame took the slot"
    assert borrow() == 1 and (pixels() == 9).all()
    path, at = f"/dev/shm/{name}", 128 + (writer.published - 1) % 4 * writer._stride
    file = os.open(path, os.O_RDONLY)
    ring, frame, whole = os.pread(file, 128, 0), os.pread(file, 128 + side * side, at), os.fstat(file).st_size
    os.truncate(path, at + 4 * 4096)
    assert not pixels()[8 * 4096 :].any() and lib.tue_shm_holds(c.byref(reader)) == 0, "zeros, and it is told"
    assert lib.tue_shm_wait(c.byref(reader), 1.0) == 0
    other = os.open(path + ".holes", os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(other, whole)
    os.pwrite(other, ring, 0), os.pwrite(other, frame, at)
    os.rename(path + ".holes", path)
    assert borrow() == 3, "a ring with holes takes the place of the one whose memory is gone: it is not mapped whole"
    assert reader.map_bytes == 128 and lib.tue_shm_holds(c.byref(reader)) == 0
    os.truncate(path, 64)
    lib.tue_shm_detach(c.byref(reader))
    assert borrow() == 0 and reader.map is None
    lib.tue_shm_detach(c.byref(reader))
print("survived")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="POSIX shared memory is /dev/shm of Linux")
def test_a_borrowed_frame_is_told_when_it_was_overwritten_or_taken_away(build_folder: Path) -> None:
    name = f"tusfm-borrow-{os.getpid()}"
    command = [sys.executable, "-c", BORROWED, str(build_folder / "libtinyusfm.so"), name]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False, timeout=900)
    assert done.stdout == "survived\n", done.stderr
