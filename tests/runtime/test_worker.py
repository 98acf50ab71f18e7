"""A session in a process of its own: the same answers, killed when it hangs, made again, and no process is left."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Parts
from tests.runtime.live_sources import HandSource, images, only, wait_until
from tinyusfm_runtime.errors import EngineError, FrameError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.isolate.session import WorkerSession
from tinyusfm_runtime.live.fallback import Fallback, FallbackOptions
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.live.watchdog import CallLimits, Watchdog
from tinyusfm_runtime.numerics.measure import Measurement
from tinyusfm_runtime.results import LiveEvent, LiveEventKind

FRAMES = images(4)
HANG = Frame(pixels=np.full((64, 64), 77, np.uint8), seq=77, spacing_mm=(1.0, 1.0))
"""The plug-in below hangs at this image, and lets nothing else in its process run at this one with 78."""
PLUG_IN = '''
"""An engine of another distribution, the tiny model in numpy, that hangs at certain images."""

import ctypes
import threading
import time

import numpy as np

from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.plugins import Availability


def available():
    return Availability(usable=True, reason="numpy", extra=None)


class Engine:
    description = "hanging numpy"

    def load(self, files, spec, config):
        self.stop = threading.Event()
        self.kernel = np.load(__import__("io").BytesIO(files["model.onnx"]))

    def run(self, tensor):
        code = int(tensor[0, 0, 32, 32])
        if np.all(tensor == 76):
            if self.stop.wait(60):
                self.stop.clear()
                raise EngineError("cancelled")
        if np.all(tensor == 77):
            time.sleep(600)
        if np.all(tensor == 78):
            ctypes.PyDLL(None).sleep(600)
        if np.all(tensor == 79):
            raise RuntimeError("kernel launch failed")
        padded = np.pad(tensor[0, 0].astype(np.float32) / np.float32(255), 3)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7))
        blurred = np.einsum("hwij,ij->hw", windows, self.kernel[0, 0])
        return {"logits": ((blurred - np.float32(0.3)) * np.float32(20)).astype(np.float32)[None, None]}

    def cancel(self):
        self.stop.set()

    def close(self):
        pass
'''


@pytest.fixture(scope="module")
def plug_in_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the engine as an installed distribution would."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "hanging_engine.py").write_text(PLUG_IN, encoding="utf-8")
    info = folder / "hanging_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hanging-engine\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[tinyusfm.engines]\nhanging = hanging_engine\n", encoding="utf-8")
    return folder


@pytest.fixture
def bundle(fake_parts: Parts, plug_in_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle with two artefacts for that engine."""
    import io

    from tests.conftest import tiny_kernel
    from tinyusfm_runtime.bundle.manifest import file_entry

    monkeypatch.syspath_prepend(str(plug_in_folder))
    packed = io.BytesIO()
    np.save(packed, tiny_kernel())
    raw, (fake,) = packed.getvalue(), fake_parts.artefacts
    files = {name: content for name, content in fake_parts.files.items() if name not in (*fake.files, fake.golden)}
    artefacts = []
    for target in ("one", "two"):
        place, golden = f"artefacts/{target}-fp32/model.onnx", f"golden/{target}-fp32.safetensors"
        artefacts.append(replace(fake, target=target, engine="hanging", files={place: file_entry(raw)}, golden=golden))
        files |= {place: raw, golden: fake_parts.files[fake.golden]}
    return replace(fake_parts, artefacts=tuple(artefacts), files=files).publish(tmp_path / "hang.bundle")


@pytest.fixture
def worker(bundle: Path) -> Iterator[WorkerSession]:
    made = WorkerSession.open(bundle, threads=1)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    threads, files = threading.active_count(), open_files()
    yield
    wait_until(lambda: threading.active_count() <= threads)
    assert open_files() <= files
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def open_files() -> int:
    """File descriptors of this process, where the system tells."""
    folder = Path("/proc/self/fd")
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def test_it_answers_as_the_session_itself(worker: WorkerSession, bundle: Path) -> None:
    from tinyusfm_runtime.session import Session

    with Session.open(bundle, threads=1) as session:
        for frame in (*FRAMES, replace(FRAMES[0], pixels=FRAMES[0].pixels[:, ::2], spacing_mm=None, seq=9)):
            here, there = session.predict(frame), worker.predict(frame)
            assert here.mask_HW is not None and there.mask_HW is not None
            np.testing.assert_array_equal(here.mask_HW, there.mask_HW)
            for name in ("seq", "placement", "measurement", "target", "precision", "verified", "valid", "engine"):
                assert getattr(here, name) == getattr(there, name), name
            assert isinstance(there.measurement, Measurement) and there.timings.infer_ms > 0
        assert worker.description.startswith(session.description)
    assert worker.restarts == 0 and worker.alive and worker.pid != os.getpid()


def test_errors_keep_their_kind(worker: WorkerSession, fake_parts: Parts) -> None:
    with pytest.raises(EngineError, match="RuntimeError"):
        worker.predict(replace(HANG, pixels=HANG.pixels + 2))
    assert worker.predict(FRAMES[0]).valid, "the process goes on"


def test_a_bundle_that_does_not_open_is_said_in_one_line(bundle: Path) -> None:
    with pytest.raises(EngineError, match="no artefact"):
        WorkerSession.open(bundle, target="three")
    with pytest.raises(EngineError, match="another bundle"):
        WorkerSession.open(bundle, bundle_id="0" * 16)


def test_cancelling_stops_a_call_and_not_the_process(worker: WorkerSession) -> None:
    watchdog = Watchdog(worker, owns=False)
    misses: list[int] = []
    with pytest.raises(EngineError, match="cancelled"):
        limits = CallLimits(deadline_ms=50, give_up_ms=100, grace_ms=20_000)
        watchdog.call(replace(HANG, pixels=HANG.pixels - 1), limits, lambda: misses.append(1))
    assert misses == [1] and worker.restarts == 0 and worker.predict(FRAMES[0]).valid
    watchdog.close()


@pytest.mark.parametrize("code", [0, 1], ids=["alone", "with the whole process"])
def test_a_kernel_that_hangs_is_killed_and_made_anew(worker: WorkerSession, code: int) -> None:
    watchdog, first = Watchdog(worker, owns=False), worker.pid
    limits = CallLimits(deadline_ms=50, give_up_ms=100, grace_ms=100)
    began_s = time.monotonic()
    with pytest.raises(EngineError, match="killed"):
        watchdog.call(replace(HANG, pixels=HANG.pixels + np.uint8(code)), limits, lambda: None)
    assert time.monotonic() - began_s < 10 and not watchdog.abandoned
    wait_until(lambda: worker.alive, 60)
    assert worker.restarts == 1 and worker.pid != first and worker.predict(FRAMES[0]).valid
    watchdog.close()


def test_a_process_that_falls_silent_is_killed_without_a_call_being_given_up(bundle: Path) -> None:
    worker = WorkerSession.open(bundle, threads=1, silence_s=3.0)
    try:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match="died|again"):
            worker.predict(FRAMES[0])
        wait_until(lambda: worker.alive, 60)
        os.kill(worker.pid, signal.SIGKILL)
        wait_until(lambda: worker.restarts == 2 and worker.alive, 60)
        assert worker.predict(FRAMES[0]).valid
    finally:
        worker.close()
    worker.close()


def test_a_loop_falls_back_while_the_process_is_made_anew(bundle: Path) -> None:
    source, events = HandSource(), list[LiveEvent]()
    options = LiveOptions(deadline_ms=1500, give_up_ms=2000, grace_ms=100)
    with (
        Fallback.open(
            bundle, advanced=FallbackOptions(isolate=True, threads=1, recheck_s=None, misses_in_a_row=0)
        ) as fallback,
        Live(fallback, source, budget_ms=60_000, on_event=only(LiveEvent, events), advanced=options) as live,
    ):
        source.push(replace(FRAMES[0], seq=1))
        assert next(live).level == 0
        source.push(replace(HANG, seq=2))
        hung = next(live)
        assert hung.prediction is None and hung.error is not None and "killed" in hung.error
        source.push(replace(FRAMES[1], seq=3))
        served = next(live)
        assert served.valid and served.level == 1 and served.degraded and "two-fp32" in served.engine
        assert [event.kind for event in events] == [
            LiveEventKind.DEADLINE_MISSED, LiveEventKind.ENGINE_FAILED, LiveEventKind.LEVEL_CHANGED,
        ]  # fmt: skip
        first = fallback.levels[0].watchdog.predictor
        assert isinstance(first, WorkerSession)
        wait_until(lambda: first.alive, 60)
        fallback.request(0)
        source.push(replace(FRAMES[2], seq=4), replace(FRAMES[3], seq=5))
        wait_until(lambda: fallback.level == 0)
        assert live.counters.balanced


def test_a_frame_the_model_cannot_place_is_the_frames_fault(worker: WorkerSession) -> None:
    with pytest.raises((FrameError, AttributeError)):
        worker.predict("no frame")  # type: ignore[arg-type]
    assert worker.predict(FRAMES[0]).valid
