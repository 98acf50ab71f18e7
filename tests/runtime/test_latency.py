"""Latency reports: raw samples of every stage, percentiles that follow from them, a cold start in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import NumpyEngine, Parts, child_environment
from tinyusfm_runtime import latency
from tinyusfm_runtime.bundle.manifest import ArtefactState
from tinyusfm_runtime.errors import EngineError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.latency import STAGES, ColdStart, LatencyReport, cold_start, profile
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.session import Session


@pytest.fixture
def frames() -> list[Frame]:
    """Three phantoms."""
    return [make_phantom(seed, height=96, width=128).frame for seed in range(3)]


@pytest.fixture
def session(fake_bundle: Path, plug_in: type[NumpyEngine]) -> Session:
    """A session on the numpy engine."""
    return Session.open(fake_bundle)


def test_every_prediction_is_a_sample(session: Session, plug_in: type[NumpyEngine], frames: list[Frame]) -> None:
    before = plug_in.made[0].runs
    report = profile(session, frames, rounds=7, warmup=4, cold=False)
    assert plug_in.made[0].runs - before == 4 + 7 * 3
    assert report and report.n == 21 and report.frames == 3 and report.warmup == 4
    assert set(report.samples_ms) == set(STAGES)
    assert all(len(samples) == 21 and min(samples) >= 0 for samples in report.samples_ms.values())
    for i in range(report.n):
        stages = sum(report.samples_ms[stage][i] for stage in STAGES[:3])
        assert stages <= report.samples_ms["total_ms"][i] + 1e-6
    assert report.cold is None and report.cold_load_ms is None and report.first_frame_ms is None


def test_percentiles_follow_from_the_samples(session: Session, frames: list[Frame]) -> None:
    report = profile(session, frames[:1], rounds=2, cold=False)
    report = replace(report, samples_ms={stage: tuple(float(i) for i in range(101)) for stage in STAGES})
    assert [report.percentile("infer_ms", p) for p in (50, 90, 99)] == [50, 90, 99]
    assert report.to_json()["stages"]["total_ms"] == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert report.table()[-1] == ("total", "50.00", "90.00", "needs 368 samples")
    report = replace(report, samples_ms={stage: tuple(float(i) for i in range(401)) for stage in STAGES})
    assert report.table()[-1] == ("total", "200.00", "360.00", "396.00")


def test_the_json_keeps_the_raw_samples(session: Session, frames: list[Frame]) -> None:
    report = profile(session, frames, rounds=2, cold=False)
    data = json.loads(json.dumps(report.to_json()))
    assert data["samples_ms"]["infer_ms"] == list(report.samples_ms["infer_ms"])
    assert data["description"] == session.description and data["threads"] == session.threads
    assert data["machine"]["cpu_class"] and data["n"] == 6


def test_a_run_with_invalid_predictions_is_false(
    session: Session, plug_in: type[NumpyEngine], frames: list[Frame]
) -> None:
    plug_in.bend = staticmethod(lambda outputs: {"logits": outputs["logits"] * np.float32("nan")})
    report = profile(session, frames, rounds=2, warmup=0, cold=False)
    assert not report and report.invalid == 6


def test_no_samples_are_no_success() -> None:
    samples = {stage: () for stage in STAGES}
    empty = LatencyReport(
        description="x", threads=1, machine={}, cold=None, samples_ms=samples, frames=0, warmup=0, invalid=0
    )
    assert not empty and empty.table() == [] and empty.to_json()["stages"] == {}


@pytest.mark.parametrize("options", [{"rounds": 0}, {"rounds": -1}, {"warmup": -1}])
def test_nothing_to_measure_is_an_error(session: Session, frames: list[Frame], options: dict[str, int]) -> None:
    with pytest.raises(InputError):
        profile(session, frames, cold=False, **options)
    with pytest.raises(InputError):
        profile(session, [], cold=False)


@pytest.mark.parametrize("engine", ["ort", "ov"])
def test_a_cold_start_is_measured_in_a_fresh_process(
    engine: str, engine_parts: Callable[[str], Parts], tmp_path: Path, frames: list[Frame]
) -> None:
    path = engine_parts(engine).publish(tmp_path / "b")
    with Session.open(path, threads=1) as session:
        report = profile(session, frames, rounds=1)
    assert report.cold is not None
    assert set(report.cold.startup_ms) == {"verify_hashes", "load", "first_frame", "golden", "warm_up"}
    assert 0 < report.cold.first_frame_ms < report.cold.cold_load_ms < report.cold.process_ms
    assert sum(report.cold.startup_ms.values()) <= report.cold.cold_load_ms
    assert report.first_frame_ms == report.cold.first_frame_ms
    assert [row[0] for row in report.table()][:2] == ["cold load", "  verify hashes"]
    assert json.loads(json.dumps(report.to_json()))["cold"]["cold_load_ms"] == report.cold_load_ms


def test_a_cold_start_opens_what_the_session_has_open(
    engine_parts: Callable[[str], Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = engine_parts("ort").with_artefact(state=ArtefactState.UNVERIFIED).publish(tmp_path / "b")
    asked: list[dict[str, object]] = []

    def note(bundle: Path, **options: object) -> ColdStart:
        asked.append(options)
        return cold_start(bundle, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(latency, "cold_start", note)
    with Session.open(path, threads=2, allow_unverified=True) as session:
        assert profile(session, [make_phantom(0).frame], rounds=1).cold
    wanted = {"target": "onnx", "precision": "fp32", "threads": 2, "allow_unverified": True, "full_depth": False}
    assert asked == [wanted]


def test_a_cold_start_that_fails_gives_its_reason(fresh_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="engine 'fake'"):
        cold_start(fresh_bundle)
    (fresh_bundle / "extra").write_bytes(b"x")
    with pytest.raises(EngineError, match="does not list"):
        cold_start(fresh_bundle)
    with pytest.raises(EngineError, match="no bundle"):
        cold_start(tmp_path / "nothing")


def test_a_process_that_dies_or_hangs_is_an_error(fake_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run

    def message_of(code: str) -> str:
        monkeypatch.setattr(latency.subprocess, "run", lambda _, **kw: real([sys.executable, "-c", code], **kw))
        with pytest.raises(EngineError) as caught:
            cold_start(fake_bundle)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for code in ("import os; os.abort()", "print('no json')", "print('{}')"):
        message_of(code)
    assert "last words" in message_of("import sys; sys.exit('last words')")
    monkeypatch.setattr(latency, "COLD_TIMEOUT_S", 0.2)
    assert "timed out" in message_of("import time; time.sleep(9)")


def test_the_module_prints_one_line_of_json(engine_parts: Callable[[str], Parts], tmp_path: Path) -> None:
    path = engine_parts("ort").publish(tmp_path / "b")

    def run(*arguments: str) -> tuple[int, dict[str, object]]:
        command = [sys.executable, "-m", "tinyusfm_runtime.latency", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=False)
        assert done.stderr == "" and done.stdout.count("\n") == 1
        return done.returncode, json.loads(done.stdout)

    code, answer = run("--cold", str(path))
    assert code == 0 and set(answer) == {"import_ms", "startup_ms", "cold_load_ms"}
    code, answer = run("--cold", str(tmp_path / "nothing"))
    assert code == 2 and "no bundle" in str(answer["error"])
    assert run()[0] == 2
