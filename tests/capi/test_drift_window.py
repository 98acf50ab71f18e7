"""Frames that decide together about drift: in C as in Python, one by one and in a stream, to the bit."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.capi.binding import DriftMonitor, Library, Reading, Session
from tests.capi.conftest import MakeStub, stub_parts
from tests.capi.test_same_answers import judged_specs, picture
from tinyusfm_runtime.bundle.manifest import DRIFT_FILE
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.results import DriftReading
from tinyusfm_runtime.session import Session as PythonSession
from tinyusfm_runtime.transport.shm_writer import ShmWriter

FRAMES = 70


@pytest.fixture(params=["grey drift", "features drift"])
def watched(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A bundle with a drift statistic."""
    spec, bend, statistic = judged_specs()[request.param]
    assert statistic is not None
    parts = stub_parts(bend, spec=spec)
    return replace(parts, files={**parts.files, DRIFT_FILE: statistic.to_bytes()}).publish(tmp_path / "watched.bundle")


def clip() -> Iterator[np.ndarray]:
    """Usual frames, then strange ones, then usual ones: uint8 HW."""
    rng = np.random.default_rng(3)
    for number in range(FRAMES):
        pixels = picture(rng, 90, 110, 1)
        yield np.where(pixels > 100, 255, 0).astype(np.uint8) if 20 <= number < 45 else pixels


def window_of(reading: Reading) -> tuple[object, ...]:
    return (
        reading.drift_score, bool(reading.strange), reading.drift_share, reading.drift_frames, reading.drift_window,
        bool(reading.drift_alarm), reading.strangest.decode(),
    )  # fmt: skip


def of_python(drift: DriftReading) -> tuple[object, ...]:
    return drift.score, drift.strange, drift.share, drift.frames, drift.window, drift.alarm, drift.strangest


@pytest.mark.usefixtures("stub_plug_in")
@pytest.mark.parametrize("size", [1, 2, 7, 25, 60])
def test_a_window_of_any_size_is_that_of_python(watched: Path, size: int, library: Library) -> None:
    alarms: list[bool] = []
    with (
        Session(library, watched) as here,
        PythonSession.open(watched) as there,
        DriftMonitor(library, size) as monitor,
    ):
        wanted = there.watch_drift(window=size)
        for seq, pixels in enumerate(clip()):
            frame = Frame(pixels=pixels, spacing_mm=(0.2, 0.2), seq=seq)
            given = library.frame(pixels, seq=seq, spacing_row_mm=0.2, spacing_column_mm=0.2)
            reading = here.predict(given)
            assert reading.drift_frames == 1 and not reading.drift_alarm, "a lone frame never alarms"
            monitor.observe(reading)
            assert window_of(reading) == of_python(wanted.observe(there.predict(frame), frame))
            alarms.append(bool(reading.drift_alarm))
    assert any(alarms) and not any(alarms[: size - 1])


@pytest.mark.usefixtures("stub_plug_in")
def test_a_stream_has_a_window_of_its_own(watched: Path, library: Library) -> None:
    got, alarms = [], 0
    with Session(library, watched) as here, PythonSession.open(watched) as there:
        wanted = there.watch_drift()
        for seq, pixels in enumerate(clip()):
            phantom = seq % 10 == 0  # not compared, so it does not count
            here.submit(library.frame(pixels, seq=seq, spacing_row_mm=0.2, spacing_column_mm=0.2, phantom=phantom))
            reading = here.newest(20000)
            assert reading is not None and reading.seq == seq
            if phantom:
                assert np.isnan(reading.drift_share) and not reading.drift_frames and not reading.drift_alarm
                continue
            frame = Frame(pixels=pixels, spacing_mm=(0.2, 0.2), seq=seq)
            assert window_of(reading) == of_python(wanted.observe(there.predict(frame), frame))
            got.append(reading.drift_frames)
            alarms += reading.drift_alarm
    assert got == [min(count, 25) for count in range(1, len(got) + 1)] and alarms > 3


def test_artefacts_that_take_turns_share_no_window(library: Library, watched: Path) -> None:
    with Session(library, watched, fallback=1) as session:
        for seq, pixels in zip(range(4), clip(), strict=False):
            session.submit(library.frame(pixels, seq=seq))
            reading = session.newest(20000)
            assert reading is not None and reading.drift_frames == 1 and reading.drift_share == reading.strange


def test_what_was_not_compared_is_left_alone(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub()) as session, DriftMonitor(library, 2) as monitor:
        for _ in range(3):
            reading = session.predict(library.frame(np.zeros((40, 50), np.uint8)))
            monitor.observe(reading)
            assert (reading.drift, reading.drift_frames, reading.drift_alarm) == (0, 0, 0)


def test_the_program_writes_it_and_says_when_a_stream_drifts(build_folder: Path, watched: Path, tmp_path: Path) -> None:
    name, pixels = f"drift-{time.monotonic_ns()}", list(clip())[20]
    command = [
        build_folder / "tinyusfm-run",
        watched,
        f"shm:{name}",
        "--sink",
        f"jsonl:{tmp_path}/lines",
        "--frames",
        "40",
        "--budget",
        "60000",
    ]
    with ShmWriter(name, pixels.size) as writer:
        running = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE)
        seq, end = 0, time.monotonic() + 900
        while running.poll() is None and time.monotonic() < end:
            writer.write(Frame(pixels=np.roll(pixels, seq % 5, 1), seq=seq, spacing_mm=(0.2, 0.2)))
            seq += 1
            time.sleep(0.01)
        _, said = running.communicate(timeout=900)
    assert running.returncode == 0, said.decode()
    lines = [json.loads(line)["drift"] for line in (tmp_path / "lines").read_text().splitlines()]
    assert [line["frames"] for line in lines] == [min(count, 25) for count in range(1, 41)]
    assert {line["share"] for line in lines} == {1.0} and [line["alarm"] for line in lines] == [False] * 24 + [
        True
    ] * 16
    assert said.decode().count("frames no longer look like the calibration set, by ") == 1
