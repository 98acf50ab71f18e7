"""The fallback order: an engine that sleeps, raises or answers nonsense is replaced, and never silently."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import NumpyEngine, Parts, tiny_logits
from tests.plugged import plug_in_module, plugged
from tests.runtime.live_sources import HandSource, PacedSource, images, only, wait_until
from tinyusfm_runtime.errors import EngineError, FrameError, InputError
from tinyusfm_runtime.live.fallback import Fallback, FallbackOptions
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.live.watchdog import CallLimits, Watchdog
from tinyusfm_runtime.results import LiveEvent, LiveEventKind, LiveResult, LiveState
from tinyusfm_runtime.session import Session

FRAMES = images(4)
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

    return plug_in_module(name, Engine=Engine)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    made = Engines()
    plugged(monkeypatch, "engines", **{name: engine_module(made, name) for name in ("first", "second")})
    yield made
    made.wake.set()


def two_artefacts(fake_parts: Parts) -> Parts:
    """The fake artefact twice, for two engines."""
    (fake,) = fake_parts.artefacts
    (path, entry), content = next(iter(fake.files.items())), fake_parts.files
    artefacts, files = [], {name: raw for name, raw in content.items() if name not in (path, fake.golden)}
    for name in ("first", "second"):
        place, golden = f"artefacts/{name}-fp32/model.onnx", f"golden/{name}-fp32.safetensors"
        artefacts.append(replace(fake, target=name, engine=name, files={place: entry}, golden=golden))
        files |= {place: content[path], golden: content[fake.golden]}
    return replace(fake_parts, artefacts=tuple(artefacts), files=files)


@pytest.fixture(scope="module")
def fallback_bundle(fake_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_artefacts(fake_parts).publish(tmp_path_factory.mktemp("fallback") / "two.bundle")


@pytest.fixture
def fallback(engines: Engines, fallback_bundle: Path) -> Iterator[Fallback]:
    with Fallback.open(fallback_bundle) as opened:
        yield opened
        engines.wake.set()


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    wait_until(lambda: threading.active_count() <= before)


def test_the_first_level_answers_while_nothing_is_wrong(fallback: Fallback) -> None:
    events = list[LiveEvent]()
    answered = fallback.answer(FRAMES[0], LIMITS, events.append)
    assert answered.prediction is not None and answered.prediction.valid and answered.error is None
    assert answered.level == fallback.level == 0 and "first-fp32" in answered.engine and not events
    assert [level.name for level in fallback.levels] == ["first-fp32", "second-fp32"] and not fallback.unavailable


@pytest.mark.parametrize("how", [spoil for spoil in SPOILS if spoil not in ("sleeps", "answers nonsense")])
def test_a_failing_level_is_left_with_a_word(
    fallback: Fallback, engines: Engines, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    events = list[LiveEvent]()
    engines.spoilt["first"] = how
    caplog.set_level(logging.WARNING)
    failed = fallback.answer(FRAMES[0], LIMITS, events.append)
    assert failed.error is not None and failed.level == 0
    served = fallback.answer(FRAMES[1], LIMITS, events.append)
    assert served.error is None and served.level == fallback.level == 1 and "second-fp32" in served.engine
    assert [event.kind for event in events] == [LiveEventKind.ENGINE_FAILED, LiveEventKind.LEVEL_CHANGED]
    assert len(caplog.records) == 2 and not any("\n" in record.getMessage() for record in caplog.records)


def test_a_file_loses_no_answer(fallback: Fallback, engines: Engines) -> None:
    engines.spoilt["first"] = "raises"
    answered = fallback.answer(FRAMES[0], LIMITS, lambda _: None, insist=True)
    assert answered.error is None and answered.level == 1


def test_a_call_that_is_merely_late_is_told_and_counted(engines: Engines, fallback_bundle: Path) -> None:
    events = list[LiveEvent]()
    limits = CallLimits(deadline_ms=1, give_up_ms=20_000)
    with Fallback.open(fallback_bundle, advanced=FallbackOptions(misses_in_a_row=3)) as fallback:
        engines.spoilt["first"], engines.slow_s = "dawdles", 0.05
        for _ in range(2):
            answered = fallback.answer(FRAMES[0], limits, events.append)
            assert answered.late and answered.prediction is not None and answered.level == 0
        assert {event.kind for event in events} == {LiveEventKind.DEADLINE_MISSED}
        fallback.answer(FRAMES[0], limits, events.append)
        assert fallback.level == 1, "three misses in a row are enough"


def test_nonsense_of_the_right_shape_is_found_by_golden_frames(engines: Engines, fallback_bundle: Path) -> None:
    events = list[LiveEvent]()
    with Fallback.open(fallback_bundle, advanced=FallbackOptions(recheck_s=0.0)) as fallback:
        fallback.between_frames(LIMITS, events.append)
        assert fallback.level == 0 and not events
        engines.spoilt["first"] = "answers nonsense"
        assert fallback.answer(FRAMES[0], LIMITS, events.append).error is None, "it cannot be seen in one answer"
        fallback.between_frames(LIMITS, events.append)
        assert fallback.level == 1 and "golden frame" in events[0].reason
    engines.spoilt.clear()
    with Fallback.open(fallback_bundle, advanced=FallbackOptions(recheck_s=None)) as fallback:
        engines.spoilt["first"] = "answers nonsense"
        fallback.between_frames(LIMITS, events.append)
        assert fallback.level == 0, "the control: without rechecks nobody notices"


def test_a_golden_frame_waits_for_a_gap_between_live_frames_but_not_for_ever(
    engines: Engines, fallback_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now_s=100.0, monotonic=lambda: clock.now_s, monotonic_ns=lambda: round(1e9 * clock.now_s))
    monkeypatch.setattr("tinyusfm_runtime.live.fallback.time", clock)
    with Fallback.open(fallback_bundle, advanced=FallbackOptions(recheck_s=1.0)) as fallback:
        level = fallback.levels[0]
        level.last_check_s, level.check_took_s = clock.now_s, 0.040
        engines.spoilt["first"] = "answers nonsense"

        def asked(after_s: float, spare_ms: float) -> bool:
            clock.now_s = 100.0 + after_s
            fallback.between_frames(LIMITS, lambda _: None, spare_ms)
            return fallback.level == 1

        assert not asked(0.9, math.inf), "it is not due"
        assert not asked(1.1, 40.0) and not asked(2.9, -5.0), "the next live frame would wait for it"
        assert asked(3.0, -5.0), "a stream without gaps is checked all the same"
        fallback.request(0)
        engines.spoilt.clear()
        fallback.between_frames(LIMITS, lambda _: None)
        assert fallback.level == 0
        level.last_check_s, level.check_took_s = clock.now_s, 0.040
        engines.spoilt["first"] = "answers nonsense"
        assert not asked(4.5, 32.0) and asked(4.6, 36.0), "the longer it waits the shorter a gap will do"


def test_a_stand_in_that_fails_its_golden_frame_never_answers(fallback: Fallback, engines: Engines) -> None:
    events = list[LiveEvent]()
    engines.spoilt |= {"first": "raises", "second": "answers nonsense"}
    fallback.answer(FRAMES[0], LIMITS, events.append)
    answered = fallback.answer(FRAMES[1], LIMITS, events.append)
    assert answered.prediction is None and answered.error is not None and "no artefact is left" in answered.error
    assert any("cannot take over" in event.reason for event in events)


@pytest.fixture
def eager(engines: Engines, fallback_bundle: Path) -> Iterator[Fallback]:
    """One that tries failed levels again soon."""
    with Fallback.open(fallback_bundle, advanced=FallbackOptions(retry_s=0.05)) as opened:
        yield opened
        engines.wake.set()


def test_with_no_level_left_they_are_tried_again(eager: Fallback, engines: Engines) -> None:
    fallback = eager
    engines.spoilt |= {"first": "raises", "second": "raises"}
    assert fallback.answer(FRAMES[0], LIMITS, lambda _: None).error is not None
    fallback.between_frames(LIMITS, lambda _: None)
    assert fallback.answer(FRAMES[0], LIMITS, lambda _: None).error is not None
    del engines.spoilt["second"]
    time.sleep(0.06)
    fallback.between_frames(LIMITS, lambda _: None)
    answered = fallback.answer(FRAMES[0], LIMITS, lambda _: None)
    assert answered.error is None and answered.level == 1


def test_nothing_climbs_back_unless_it_is_asked(fallback: Fallback, engines: Engines) -> None:
    engines.spoilt["first"] = "raises"
    fallback.answer(FRAMES[0], LIMITS, lambda _: None)
    engines.spoilt.clear()
    for _ in range(3):
        fallback.between_frames(LIMITS, lambda _: None)
        assert fallback.answer(FRAMES[0], LIMITS, lambda _: None).level == 1
    fallback.request(0)
    fallback.between_frames(LIMITS, lambda _: None)
    assert fallback.level == 0
    engines.spoilt["second"] = "answers nonsense"
    fallback.request(1)
    fallback.between_frames(LIMITS, lambda _: None)
    assert fallback.level == 0, "what fails its golden frame is not taken, asked for or not"
    with pytest.raises(InputError, match="no level 7"):
        fallback.request(7)


def test_a_first_artefact_that_does_not_open_is_told(engines: Engines, fallback_bundle: Path) -> None:
    engines.spoilt["first"] = "answers nonsense"
    with Fallback.open(fallback_bundle) as fallback:
        assert fallback.level == 1 and "does not answer as the artefact should" in fallback.unavailable[0]
        assert fallback.answer(FRAMES[0], LIMITS, lambda _: None).level == 1
    engines.spoilt["second"] = "answers nan"
    with pytest.raises(EngineError, match="no artefact"):
        Fallback.open(fallback_bundle)
    with pytest.raises(InputError, match="it has: first-fp32"):
        Fallback.open(fallback_bundle, targets=["third-fp32"])


def test_an_artefact_that_passed_no_gate_is_no_level(engines: Engines, fake_parts: Parts, tmp_path: Path) -> None:
    parts = two_artefacts(fake_parts)
    ungated = replace(parts.artefacts[1], gated=False)
    path = replace(parts, artefacts=(parts.artefacts[0], ungated)).publish(tmp_path / "b.bundle")
    with Fallback.open(path) as fallback:
        assert [level.name for level in fallback.levels] == ["first-fp32"] and "gate" in fallback.unavailable[0]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are pinned on Linux")
def test_engines_are_opened_and_run_on_their_cpus(
    engines: Engines, fallback_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = os.sched_getaffinity(0), set[frozenset[int]]()
    cpu = frozenset({min(before)})
    monkeypatch.setattr(engines, "bend", lambda name, outputs: seen.add(frozenset(os.sched_getaffinity(0))) or outputs)
    with Fallback.open(fallback_bundle, advanced=FallbackOptions(cpus=cpu)) as fallback:
        seen.clear()
        assert fallback.answer(FRAMES[0], LIMITS, lambda _: None).error is None
    assert seen == {cpu} and os.sched_getaffinity(0) == before


def test_a_bad_frame_is_the_frames_fault(fallback: Fallback) -> None:
    with pytest.raises(FrameError):
        fallback.answer("no frame", LIMITS, lambda _: None)  # type: ignore[arg-type]
    assert fallback.level == 0


def test_limits_must_be_in_order() -> None:
    with pytest.raises(InputError, match="call limits"):
        CallLimits(deadline_ms=10, give_up_ms=5)


def test_a_slow_call_is_cancelled_and_the_session_goes_on(engines: Engines, fallback_bundle: Path) -> None:
    with Session.open(fallback_bundle) as session:
        watchdog = Watchdog(session, owns=False)
        engines.spoilt["first"] = "sleeps"
        cancel: Callable[[], None] = engines.wake.set
        session.cancel = cancel  # type: ignore[method-assign]
        misses: list[int] = []
        prediction = watchdog.call(FRAMES[0], CallLimits(deadline_ms=20, give_up_ms=60), lambda: misses.append(1))
        assert prediction.valid and misses == [1], "it came to its end after all"
        engines.spoilt.clear()
        assert watchdog.call(FRAMES[0], LIMITS, lambda: misses.append(1)).valid and misses == [1]
        watchdog.close()


def test_a_hanging_call_is_abandoned_and_frees_itself_later(engines: Engines, fallback_bundle: Path) -> None:
    session = Session.open(fallback_bundle)
    watchdog = Watchdog(session)
    engines.spoilt["first"] = "sleeps"
    with pytest.raises(EngineError, match="abandoned"):
        watchdog.call(FRAMES[0], CallLimits(deadline_ms=10, give_up_ms=30, grace_ms=30), lambda: None)
    with pytest.raises(EngineError, match="hangs"):
        watchdog.call(FRAMES[0], LIMITS, lambda: None)
    watchdog.close()
    engines.wake.set()
    wait_until(lambda: session._engine is None)


@pytest.mark.slow
def test_every_failure_is_told_and_replaced_in_twenty_rounds(engines: Engines, fallback_bundle: Path) -> None:
    """The miss is told within one period of the deadline, the fallback serves within 2 s, and says that it is one."""
    rng = np.random.default_rng(10)
    hows = [SPOILS[i % len(SPOILS)] for i in range(20)]
    rng.shuffle(hows)
    told_ms, served_ms = [], []
    for how in hows:
        told, served = one_round(engines, fallback_bundle, how)
        served_ms.append(served)
        if told is not None:
            told_ms.append(told)
    assert len(told_ms) == hows.count("sleeps")
    print(f"miss told after {max(told_ms):.0f} ms at most, fallback after {max(served_ms):.0f} ms at most")
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
    options = LiveOptions(period_ms=PERIOD_MS, give_up_ms=500, grace_ms=200)
    recheck = FallbackOptions(recheck_s=0.5, misses_in_a_row=0)
    with Fallback.open(bundle, advanced=recheck) as fallback:
        with Live(fallback, source, budget_ms=BUDGET_MS, on_event=only(LiveEvent, events), advanced=options) as live:
            first = next(live)
            assert first.level == 0
            engines.spoilt["first"] = how
            good = first_from_the_fallback(live)
            now_s = time.monotonic()
            assert good.degraded and good.prediction is not None and good.prediction.degraded
            assert live.state in (LiveState.DEGRADED, LiveState.STALE)
            assert live.counters.balanced
        engines.wake.set()
    kinds = [event.kind for event in events]
    assert LiveEventKind.ENGINE_FAILED in kinds and LiveEventKind.LEVEL_CHANGED in kinds, "never silently"
    assert kinds.index(LiveEventKind.ENGINE_FAILED) < kinds.index(LiveEventKind.LEVEL_CHANGED)
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
        assert not (result.level == 0 and result.valid and result.degraded)
        if result.level == 1 and result.prediction is not None:
            return result
    raise AssertionError("the loop ended")


def test_one_level_that_fails_is_told_and_comes_back(engines: Engines, fallback_bundle: Path) -> None:
    events = list[LiveEvent]()
    source = HandSource()
    with (
        Session.open(fallback_bundle) as session,
        Live(session, source, budget_ms=60_000, on_event=only(LiveEvent, events)) as live,
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
