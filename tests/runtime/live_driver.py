"""A small live loop for the tests of sinks: real frames, a real session, results as the loop makes them.

It answers every frame in order and keeps the rules of LiveResult; ``drop`` leaves frames out as an overtaken slot does,
``late`` ages some, ``broken`` frames get no answer. The states are those that follow from that.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.phantoms import phantom
from tests.runtime.test_sinks import predicted
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.results import LiveCounters, LiveResult, LiveState, StateChange
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.sinks import Sink, announce, deliver


@dataclass(kw_only=True)
class Driver:
    """Frames through a session, results to sinks.

    Attributes:
        session: what answers.
        budget_ms: age at which a result is stale.
        late: sequence numbers whose result is aged beyond the budget, and withheld.
        broken: sequence numbers that get no answer.
        drop: sequence numbers that are overtaken.
    """

    session: Session
    budget_ms: float = 10_000.0
    late: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    drop: frozenset[int] = frozenset()
    state: LiveState = LiveState.LOST
    counters: LiveCounters = field(default_factory=LiveCounters)

    def run(self, frames: Iterable[Frame], sinks: Iterable[Sink] = ()) -> list[LiveResult]:
        """Every result, after it was handed to the sinks."""
        taken = list(sinks)
        made = []
        for result in self._results(frames, taken):
            for sink in taken:
                deliver(sink, result)
            made.append(result)
        return made

    def _results(self, frames: Iterable[Frame], sinks: list[Sink]) -> Iterator[LiveResult]:
        index = dropped = processed = overtaken = 0
        for frame in frames:
            if frame.seq in self.drop:
                dropped, overtaken = dropped + 1, overtaken + 1
                continue
            received_ns = time.monotonic_ns()
            frame = replace(frame, t_recv_ns=received_ns)
            prediction = None if frame.seq in self.broken else self.session.predict(frame)
            age_ms = (time.monotonic_ns() - received_ns) / 1e6 + (1e6 if frame.seq in self.late else 0.0)
            stale = age_ms > self.budget_ms
            self._go(LiveState.STALE if stale else LiveState.DEGRADED if prediction is None else LiveState.LIVE, sinks)
            processed += 1
            self.counters = LiveCounters(
                received=processed + overtaken, processed=processed, dropped={"overtaken": overtaken}
            )
            yield LiveResult(
                frame=frame,
                prediction=prediction,
                index=index,
                state=self.state,
                age_ms=age_ms,
                stale=stale,
                withheld=stale,
                valid=prediction is not None and prediction.valid and not stale,
                dropped_since_last=dropped,
                engine=self.session.description,
                level=0,
                degraded=prediction is None,
                error="the engine missed its deadline" if prediction is None else None,
            )
            index, dropped = index + 1, 0

    def _go(self, after: LiveState, sinks: list[Sink]) -> None:
        if after is not self.state:
            change = StateChange(before=self.state, after=after, t_ns=time.monotonic_ns(), reason="seen by the driver")
            self.state = after
            for sink in sinks:
                announce(sink, change)


@contextmanager
def driver(bundle: Path, **settings: Any) -> Iterator[Driver]:
    """A driver on a bundle's first artefact."""
    with Session.open(bundle) as session:
        yield Driver(session=session, **settings)


def phantoms(count: int, first: int = 0) -> list[Frame]:
    """So many phantom frames, numbered from ``first``."""
    return [phantom(seed).frame for seed in range(first, first + count)]


def several(result: LiveResult, *, skipped: str | None = None) -> LiveResult:
    """The same as a result of two models, a classifier ``gate`` and ``head``, which a rule may have left out."""
    assert result.prediction is not None
    scores = np.array([0.03, 0.97] if skipped is None else [0.9, 0.1], np.float32)
    said = replace(result.prediction, mask_HW=None, measurements=(), judged=(), scores=scores, confidence=0.97)
    gate = replace(result, prediction=said, model="gate", labels=("no head", "head"), engine="onnx-fp32 on numpy")
    head = replace(result, model="head", labels=("head",), skipped=skipped)
    if skipped is not None:
        head = replace(head, prediction=None, valid=False)
    return replace(gate, models=(gate, head))


def live_result(seed: int = 3, **changes: Any) -> LiveResult:
    """A result of a perfect model on a phantom, in time, without a session."""
    frame, prediction = predicted(seed)
    values: dict[str, Any] = {
        "frame": frame, "prediction": prediction, "index": seed, "state": LiveState.LIVE, "age_ms": 12.5,
        "stale": False, "withheld": False, "valid": True, "dropped_since_last": 0, "engine": "openvino-int8 on numpy",
        "level": 0, "degraded": False,
    }  # fmt: skip
    return LiveResult(**{**values, **changes})
