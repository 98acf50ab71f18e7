"""Rings of frames and of readings: C and Python on both ends, damage refused, killed writers and readers survived."""

from __future__ import annotations

import ctypes as c
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from tests.capi.binding import Library
from tests.capi.conftest import MakeStub
from tests.conftest import child_environment, tiny_spec
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.numerics.measure import Measurement
from tinyusfm_runtime.sources.shm import open_source
from tinyusfm_runtime.spec import PostProcess, Task
from tinyusfm_runtime.transport.shm_result import ResultReader, ResultWriter, RingReading
from tinyusfm_runtime.transport.shm_ring import SLOT, RingError, RingReader
from tinyusfm_runtime.transport.shm_writer import ShmWriter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="POSIX shared memory is /dev/shm of Linux")


class CReader(c.Structure):
    """tue_shm_reader."""

    _fields_ = (
        ("file", c.c_int32), ("attached", c.c_int32), ("slots", c.c_uint32), ("slot_stride", c.c_uint64),
        ("room", c.c_uint64), ("taken", c.c_uint64), ("device", c.c_uint64), ("inode", c.c_uint64),
        ("heartbeat_ns", c.c_uint64), ("frame_ns", c.c_uint64), ("looked_ns", c.c_uint64), ("overtaken", c.c_uint64),
        ("torn", c.c_uint64), ("damaged", c.c_uint64), ("map", c.c_void_p), ("map_bytes", c.c_uint64),
        ("wakes", c.c_int32), ("again", c.c_int32), ("lent", c.c_uint64), ("every_ns", c.c_uint64),
        ("spin_ns", c.c_uint64), ("gone", c.c_int32), ("reserved", c.c_int32), ("name", c.c_char * 232),
    )  # fmt: skip


class CWriter(c.Structure):
    """tue_shm_writer."""

    _fields_ = (("ring", c.c_void_p), ("bytes", c.c_size_t), ("published", c.c_uint64), ("name", c.c_char * 232))


class RingFunctions:
    """The ring functions of the library."""

    def __init__(self, library: Library) -> None:
        lib = self.lib = library.lib
        for name, arguments in {
            "tue_shm_attach": [c.c_void_p, c.c_char_p], "tue_shm_wait": [c.c_void_p, c.c_double],
            "tue_shm_newest": [c.c_void_p, c.c_void_p, c.c_void_p, c.c_uint64],
            "tue_res_newest": [c.c_void_p, c.c_void_p, c.c_void_p, c.c_uint64],
            "tue_res_open": [c.c_void_p, c.c_char_p, c.c_uint64], "tue_res_write": [c.c_void_p, c.c_void_p, c.c_void_p],
            "tue_shm_close": [c.c_void_p, c.c_int32], "tue_shm_detach": [c.c_void_p],
        }.items():  # fmt: skip
            getattr(lib, name).argtypes = arguments

    def attach(self, name: str) -> CReader:
        reader = CReader()
        assert self.lib.tue_shm_attach(c.byref(reader), name.encode()) == 0
        return reader

    def frame(self, reader: CReader, room: int = 1 << 20) -> tuple[int, tuple[object, ...], np.ndarray]:
        """enum tue_shm_found, the slot's fields, the pixels."""
        slot, pixels = (c.c_uint8 * 128)(), np.zeros(room, np.uint8)
        found = self.lib.tue_shm_newest(c.byref(reader), slot, pixels.ctypes.data, room)
        return found, SLOT.unpack(bytes(slot)), pixels


@pytest.fixture(scope="module")
def rings(library: Library) -> RingFunctions:
    return RingFunctions(library)


@pytest.fixture
def name() -> Iterator[str]:
    yield from fresh_name()


def fresh_name() -> Iterator[str]:
    """A name that no ring has; what was made under it is removed."""
    made = f"capi-{os.getpid()}-{random.randrange(1 << 30)}"
    yield made
    for path in Path("/dev/shm").glob(f"*{made}*"):
        path.unlink(missing_ok=True)


def noise(rng: np.random.Generator, seq: int) -> Frame:
    kind = PixelFormat(rng.choice(["grey", "rgb", "bgr", "rgba"]))
    channels = {"grey": (), "rgba": (4,)}.get(kind.value, (3,))
    rows, columns = (int(n) for n in rng.integers(8, 90, 2))
    return Frame(
        pixels=rng.integers(0, 256, (rows, columns, *channels), np.uint8), pixel_format=kind, seq=seq,
        video_range=VideoRange.LIMITED if rng.random() < 0.5 else VideoRange.FULL, t_source_ns=seq * 7,
        spacing_mm=(0.25, 0.5) if rng.random() < 0.5 else None, orientation="MF",
    )  # fmt: skip


def test_frames_written_in_python_are_read_in_c(rings: RingFunctions, name: str) -> None:
    rng = np.random.default_rng(0)
    reader = rings.attach(name)
    assert rings.frame(reader)[0] == 0, "there is no ring yet"
    with ShmWriter(name, 40000) as writer:
        for seq in range(40):
            frame = noise(rng, seq)
            writer.write(frame)
            found, fields, pixels = rings.frame(reader)
            assert found == 1 and fields[2] == seq and fields[5:7] == frame.pixels.shape[:2]
            np.testing.assert_array_equal(pixels[: frame.pixels.size], frame.pixels.ravel())
            assert rings.frame(reader)[0] == 0, "a frame is taken once"
        writer.write(noise(rng, 50))
        writer.write(noise(rng, 51))
        assert rings.frame(reader)[1][2] == 51 and reader.overtaken == 1
    rings.lib.tue_shm_detach(c.byref(reader))


def test_both_readers_judge_damage_alike(rings: RingFunctions, name: str) -> None:
    rng, dice = np.random.default_rng(1), random.Random(1)
    seen = {"good": 0, "refused": 0}
    with ShmWriter(name, 40000) as writer:
        path = Path("/dev/shm") / name
        for seq in range(600):
            writer.write(noise(rng, seq))
            at = 128 + (writer.published - 1) % 4 * writer._stride
            with path.open("r+b") as file:
                good = [(place, _swap(file, place, None)) for place in sorted({dice.randrange(at, at + 128 + 60), 24})]
                place = dice.choice([dice.randrange(at, at + 128 + 60), dice.randrange(0, 80)])
                if seq % 5:
                    good.append((place, _swap(file, place, dice.randrange(1, 256))))
                file.flush()
                reader = rings.attach(name)
                here = rings.frame(reader)[0] == 1
                rings.lib.tue_shm_detach(c.byref(reader))
                there = _read_in_python(path)
                for back, value in reversed(good):
                    file.seek(back)
                    file.write(bytes([value]))
            assert here == there, (seq, place)
            seen["good" if here else "refused"] += 1
    assert seen["good"] > 100 and seen["refused"] > 300, seen


def _swap(file: object, place: int, change: int | None) -> int:
    file.seek(place)  # type: ignore[attr-defined]
    value: int = file.read(1)[0]  # type: ignore[attr-defined]
    if change is not None:
        file.seek(place)  # type: ignore[attr-defined]
        file.write(bytes([value ^ change]))  # type: ignore[attr-defined]
    return value


def _read_in_python(path: Path) -> bool:
    handle = os.open(path, os.O_RDONLY)
    try:
        reader = RingReader(handle)
        number, heartbeat_ns = reader.state()
        if time.monotonic_ns() - heartbeat_ns > 1_000_000_000:
            return False  # of a writer that died
        reader.read(number)
    except RingError:
        return False
    finally:
        os.close(handle)
    return True


def reading(seq: int, rows: int = 12, columns: int = 20) -> tuple[RingReading, np.ndarray]:
    mask = np.random.default_rng(seq).integers(0, 2, (rows, columns), np.uint8)
    made = RingReading(
        seq=seq, t_recv_ns=5 * seq, valid=True, verified=bool(seq % 2), found=True, measured=True, hc_mm=1.5 * seq,
        mask_HW=mask, crop=(0, 0, 100, 200), box=(0, 0, rows, columns), frame_size=(100, 200), scores=(0.25, 0.75),
        level=seq % 3, state="stale", dropped=seq, trust="doubtful", reasons=("confidence", "drift"),
        second_pass="done", drift_status="checked", strange=True, cut_by_sector=bool(seq % 2),
    )  # fmt: skip
    return made, mask


def test_readings_written_in_python_are_read_in_c_and_the_other_way_round(rings: RingFunctions, name: str) -> None:
    with ResultWriter(name, 300) as writer:
        reader = rings.attach(name)
        for seq in range(9):
            made, mask = reading(seq)
            writer.write(made)
            slot, room = (c.c_uint8 * 256)(), np.zeros(300, np.uint8)
            assert rings.lib.tue_res_newest(c.byref(reader), slot, room.ctypes.data, 300) == 1
            np.testing.assert_array_equal(room[:240].reshape(12, 20), mask)
            copied = CWriter()  # what C read, C writes on, and Python reads
            assert rings.lib.tue_res_open(c.byref(copied), f"{name}-b".encode(), 300) == 0
            assert rings.lib.tue_res_write(c.byref(copied), slot, room.ctypes.data) == 0
            back = ResultReader(f"{name}-b").newest()
            assert back is not None and back.t_publish_ns > 0
            np.testing.assert_array_equal(back.mask_HW, mask)
            assert (back.seq, back.hc_mm, back.scores, back.level, back.state) == (
                seq,
                1.5 * seq,
                (0.25, 0.75),
                seq % 3,
                "stale",
            )
            assert (back.verified, back.found, back.dropped, back.crop) == (bool(seq % 2), True, seq, (0, 0, 100, 200))
            assert (back.trust, back.reasons, back.second_pass) == ("doubtful", ("confidence", "drift"), "done")
            assert (back.drift_status, back.strange, back.cut_by_sector) == ("checked", True, bool(seq % 2))
            rings.lib.tue_shm_close(c.byref(copied), 1)
        rings.lib.tue_shm_detach(c.byref(reader))
    assert ResultReader(name).newest() is None


PROGRAM = "tinyusfm-run"


def start(build: Path, bundle: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([build / PROGRAM, bundle, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_quiet(build: Path, bundle: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([build / PROGRAM, bundle, *words, "--quiet"], stderr=subprocess.DEVNULL)


def test_the_program_reads_a_ring_and_writes_lines_and_a_ring(
    build_folder: Path, make_stub: MakeStub, name: str, tmp_path: Path
) -> None:
    pixels = np.zeros((96, 96), np.uint8)
    pixels[20:70, 25:75] = 220
    program = start(build_folder, make_stub(), f"shm:{name}", "--sink", f"jsonl:{tmp_path}/lines", "--sink",
                    f"shm-out:{name}-out", "--frames", "20", "--budget", "5000")  # fmt: skip
    with ShmWriter(name, 96 * 96) as writer:
        reader, readings = ResultReader(f"{name}-out"), []
        seq, end = 0, time.monotonic() + 900
        while program.poll() is None and time.monotonic() < end:
            writer.write(Frame(pixels=np.roll(pixels, seq % 9, 1), seq=seq, spacing_mm=(0.5, 0.5)))
            seq += 1
            time.sleep(0.01)
            if (found := reader.newest()) is not None:
                readings.append(found)
        _, err = program.communicate(timeout=900)
    assert program.returncode == 0, err.decode()
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()]
    assert len(lines) == 20 and all(line["measurement"]["found"] and line["valid"] for line in lines)
    assert len(readings) > 3 and all(r.found and r.mask_HW is not None and r.mask_HW.any() for r in readings)
    by_seq = {line["seq"]: line["measurement"]["hc_mm"] for line in lines}
    both = [reading for reading in readings if reading.seq in by_seq]
    assert both and all(by_seq[reading.seq] == reading.hc_mm for reading in both)
    from tinyusfm_runtime.sinks import jsonl

    assert {*lines[0]} == {"schema", "kind", "seq", *jsonl._OF_A_PREDICTION, "live", "smoothed"}
    named = {field.name for field in fields(Measurement)} | {"reading", "reasons"}
    assert {*lines[0]["measurement"]} == named and len(lines[0]["measurement"]["contour_px"]) > 20
    assert lines[0]["reading"] == "unchecked" and lines[0]["drift_status"] == "not checked"
    assert lines[0]["schema"] == jsonl.SCHEMA and lines[0]["target"] == "stub" and lines[0]["precision"] == "fp32"


def test_the_program_names_classes_as_the_manifest_does(
    build_folder: Path, make_stub: MakeStub, name: str, tmp_path: Path
) -> None:
    labels = ('b\u00e9nin "demo"', "malin", "normal")
    spec = tiny_spec(task=Task.CLASSIFY, labels=labels, postprocess=PostProcess.NONE)
    program = start(build_folder, make_stub("classes=3", spec=spec), f"shm:{name}", "--sink", f"jsonl:{tmp_path}/lines",
                    "--frames", "3", "--budget", "60000")  # fmt: skip
    with ShmWriter(name, 96 * 96) as writer:
        end = time.monotonic() + 900
        while program.poll() is None and time.monotonic() < end:
            for seq in range(4):
                writer.write(Frame(pixels=np.full((96, 96), 40 + 50 * seq, np.uint8), seq=seq))
                time.sleep(0.02)
        program.communicate(timeout=900)
    lines = [json.loads(line) for line in (tmp_path / "lines").read_text(encoding="utf-8").splitlines()]
    assert lines and all(line["label"] == labels[int(np.argmax(line["scores"]))] for line in lines)


def test_killed_writers_and_readers_leave_the_others_going(build_folder: Path, make_stub: MakeStub, name: str) -> None:
    """kill -9 of the writer of frames, of the program, and of a reader of readings, at any moment, many times."""
    rng = random.Random(3)
    write = (
        "import sys,time;import numpy as np;from tinyusfm_runtime.transport.shm_writer import ShmWriter;"
        "from tinyusfm_runtime.frame import Frame;w=ShmWriter(sys.argv[1],96*96);n=0\n"
        "while True: w.write(Frame(pixels=np.full((96,96),n%251,np.uint8),seq=n));n+=1;time.sleep(0.0005)"
    )
    read = (
        "import sys,time;from tinyusfm_runtime.transport.shm_result import ResultReader;r=ResultReader(sys.argv[1])\n"
        "while True: r.newest(); time.sleep(0.0005)"
    )
    bundle = make_stub()
    begin = {
        "writer": lambda: _python(write, name), "reader": lambda: _python(read, f"{name}-out"),
        "program": lambda: start_quiet(build_folder, bundle, f"shm:{name}", "--sink", f"shm-out:{name}-out"),
    }  # fmt: skip
    running = {kind: make() for kind, make in begin.items()}
    reader = ResultReader(f"{name}-out")
    try:
        for _round in range(15):
            kind = rng.choice(sorted(begin))
            time.sleep(rng.uniform(0.0, 0.3))
            running[kind].send_signal(signal.SIGKILL)
            running[kind].wait()
            running[kind] = begin[kind]()
            seen, end = None, time.monotonic() + 900
            while seen is None and time.monotonic() < end:
                found = reader.newest()
                seen = found if found is not None and found.t_publish_ns > time.monotonic_ns() - 500_000_000 else None
                time.sleep(0.002)
            assert seen is not None and seen.answered, f"no reading after the {kind} was killed"
            assert all(process.poll() is None for process in running.values())
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def _python(script: str, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script, *words], env=child_environment(), stderr=subprocess.DEVNULL)


def test_the_source_of_python_reads_what_c_writes(build_folder: Path, name: str) -> None:
    writer = subprocess.Popen([build_folder / "shm_probe", name, "40", "60", "0", "2000"], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        with open_source(f"shm:{name}") as source:
            frames = [frame for frame, _ in zip(source, range(20), strict=False)]
        for frame in frames:
            r, k = np.mgrid[:40, :60]
            np.testing.assert_array_equal(frame.pixels, (7 * r + 3 * k + 11 * frame.seq) % 251)
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()  # type: ignore[union-attr]
