"""The fallback on the real libraries: ONNX Runtime and OpenVINO that overrun, raise or answer nonsense."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import make_parts, tiny_spec
from tests.contracts import test_engines as slow_models
from tests.runtime.live_sources import PacedSource, images, only
from tinyusfm_runtime import plugins
from tinyusfm_runtime.engines import Engine, EngineConfig
from tinyusfm_runtime.live.fallback import Fallback, FallbackOptions
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.results import LiveEvent, LiveEventKind, LiveResult
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.spec import PreprocessSpec

FRAMES = images(4)
HOWS = ("overruns", "raises", "answers nan", "answers nonsense")
ROUNDS = 20
LONG_SIDE = 384
"""300 convolutions of this size take seconds in either library; the watchdog gives up after half of one."""


@pytest.fixture(params=["ort", "ov"])
def first(request: pytest.FixtureRequest) -> str:
    """The engine that fails; the other one stands in."""
    for name in ("ort", "ov"):
        answer = plugins.available("engines", name)
        if not answer.usable:
            pytest.skip(answer.reason)
    return str(request.param)


@pytest.fixture
def bundle(first: str, tiny_files: Callable[[str], Any], tmp_path: Path) -> Path:
    second = "ov" if first == "ort" else "ort"
    return make_parts({name: tiny_files(name) for name in (first, second)}).publish(tmp_path / "two.bundle")


@pytest.fixture
def long(first: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The same library with a graph that runs for seconds."""
    monkeypatch.setattr(slow_models, "SIDE", LONG_SIDE)
    engine = slow_models.new(first)
    spec = tiny_spec(preprocess=PreprocessSpec(height=LONG_SIDE, width=LONG_SIDE))
    engine.load(slow_models.slow_model(first), spec, EngineConfig(threads=1, rest_precision="f32"))
    return engine


class Spoilt:
    """The library's own engine, and what goes wrong with it; everything that is computed, the library computes."""

    def __init__(self, engine: Any, how: str, long: Engine) -> None:
        self._engine, self._how, self._long = engine, how, long
        self.begun_s: float | None = None

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        self.begun_s = self.begun_s or time.monotonic()
        if self._how == "overruns":
            return self._long.run(np.zeros((1, 1, LONG_SIDE, LONG_SIDE), np.uint8))
        if self._how == "raises":
            return self._engine.run(np.ascontiguousarray(tensor[..., :-1]))  # type: ignore[no-any-return]
        outputs = {name: value.copy() for name, value in self._engine.run(tensor).items()}
        if self._how == "answers nan":
            outputs["logits"][..., 3, 3] = np.nan
        else:
            outputs["logits"] *= -1
        return outputs

    def cancel(self) -> None:
        self._long.cancel()

    def close(self) -> None:
        self._engine.close()


@pytest.mark.slow
def test_a_real_engine_that_fails_is_replaced_in_twenty_rounds(first: str, bundle: Path, long: Engine) -> None:
    told_ms, served_ms = [], []
    for number in range(ROUNDS):
        how = HOWS[number % len(HOWS)]
        told, served, events = one_round(bundle, how, long)
        served_ms.append(served)
        failed = next(event.reason for event in events if event.kind is LiveEventKind.ENGINE_FAILED)
        if how == "overruns":
            assert told is not None and "cancelled" in failed and "no reaction" not in failed, failed
            told_ms.append(told)
        elif how == "answers nonsense":
            assert "golden frame" in failed
    print(f"{first}: miss told {max(told_ms):.0f} ms after its deadline, fallback after {max(served_ms):.0f} ms")
    assert max(served_ms) < 2000, "two seconds without an answer are too long for whoever looks at the screen"


def one_round(bundle: Path, how: str, long: Engine) -> tuple[float | None, float, list[LiveEvent]]:
    """Spoils the first engine while a loop runs.

    Returns:
        How long after the deadline a miss was told, ms, or None; how long after the engine broke the fallback's first
        good result came, ms; what was told.
    """
    events = list[LiveEvent]()
    # only nonsense needs golden frames; elsewhere one of them would meet the broken engine first, and no deadline
    options = FallbackOptions(recheck_s=0.3 if how == "answers nonsense" else None, misses_in_a_row=0, threads=1)
    with Fallback.open(bundle, advanced=options) as fallback:
        period_ms = 4 * healthy_ms(fallback) + 100
        limits = LiveOptions(period_ms=period_ms, give_up_ms=3 * period_ms, grace_ms=1000)
        budget_ms = 1.5 * period_ms
        source, keep = PacedSource(1000 / period_ms, FRAMES), only(LiveEvent, events)
        with Live(fallback, source, budget_ms=budget_ms, on_event=keep, advanced=limits) as live:
            assert next(live).level == 0
            session = fallback.levels[0].watchdog.predictor
            assert isinstance(session, Session) and session._engine is not None
            spoilt = Spoilt(session._engine, how, long)
            session._engine = spoilt  # type: ignore[assignment]
            good = first_from_the_fallback(live)
            served_s = time.monotonic()
            assert good.degraded and good.prediction is not None and good.prediction.degraded
            assert live.counters.balanced
    begun_s = spoilt.begun_s
    assert begun_s is not None
    kinds = [event.kind for event in events]
    assert kinds.index(LiveEventKind.ENGINE_FAILED) < kinds.index(LiveEventKind.LEVEL_CHANGED), "never silently"
    missed = [event.t_ns for event in events if event.kind is LiveEventKind.DEADLINE_MISSED]
    told_ms = None
    if how == "overruns":
        told_ms = min(t_ns for t_ns in missed if t_ns > begun_s * 1e9) / 1e6 - begun_s * 1e3 - (budget_ms + period_ms)
        assert told_ms <= period_ms, "a miss is told within a period"
    return told_ms, (served_s - begun_s) * 1e3, events


def healthy_ms(fallback: Fallback) -> float:
    """The slowest of some answers of the engines as they are, on this machine as busy as it is now."""
    times = []
    for level in fallback.levels:
        for frame in FRAMES:
            begin_s = time.perf_counter()
            level.watchdog.predictor.predict(frame)
            times.append((time.perf_counter() - begin_s) * 1e3)
    return min(max(times), 25.0)


def first_from_the_fallback(live: Live) -> LiveResult:
    for result in live:
        if result.level == 1 and result.prediction is not None:
            return result
    raise AssertionError("the loop ended")
