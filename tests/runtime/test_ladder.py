"""The fallback ladder: an engine that sleeps, raises or answers nonsense is replaced, and never silently."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.conftest import NumpyEngine, Parts, tiny_logits
from tests.runtime.live_sources import HandSource, PacedSource, pictures, wait_until
from tinyusfm_runtime import session as session_module
from tinyusfm_runtime.errors import EngineError, FrameError, InputError
from tinyusfm_runtime.ladder import Ladder, LadderOptions
from tinyusfm_runtime.live import Live
from tinyusfm_runtime.live_options import LiveOptions
from tinyusfm_runtime.live_result import LiveEvent, LiveEventKind, LiveResult, LiveState
from tinyusfm_runtime.plugins import Probe
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.watchdog import CallLimits, Watchdog

FRAMES = pictures(4)
LIMITS = CallLimits(deadline_ms=5_000, give_up_ms=10_000)
SPOILS = ("sleeps", "raises", "answers nan", "answers another shape", "answers nonsense")


class Engines:
    """Two engines of one model; the test spoils either while it runs."""

    def __init__(self) -> None:
        self.spoilt: dict[str, str] = {}
        self.wake = threading.Event()
        self.slow_s = 0.0
        self.broken_at: dict[str, float] = {}

    def bend(self, name: str, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        how = self.spoilt.get(name)
        if how is None:
            return outputs
        self.broken_at.setdefault(name, time.monotonic())
        if how == "sleeps":
            self.wake.wait(20)
        elif how == "dawdles":
            time.sleep(self.slow_s)
        elif how == "raises":
            raise RuntimeError("kernel launch failed")
        elif how == "answers nan":
            outputs["logits"][0, 0, 3, 3] = np.nan
        elif how == "answers another shape":
            outputs["logits"] = outputs["logits"][..., :-1]
        elif how == "answers nonsense":
            outputs["logits"] = -outputs["logits"]
        return outputs


def engine_module(engines: Engines, name: str) -> ModuleType:
    class Engine(NumpyEngine):
        def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
            if self.closed:
                raise EngineError("used after close")
            return engines.bend(name, {"logits": tiny_logits(tensor)})

    module = ModuleType(name)
    module.Engine = Engine  # type: ignore[attr-defined]
    module.probe = lambda: Probe(works=True, reason="numpy", extra=None)  # type: ignore[attr-defined]
    return module


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    made = Engines()
    modules = {name: engine_module(made, name) for name in ("first", "second")}
    monkeypatch.setattr(session_module, "load", lambda kind, typed: modules[typed])
    monkeypatch.setattr(session_module, "names", lambda kind: list(modules))
    yield made
    made.wake.set()


def two_artefacts(fake_parts: Parts) -> Parts:
    """The fake artefact twice, for two engines."""
    (fake,) = fake_parts.artefacts
    (path, entry), content = next(iter(fake.files.items())), fake_parts.files
    artefacts, files = [], {name: raw for name, raw in content.items() if name not in (path, fake.golden)}
    for name in ("first", "second"):
        place, golden = f"artefacts/{name}-fp32/model.onnx", f"golden/{name}-fp32.npz"
        artefacts.append(replace(fake, target=name, engine=name, files={place: entry}, golden=golden))
        files |= {place: content[path], golden: content[fake.golden]}
    return replace(fake_parts, artefacts=tuple(artefacts), files=files)


@pytest.fixture(scope="module")
def ladder_bundle(fake_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_artefacts(fake_parts).publish(tmp_path_factory.mktemp("ladder") / "two.bundle")


@pytest.fixture
def ladder(engines: Engines, ladder_bundle: Path) -> Iterator[Ladder]:
    with Ladder.open(ladder_bundle) as opened:
        yield opened
        engines.wake.set()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    wait_until(lambda: threading.active_count() <= before)


def test_the_first_rung_answers_while_nothing_is_wrong(ladder: Ladder) -> None:
    events = list[LiveEvent]()
    answered = ladder.answer(FRAMES[0], LIMITS, events.append)
    assert answered.prediction is not None and answered.prediction.valid and answered.error is None
    assert answered.rung == ladder.rung == 0 and "first-fp32" in answered.engine and not events
    assert [rung.name for rung in ladder.rungs] == ["first-fp32", "second-fp32"] and not ladder.unavailable


@pytest.mark.parametrize("how", [spoil for spoil in SPOILS if spoil not in ("sleeps", "answers nonsense")])
def test_a_failing_rung_is_left_with_a_word(
    ladder: Ladder, engines: Engines, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    events = list[LiveEvent]()
    engines.spoilt["first"] = how
    caplog.set_level(logging.WARNING)
    failed = ladder.answer(FRAMES[0], LIMITS, events.append)
    assert failed.error is not None and failed.rung == 0
    served = ladder.answer(FRAMES[1], LIMITS, events.append)
    assert served.error is None and served.rung == ladder.rung == 1 and "second-fp32" in served.engine
    assert [event.kind for event in events] == [LiveEventKind.ENGINE_FAILED, LiveEventKind.RUNG_CHANGED]
    assert len(caplog.records) == 2 and not any("\n" in record.getMessage() for record in caplog.records)


def test_a_file_loses_no_answer(ladder: Ladder, engines: Engines) -> None:
    engines.spoilt["first"] = "raises"
    answered = ladder.answer(FRAMES[0], LIMITS, lambda _: None, insist=True)
    assert answered.error is None and answered.rung == 1


def test_a_call_that_is_merely_late_is_told_and_counted(engines: Engines, ladder_bundle: Path) -> None:
    events = list[LiveEvent]()
    limits = CallLimits(deadline_ms=1, give_up_ms=20_000)
    with Ladder.open(ladder_bundle, advanced=LadderOptions(misses_in_a_row=3)) as ladder:
        engines.spoilt["first"], engines.slow_s = "dawdles", 0.05
        for _ in range(2):
            answered = ladder.answer(FRAMES[0], limits, events.append)
            assert answered.late and answered.prediction is not None and answered.rung == 0
        assert {event.kind for event in events} == {LiveEventKind.DEADLINE_MISSED}
        ladder.answer(FRAMES[0], limits, events.append)
        assert ladder.rung == 1, "three misses in a row are enough"


def test_nonsense_of_the_right_shape_is_found_by_golden_frames(engines: Engines, ladder_bundle: Path) -> None:
    events = list[LiveEvent]()
    with Ladder.open(ladder_bundle, advanced=LadderOptions(recheck_s=0.0)) as ladder:
        ladder.between_frames(LIMITS, events.append)
        assert ladder.rung == 0 and not events
        engines.spoilt["first"] = "answers nonsense"
        assert ladder.answer(FRAMES[0], LIMITS, events.append).error is None, "it cannot be seen in one answer"
        ladder.between_frames(LIMITS, events.append)
        assert ladder.rung == 1 and "golden frame" in events[0].reason
    engines.spoilt.clear()
    with Ladder.open(ladder_bundle, advanced=LadderOptions(recheck_s=None)) as ladder:
        engines.spoilt["first"] = "answers nonsense"
        ladder.between_frames(LIMITS, events.append)
        assert ladder.rung == 0, "the control: without rechecks nobody notices"


def test_a_stand_in_that_fails_its_golden_frame_never_answers(ladder: Ladder, engines: Engines) -> None:
    events = list[LiveEvent]()
    engines.spoilt |= {"first": "raises", "second": "answers nonsense"}
    ladder.answer(FRAMES[0], LIMITS, events.append)
    answered = ladder.answer(FRAMES[1], LIMITS, events.append)
    assert answered.prediction is None and answered.error is not None and "no artefact is left" in answered.error
    assert any("cannot take over" in event.reason for event in events)


def test_with_no_rung_left_they_are_tried_again(
    ladder: Ladder, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyusfm_runtime.ladder._RETRY_S", 0.05)
    engines.spoilt |= {"first": "raises", "second": "raises"}
    assert ladder.answer(FRAMES[0], LIMITS, lambda _: None).error is not None
    ladder.between_frames(LIMITS, lambda _: None)
    assert ladder.answer(FRAMES[0], LIMITS, lambda _: None).error is not None
    del engines.spoilt["second"]
    time.sleep(0.06)
    ladder.between_frames(LIMITS, lambda _: None)
    answered = ladder.answer(FRAMES[0], LIMITS, lambda _: None)
    assert answered.error is None and answered.rung == 1


def test_nothing_climbs_back_unless_it_is_asked(ladder: Ladder, engines: Engines) -> None:
    engines.spoilt["first"] = "raises"
    ladder.answer(FRAMES[0], LIMITS, lambda _: None)
    engines.spoilt.clear()
    for _ in range(3):
        ladder.between_frames(LIMITS, lambda _: None)
        assert ladder.answer(FRAMES[0], LIMITS, lambda _: None).rung == 1
    ladder.request(0)
    ladder.between_frames(LIMITS, lambda _: None)
    assert ladder.rung == 0
    engines.spoilt["second"] = "answers nonsense"
    ladder.request(1)
    ladder.between_frames(LIMITS, lambda _: None)
    assert ladder.rung == 0, "what fails its golden frame is not taken, asked for or not"
    with pytest.raises(InputError, match="no rung 7"):
        ladder.request(7)


def test_a_first_artefact_that_does_not_open_is_told(engines: Engines, ladder_bundle: Path) -> None:
    engines.spoilt["first"] = "answers nonsense"
    with Ladder.open(ladder_bundle) as ladder:
        assert ladder.rung == 1 and "does not answer as the artefact should" in ladder.unavailable[0]
        assert ladder.answer(FRAMES[0], LIMITS, lambda _: None).rung == 1
    engines.spoilt["second"] = "answers nan"
    with pytest.raises(EngineError, match="no artefact"):
        Ladder.open(ladder_bundle)
    with pytest.raises(InputError, match="it has: first-fp32"):
        Ladder.open(ladder_bundle, targets=["third-fp32"])


def test_an_artefact_that_passed_no_gate_is_no_rung(engines: Engines, fake_parts: Parts, tmp_path: Path) -> None:
    parts = two_artefacts(fake_parts)
    ungated = replace(parts.artefacts[1], gated=False)
    path = replace(parts, artefacts=(parts.artefacts[0], ungated)).publish(tmp_path / "b.bundle")
    with Ladder.open(path) as ladder:
        assert [rung.name for rung in ladder.rungs] == ["first-fp32"] and "gate" in ladder.unavailable[0]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are pinned on Linux")
def test_engines_are_opened_and_run_on_their_cpus(
    engines: Engines, ladder_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = os.sched_getaffinity(0), set[frozenset[int]]()
    cpu = frozenset({min(before)})
    monkeypatch.setattr(engines, "bend", lambda name, outputs: seen.add(frozenset(os.sched_getaffinity(0))) or outputs)
    with Ladder.open(ladder_bundle, advanced=LadderOptions(cpus=cpu)) as ladder:
        seen.clear()
        assert ladder.answer(FRAMES[0], LIMITS, lambda _: None).error is None
    assert seen == {cpu} and os.sched_getaffinity(0) == before


def test_a_bad_frame_is_the_frames_fault(ladder: Ladder) -> None:
    with pytest.raises(FrameError):
        ladder.answer("no frame", LIMITS, lambda _: None)  # type: ignore[arg-type]
    assert ladder.rung == 0


def test_limits_must_be_in_order() -> None:
    with pytest.raises(InputError, match="call limits"):
        CallLimits(deadline_ms=10, give_up_ms=5)


def test_a_slow_call_is_cancelled_and_the_session_goes_on(engines: Engines, ladder_bundle: Path) -> None:
    with Session.open(ladder_bundle) as session:
        dog = Watchdog(session, owns=False)
        engines.spoilt["first"] = "sleeps"
        cancel: Callable[[], None] = engines.wake.set
        session.cancel = cancel  # type: ignore[method-assign]
        misses: list[int] = []
        prediction = dog.call(FRAMES[0], CallLimits(deadline_ms=20, give_up_ms=60), lambda: misses.append(1))
        assert prediction.valid and misses == [1], "it came to its end after all"
        engines.spoilt.clear()
        assert dog.call(FRAMES[0], LIMITS, lambda: misses.append(1)).valid and misses == [1]
        dog.close()


def test_a_hanging_call_is_abandoned_and_frees_itself_later(engines: Engines, ladder_bundle: Path) -> None:
    session = Session.open(ladder_bundle)
    dog = Watchdog(session)
    engines.spoilt["first"] = "sleeps"
    with pytest.raises(EngineError, match="abandoned"):
        dog.call(FRAMES[0], CallLimits(deadline_ms=10, give_up_ms=30, grace_ms=30), lambda: None)
    with pytest.raises(EngineError, match="hangs"):
        dog.call(FRAMES[0], LIMITS, lambda: None)
    dog.close()
    engines.wake.set()
    wait_until(lambda: session._engine is None)


@pytest.mark.slow
def test_r10_twenty_rounds_of_every_failure(engines: Engines, ladder_bundle: Path) -> None:
    """The miss is told within one period of the deadline, the fallback serves within 2 s, and says that it is one."""
    rng = np.random.default_rng(10)
    hows = [SPOILS[i % len(SPOILS)] for i in range(20)]
    rng.shuffle(hows)
    told_ms, served_ms = [], []
    for how in hows:
        told, served = one_round(engines, ladder_bundle, how)
        served_ms.append(served)
        if told is not None:
            told_ms.append(told)
    assert len(told_ms) == hows.count("sleeps")
    print(f"R10: miss told after {max(told_ms):.0f} ms at most, fallback after {max(served_ms):.0f} ms at most")
    assert max(served_ms) < 2000


PERIOD_MS, BUDGET_MS = 100.0, 150.0


def one_round(engines: Engines, bundle: Path, how: str) -> tuple[float | None, float]:
    """Spoils the first engine while a loop runs.

    Returns:
        For a sleeping engine how long after its deadline that was told, ms; and how long after the engine broke the
        first good result of the fallback came, ms.
    """
    engines.spoilt.clear()
    engines.broken_at.clear()
    engines.wake = threading.Event()
    events = list[LiveEvent]()
    source = PacedSource(1000 / PERIOD_MS, FRAMES)
    options = LiveOptions(on_event=events.append, period_ms=PERIOD_MS, give_up_ms=500, grace_ms=200)
    recheck = LadderOptions(recheck_s=0.5, misses_in_a_row=0)
    with Ladder.open(bundle, advanced=recheck) as ladder:
        with Live(ladder, source, budget_ms=BUDGET_MS, advanced=options) as live:
            first = next(live)
            assert first.rung == 0
            engines.spoilt["first"] = how
            good = first_from_the_fallback(live)
            now_s = time.monotonic()
            assert good.degraded and good.prediction is not None and good.prediction.degraded
            assert live.state in (LiveState.DEGRADED, LiveState.STALE)
            assert live.counters.balanced
        engines.wake.set()
    kinds = [event.kind for event in events]
    assert LiveEventKind.ENGINE_FAILED in kinds and LiveEventKind.RUNG_CHANGED in kinds, "never silently"
    assert kinds.index(LiveEventKind.ENGINE_FAILED) < kinds.index(LiveEventKind.RUNG_CHANGED)
    broken_s = engines.broken_at["first"]
    told = [
        event.t_ns for event in events if event.kind is LiveEventKind.DEADLINE_MISSED and event.t_ns > broken_s * 1e9
    ]
    late_ms = None
    if how == "sleeps":
        late_ms = told[0] / 1e6 - broken_s * 1e3 - (BUDGET_MS + PERIOD_MS)
        assert late_ms <= PERIOD_MS
    return late_ms, (now_s - broken_s) * 1e3


def first_from_the_fallback(live: Live) -> LiveResult:
    for result in live:
        assert not (result.rung == 0 and result.valid and result.degraded)
        if result.rung == 1 and result.prediction is not None:
            return result
    raise AssertionError("the loop ended")


def test_one_rung_that_fails_is_told_and_comes_back(engines: Engines, ladder_bundle: Path) -> None:
    events = list[LiveEvent]()
    source = HandSource()
    with (
        Session.open(ladder_bundle) as session,
        Live(session, source, budget_ms=60_000, advanced=LiveOptions(on_event=events.append)) as live,
    ):
        engines.spoilt["first"] = "raises"
        source.push(FRAMES[0])
        result = next(live)
        assert result.prediction is None and not result.valid and result.degraded
        assert result.error is not None and "RuntimeError" in result.error
        assert live.state is LiveState.DEGRADED
        engines.spoilt.clear()

        def serves() -> Any:
            source.push(replace(FRAMES[1], seq=live.counters.received + 1))
            return next(live).valid

        wait_until(serves)
    assert LiveEventKind.ENGINE_FAILED in [event.kind for event in events]
