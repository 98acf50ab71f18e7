"""Every engine inside the live loop: nothing unsound gets in or out, and a run leaves the interpreter to others.

A new file in ``engines/`` is picked up by itself.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import SIDE, Parts, tiny_spec
from tests.contracts.test_engines import DTYPES, ENGINES, SHAPES, VALUES, new, slow_model
from tests.runtime.live_sources import HandSource, images, wait_until
from tinyusfm_runtime import plugins
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.session import Session

SILENT = 0.5
"""Share of a run for which a thread that holds the interpreter keeps others out of it."""


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    """An engine that works here."""
    answer = plugins.available("engines", request.param)
    if not answer.usable:
        pytest.skip(answer.reason)
    return str(request.param)


@pytest.fixture
def session(name: str, engine_parts: Callable[[str], Parts], tmp_path: Path) -> Iterator[Session]:
    with Session.open(engine_parts(name).publish(tmp_path / "b.bundle"), threads=1) as opened:
        yield opened


def smuggled(**fields: Any) -> Frame:
    """A frame that never went through its own checks, as a careless source might make one."""
    frame, sound = object.__new__(Frame), Frame(pixels=np.zeros((SIDE, SIDE), np.uint8))
    for field in Frame.__slots__:
        object.__setattr__(frame, field, fields.get(field, getattr(sound, field)))
    return frame


def matrix() -> list[tuple[str, Any]]:
    """Values x types x shapes that no engine may see, and frames that are unsound otherwise."""
    cases: list[tuple[str, Any]] = []
    for shape in SHAPES:
        for dtype in DTYPES:
            kinds = VALUES if np.dtype(dtype).kind in "fc" else [1]
            for value in kinds:
                reason = "not_finite" if np.dtype(dtype).kind in "fc" else "wrong_type"
                cases.append((reason, smuggled(pixels=np.full(shape, value, dtype))))
            cases.append(("wrong_type", smuggled(pixels=np.zeros(shape, dtype))))
        cases += [("wrong_type", smuggled(pixels=np.zeros(shape, dtype))) for dtype in ("int8", "uint16", "bool")]
        if shape != (SIDE, SIDE):
            cases.append(("wrong_shape", smuggled(pixels=np.zeros(shape, np.uint8))))
    hole = np.zeros((SIDE, SIDE), np.float32)
    hole[5, 7] = np.nan
    return [
        *cases,
        ("not_finite", smuggled(pixels=hole)),
        ("wrong_type", smuggled(pixels=None)),
        ("wrong_type", smuggled(pixels=[[1, 2], [3, 4]])),
        ("wrong_shape", smuggled(pixel_format="rgb")),
        ("wrong_shape", smuggled(pixel_format="infrared")),
        ("wrong_geometry", smuggled(spacing_mm=(float("nan"), 1.0))),
        ("wrong_geometry", smuggled(spacing_mm=(0.3, -1.0))),
        ("wrong_geometry", smuggled(seq="7")),
        ("wrong_geometry", smuggled(t_source_ns=0.5)),
        ("wrong_geometry", smuggled(t_recv_ns="now")),
        ("not_a_frame", np.zeros((SIDE, SIDE), np.uint8)),
        ("not_a_frame", b"frame"),
    ]


def test_nothing_unsound_reaches_an_engine(session: Session) -> None:
    source, cases, seen = HandSource(), matrix(), list[tuple[int, ...]]()
    assert len(cases) > 3 * 5 * 6
    engine = session._engine
    assert engine is not None
    run = engine.run

    def noted(tensor: np.ndarray) -> dict[str, np.ndarray]:
        seen.append((*tensor.shape, tensor.dtype.itemsize))
        return run(tensor)

    with Live(session, source, budget_ms=60_000) as live:
        engine.run = noted  # type: ignore[method-assign]
        wanted: dict[str, int] = {}
        for reason, case in cases:
            wanted[reason] = wanted.get(reason, 0) + 1
            source.push(case)
        wait_until(lambda: live.counters.received == len(cases))
        assert live.counters.rejected == wanted, "no silent acceptance, each under its reason"
        good = images(1)[0]
        source.push(good)
        result = next(live)
        assert result.valid and result.dropped_since_last == len(cases)
        assert live.counters.processed == 1 and live.counters.balanced
    assert set(seen) == {(1, 1, SIDE, SIDE, 1)}, "only the good frame and golden ones were run"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_output_that_is_not_finite_is_never_valid(session: Session, value: float) -> None:
    source, engine = HandSource(), session._engine
    assert engine is not None
    run = engine.run
    outputs = list(run(np.zeros((1, 1, SIDE, SIDE), np.uint8)))
    with Live(session, source, budget_ms=60_000) as live:
        for seq, spoilt in enumerate(outputs):

            def bend(tensor: np.ndarray, spoilt: str = spoilt) -> dict[str, np.ndarray]:
                found = run(tensor)
                found[spoilt].flat[-1] = value
                return found

            engine.run = bend  # type: ignore[method-assign]
            source.push(Frame(pixels=images(1)[0].pixels, seq=seq))
            result = next(live)
            assert not result.valid and result.error is not None and result.degraded
            assert result.prediction is None or result.prediction.mask_HW is None
            assert live.overlay() is None


def silence_during(work: Callable[[], object]) -> float:
    """The longest time for which no other thread got to run Python while something ran, as a share of that."""
    times: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            times.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    wait_until(lambda: len(times) > 3)
    begin = time.perf_counter()
    work()
    end = time.perf_counter()
    stop.set()
    ticker.join()
    inside = [begin, *(t for t in times if begin < t < end), end]
    return max(after - before for before, after in pairwise(inside)) / (end - begin)


def test_a_run_releases_the_interpreter(name: str) -> None:
    engine = new(name)
    engine.load(slow_model(name), tiny_spec(), EngineConfig(threads=1, rest_precision="f32"))
    tensor = np.random.default_rng(1).integers(0, 256, (1, 1, SIDE, SIDE), dtype=np.uint8)
    engine.run(tensor)
    assert any(silence_during(lambda: engine.run(tensor)) < SILENT for _ in range(5))
    engine.close()


def test_holding_the_interpreter_is_caught() -> None:
    greedy = ctypes.PyDLL(None).usleep  # PyDLL, unlike CDLL, keeps the lock
    assert all(silence_during(lambda: greedy(100_000)) >= SILENT for _ in range(3))
