"""Live: frames from a source through a session, newest first.

Late results are marked and withheld.

    with Live("fetal-head.bundle", open_source("igtl://127.0.0.1:18944"), fallback=True) as live:
        for result in live:
            print(result.state, result.age_ms, result.prediction)

Three threads, and the engine's own:

1. capture (capture.py) drains the source into a slot of one; for files a queue;
2. inference answers and hands results on. It is not the iterator's thread: a slow reader sees fewer results, and makes
   no frame old;
3. the clock looks after states and the overlay (overlay.py) that has to come off the screen;
4. the watchdog around the engine (watchdog.py) has a thread of its own.

A result owns its mask: nothing in the loop writes to an array it has handed out, however long a result is held. A
source must not write to pixels it has handed out either, or ``copy_frames`` is needed.

It knows no transport and no engine; states are in state.py, falling back in fallback.py, swapping in swap.py, what is
kept of each of several models in models.py, their order in rules.py.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tinyusfm_runtime.device.machine import pin
from tinyusfm_runtime.drift import DriftMonitor
from tinyusfm_runtime.errors import EdgeError, FrameError, InputError, NoSourceError
from tinyusfm_runtime.frame import Frame, FrameSource, LiveSource
from tinyusfm_runtime.live import check as frame_check
from tinyusfm_runtime.live.capture import Capture
from tinyusfm_runtime.live.fallback import Answered, Fallback
from tinyusfm_runtime.live.latency import LatencyLog, LiveLatency
from tinyusfm_runtime.live.models import (
    Given,
    LiveModel,
    ModelTurn,
    is_model_name,
    named_report,
    settled_names,
    take_turn,
    why_degraded,
)
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.live.overlay import Overlay
from tinyusfm_runtime.live.queues import Inbox, Outbox
from tinyusfm_runtime.live.rules import ModelRule, ordered, read_rules
from tinyusfm_runtime.live.smoothing import TemporalOptions
from tinyusfm_runtime.live.state import StateMachine
from tinyusfm_runtime.live.swap import RunningLoop, SwapOptions, SwapReport, Tap, swap
from tinyusfm_runtime.live.watchdog import CallLimits
from tinyusfm_runtime.numerics.shared_input import SharedInput
from tinyusfm_runtime.results import (
    DropPolicy,
    LiveCounters,
    LiveEvent,
    LiveEventKind,
    LiveResult,
    LiveState,
    StateChange,
)
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.sinks import ModelFacts, Sink, announce, deliver, introduce

_log = logging.getLogger(__name__)
DEFAULT_BUDGET_MS = 100.0
"""Of a live source, where none is given: three frames at 30 per second."""
_SOURCE_ENDS_S = 5.0  # a source must end its iteration soon after close


class Live:
    """The loop: a context manager and an iterator of results.

    Entering it opens what it was given and starts.

        Live("fetal-head.bundle", open_source("camera:0"))                   # the bundle's first artefact
        Live("fetal-head.bundle", source, fallback=True, isolate=True)       # the others stand by, all killable
        Live(session, source, budget_ms=33, sinks=[sink], on_event=print)    # what was opened stays its opener's
        Live(["gate.bundle", "fetal-head.bundle"], source, rules="rules.toml")               # several models a frame

    Args:
        session: a bundle (folder or open bundle), which the loop opens and closes itself; or an open session or
            fallback, which stays its opener's to close. Several: a list, or a dictionary that names them.
        source: where frames come from; entered and left by the loop.
        budget_ms: age above which a result is stale. None is 100 for a LiveSource and no limit for anything else;
            ``math.inf`` is no limit.
        policy: None is NEWEST for a LiveSource and LOSSLESS for anything else.
        fallback: of a bundle: open all of its artefacts; when one fails, the next one answers.
        isolate: of a bundle: run each artefact in a process of its own, which is killed when it hangs.
        sinks: open sinks; every result goes to each of them, in order, and states and events to those that listen.
            They stay their opener's to close.
        on_event: called with every change of state and every event, in the thread in which it happens; must not block.
        temporal: smoothing over time, or True for the usual one.
        drift: watches whether frames still look like the calibration set; True takes the bundle's own statistic. Each
            prediction then carries its reading. Of several models: True, or monitors by name.
        rules: of several models: the order in which they are asked and when one is left out (live/rules.py), a TOML
            file or its content.
        advanced: everything else.

    Raises:
        InputError: the budget is not above 0, two arguments contradict each other, or the rules are none.
    """

    def __init__(
        self,
        session: Given | Sequence[Given] | Mapping[str, Given],
        source: FrameSource,
        *,
        budget_ms: float | None = None,
        policy: DropPolicy | None = None,
        fallback: bool = False,
        isolate: bool = False,
        sinks: Sequence[Sink] = (),
        on_event: Callable[[StateChange | LiveEvent], None] | None = None,
        temporal: TemporalOptions | bool = False,
        drift: DriftMonitor | bool | Mapping[str, DriftMonitor] = False,
        rules: str | Path | Mapping[str, Any] | None = None,
        advanced: LiveOptions | None = None,
    ) -> None:
        given = _named(session)
        if any(isinstance(one, Session | Fallback) for _, one in given) and (fallback or isolate):
            raise InputError("fallback and isolate need the bundle itself: give Live its folder, not what it opened")
        if drift is True and (fallback or isolate or any(isinstance(one, Fallback) for _, one in given)):
            raise InputError("drift=True watches one session: leave fallback and isolate out")
        self._several = len(given) > 1
        if self._several and any(not hasattr(sink, "write_live") for sink in sinks):
            raise InputError("a sink without write_live takes the answers of one model alone: give it write_live")
        if not self._several and (rules is not None or isinstance(drift, Mapping)):
            raise InputError("rules and drift by name are for several models: give Live a list of bundles")
        self._rules: dict[str, ModelRule] = {} if rules is None else read_rules(rules)
        self._order: tuple[str, ...] = ()
        is_live = isinstance(source, LiveSource)
        self.options = advanced or LiveOptions()
        self.budget_ms = _budget(budget_ms, is_live=is_live)
        self.policy = policy or (DropPolicy.NEWEST if is_live else DropPolicy.LOSSLESS)
        self._stand_by, self._isolate = fallback, isolate
        self._sinks, self._on_event = tuple(sinks), on_event
        places = self.options.queue_places
        self._inbox, self._outbox = Inbox(self.policy, places), Outbox(self.policy, places)
        watch = self.policy is DropPolicy.NEWEST
        self._states = StateMachine(self.options.limits, self._report, watch_arrivals=watch, now_ns=time.monotonic_ns())
        self._capture = Capture(source, self._inbox, self._states, self.options, self.policy, self._fail)
        self._overlay = Overlay(self.options.overlay_ms(self.budget_ms))
        self._latencies = LatencyLog()
        usual = TemporalOptions() if temporal is True else temporal or None
        self._drifts = drift if isinstance(drift, Mapping) else {}
        every = None if isinstance(drift, Mapping) else drift
        self._models = [LiveModel(one, name=name, temporal=usual, drift=every) for name, one in given]
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._ended = False
        self._failure: Exception | None = None
        self._index = 0
        self._swap_lock = threading.Lock()

    def __enter__(self) -> Live:
        if self._models[0].is_open:
            raise InputError("a live loop runs once: make another one")
        if self._several:
            self._settle_names()
        try:
            self._open_models()
            self._introduce()
            self._capture.enter()
        except BaseException:
            self._close_models()
            raise
        self._states.begin(time.monotonic_ns())
        for name, work in (("capture", self._capture.run), ("infer", self._infer), ("clock", self._clock)):
            self._threads.append(threading.Thread(target=work, name=f"tinyusfm-{name}", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[LiveResult]:
        return self

    def __next__(self) -> LiveResult:
        """Waits for the next result.

        With NEWEST the newest one, its age and staleness those of now.

        Raises:
            SourceError: the source broke off.
            OutputError: a sink could not write.
        """
        result = self._outbox.take()
        if result is None:
            if self._failure is not None:
                raise self._failure
            raise StopIteration
        return self._aged(result) if self.policy is DropPolicy.NEWEST else result

    def __repr__(self) -> str:
        """Engine in use, state and frame counts, one line."""
        if not self._models[-1].is_open:
            return "Live(not entered yet)"
        counters = self.counters
        return f"Live({self.description}: {self.state.value}, {counters.processed} of {counters.received} answered)"

    @property
    def is_live(self) -> bool:
        """True if frames of the source are lost when nobody takes them."""
        return self._capture.is_live

    @property
    def state(self) -> LiveState:
        """The state now; LOST before the loop was entered."""
        return self._states.state if self._models[-1].is_open else LiveState.LOST

    @property
    def states(self) -> dict[str, LiveState]:
        """The state of each model, by name.

        That of the stream where frames are late or missing, else as of the model's last answers.
        """
        return (
            {} if not self._models[-1].is_open else {model.name: model.state_in(self.state) for model in self._models}
        )

    @property
    def taps(self) -> list[Tap]:
        """Called with every answer of the only model, or of the first."""
        return self._models[0].taps

    @property
    def counters(self) -> LiveCounters:
        """Where every frame went, at this instant."""
        unseen = {"results_unseen": self._outbox.unseen} if self._outbox.unseen else {}
        return self._inbox.counters(self._capture.counters() | unseen)

    @property
    def description(self) -> str:
        """Artefact and engine in use, one line."""
        if not self._models[-1].is_open:
            return ""
        if not self._several:
            return self.fallback.description
        return "; ".join(f"{model.name}: {model.fallback.description}" for model in self._models)

    @property
    def fallback(self) -> Fallback:
        """The fallback in use; ``request`` on it asks for another level.

        Raises:
            InputError: the loop was not entered, or has several models (see ``fallback_of``).
        """
        return self._model(None).fallback

    def fallback_of(self, model: str) -> Fallback:
        """The fallback in use of one of several models.

        Args:
            model: its name.

        Raises:
            InputError: the loop was not entered, or there is no such model.
        """
        return self._model(model).fallback

    def overlay(self) -> LiveResult | None:
        """The last result that may be shown now, or None.

        None: nothing yet, all withheld or invalid, or too old.
        """
        self._expire(time.monotonic_ns())
        return self._overlay.shown

    def latency(self) -> LiveLatency:
        """Ages and engine times so far, raw."""
        return self._latencies.report(self._capture.period.ms, self._inbox.deepest)

    def swap(self, bundle: str | Path, *, model: str | None = None, advanced: SwapOptions | None = None) -> SwapReport:
        """Goes over to another bundle while the loop runs (see swap.py).

        Args:
            bundle: folder of the other bundle.
            model: of several models, the one whose bundle it takes the place of; the others go on as they are.
            advanced: how careful to be.

        Returns:
            How it went, when that is decided.

        Raises:
            InputError: called in one of the loop's own threads, the loop does not run, or there is no such model.
        """
        swapped = self._model(model)
        if not self.runs or self.owns_this_thread:
            raise InputError("swap a bundle while the loop runs, and not from one of its own callbacks")
        with self._swap_lock:
            running = RunningLoop(
                fallback=swapped.fallback,
                options=self.options,
                taps=swapped.taps,
                counters=lambda: self.counters,
                ages_ms=self.latency().age_ms,
            )
            return swap(swapped, running, bundle, advanced)

    def close(self) -> None:
        """Ends the loop. Idempotent.

        Frames that wait are dropped as CLOSING, one in the engine is answered.

        From a callback, in one of the loop's own threads, it only asks for the end; leaving the context waits for it.
        """
        if not self._threads:
            return
        if not self._closing.is_set():
            self._closing.set()
            self._capture.stop()
            self._inbox.close()
            self._outbox.close()
        if self.owns_this_thread or self._ended:
            return
        self._ended = True
        for thread in self._threads:
            thread.join(_SOURCE_ENDS_S if thread is self._threads[0] else None)
            if thread.is_alive():
                _log.warning("the source does not end %.0f s after it was closed", _SOURCE_ENDS_S)
        self._capture.leave()
        self._close_models()

    def _settle_names(self) -> None:
        """Names, rules and monitors of several models, before any engine is loaded."""
        specs = [model.look_up() for model in self._models]
        for model, name in zip(self._models, settled_names([model.name for model in self._models], specs), strict=True):
            model.name = name
        by_name = {model.name: spec for model, spec in zip(self._models, specs, strict=True)}
        if unknown := [name for name in self._drifts if name not in by_name]:
            raise InputError(f"drift: there is no model {unknown[0]!r}; there is: {', '.join(by_name)}")
        self._order = ordered(self._rules, by_name)

    def _open_models(self) -> None:
        shared = SharedInput() if self._several else None
        for model in self._models:
            model.watch_drift(self._drifts.get(model.name))
            model.report = named_report(model.name, self.report) if self._several else self.report
            model.open(
                stand_by=self._stand_by,
                isolate=self._isolate,
                answers=lambda: self._threads[1].is_alive(),
                tick_s=self.options.tick_ms / 1e3,
                shared=shared,
            )

    def _introduce(self) -> None:
        """Tells the sinks of several models."""
        manifests = [(model.name, model.fallback.manifest) for model in self._models]
        facts = [
            ModelFacts(name=name, labels=tuple(manifest.spec.labels), bundle_id=manifest.manifest_sha256)
            for name, manifest in manifests
        ]
        for sink in self._sinks if self._several else ():
            introduce(sink, facts)

    def _close_models(self) -> None:
        for model in self._models:
            model.close()

    def _model(self, name: str | None) -> LiveModel:
        """One of the models by its name, or the only one."""
        if name is None and not self._several:
            return self._models[0]
        for model in self._models:
            if name is not None and model.name == name:
                return model
        there = ", ".join(model.name for model in self._models)
        raise InputError(f"which model is meant? there is no {name!r}; there is: {there}")

    @property
    def runs(self) -> bool:
        """True from entering until the last frame is answered."""
        return len(self._threads) == 3 and self._threads[1].is_alive() and not self._closing.is_set()

    @property
    def owns_this_thread(self) -> bool:
        """True in one of the loop's own threads, where nobody may wait for the loop."""
        return threading.current_thread() in self._threads

    # inference thread

    def _infer(self) -> None:
        try:
            pin(self.options.infer_cpus)
            while not self._inbox.finished:
                self._between_frames()
                frame = self._inbox.take(self.options.tick_ms / 1e3)
                if frame is not None:
                    self._answer(frame)
        except EdgeError as error:
            self._fail(error)
        except Exception as error:
            _log.exception("the live loop broke")
            self._fail(error)
        finally:
            # nobody answers any more: what still comes is booked, and the source is not held up
            self._inbox.close()
            self._outbox.end()

    def _between_frames(self) -> None:
        for model in self._models:
            model.between_frames(self._limits(), self._capture.period.spare_ms(time.monotonic_ns()))

    def _answer(self, frame: Frame) -> None:
        insist = self.policy is DropPolicy.LOSSLESS
        if self._several:
            by_name = {model.name: model for model in self._models}
            turns = list(take_turn(by_name, self._order, self._rules, frame, self._limits(), insist=insist).values())
        else:
            turns = [self._only_turn(frame, insist=insist)]
        if all(turn.misplaced or turn.skipped is not None for turn in turns) and any(turn.misplaced for turn in turns):
            self._inbox.unusable(frame_check.MISPLACED)
            return
        askers = [turn.model.fallback for turn in turns]
        result = self._result(frame, turns)
        self._overlay.show(result)
        for turn, asked, each in zip(turns, askers, result.each, strict=True):
            for tap in tuple(turn.model.taps) if turn.skipped is None else ():
                tap(asked, frame, turn.answered, each)
        self._outbox.put(result)
        for sink in self._sinks:
            deliver(sink, result)

    def _only_turn(self, frame: Frame, *, insist: bool) -> ModelTurn:
        model = self._models[0]
        try:
            return ModelTurn(model=model, answered=model.answer(frame, self._limits(), insist=insist))
        except FrameError as error:
            nothing = Answered(prediction=None, error=str(error), late=False, level=model.fallback.level, engine="")
            return ModelTurn(model=model, answered=nothing, misplaced=True)

    def _result(self, frame: Frame, turns: Sequence[ModelTurn]) -> LiveResult:
        """What came of a frame.

        Of one model its result, of several that of the first with all of them in it.
        """
        assert frame.t_recv_ns is not None
        predictions = [turn.model.final(turn.answered, frame) for turn in turns]
        degraded = [why_degraded(turn.answered) for turn in turns]
        now_ns = time.monotonic_ns()
        age_ms = (now_ns - frame.t_recv_ns) / 1e6
        stale = self.budget_ms is not None and age_ms > self.budget_ms
        times = [prediction.timings.infer_ms for prediction in predictions if prediction is not None]
        late = any(turn.answered.late for turn in turns)
        self._latencies.add(age_ms, sum(times) if times else None, stale=stale, late=late)
        self._states.result(
            now_ns, stale=stale, degraded=self._reasons(turns, degraded), period_ms=self._capture.period.ms
        )
        withheld, dropped = stale and self._withholds, self._inbox.processed()
        results = []
        for turn, prediction, why in zip(turns, predictions, degraded, strict=True):
            usable = prediction is not None and prediction.valid and prediction.verified
            named: dict[str, Any] = {}
            if self._several:
                if turn.skipped is None:
                    turn.model.note(degraded=why is not None, fresh_results=self.options.limits.fresh_results)
                named = {"model": turn.model.name, "labels": tuple(turn.model.fallback.spec.labels)}
            results.append(
                LiveResult(
                    frame=frame,
                    prediction=prediction,
                    index=self._index,
                    state=turn.model.state_in(self._states.state) if self._several else self._states.state,
                    age_ms=age_ms,
                    stale=stale,
                    withheld=withheld,
                    valid=usable and not withheld,
                    dropped_since_last=dropped,
                    engine=turn.answered.engine,
                    level=turn.answered.level,
                    degraded=why is not None,
                    error=turn.answered.error,
                    reading=turn.model.smoothed(prediction, frame.t_recv_ns),
                    skipped=turn.skipped,
                    **named,
                )
            )
        self._index += 1
        if not self._several:
            return results[0]
        any_degraded = any(result.degraded for result in results)
        return replace(results[0], state=self._states.state, degraded=any_degraded, models=tuple(results))

    def _reasons(self, turns: Sequence[ModelTurn], degraded: Sequence[str | None]) -> str | None:
        """Why the answers to a frame count as degraded; of several, with names."""
        if not self._several:
            return degraded[0]
        named = [f"{turn.model.name}: {why}" for turn, why in zip(turns, degraded, strict=True) if why is not None]
        return "; ".join(named) or None

    @property
    def _withholds(self) -> bool:
        return self.options.withhold_stale and self.policy is DropPolicy.NEWEST

    def _aged(self, result: LiveResult) -> LiveResult:
        """The result with age and staleness recomputed at delivery."""
        assert result.frame.t_recv_ns is not None
        age_ms = (time.monotonic_ns() - result.frame.t_recv_ns) / 1e6
        stale = result.stale or (self.budget_ms is not None and age_ms > self.budget_ms)
        withheld = stale and self._withholds

        def aged(one: LiveResult) -> LiveResult:
            return replace(one, age_ms=age_ms, stale=stale, withheld=withheld, valid=one.valid and not withheld)

        return aged(result) if not result.models else replace(aged(result), models=tuple(map(aged, result.models)))

    def _limits(self) -> CallLimits:
        return self.options.call_limits(self.budget_ms, self._capture.period.ms)

    # clock thread

    def _clock(self) -> None:
        try:
            while not self._closing.wait(self.options.tick_ms / 1e3):
                now_ns = time.monotonic_ns()
                if self.policy is DropPolicy.NEWEST:
                    contact_ns, period_ms = self._capture.contact_ns, self._capture.period.ms
                    for line in self._capture.news(now_ns):
                        self.report(LiveEvent(kind=LiveEventKind.SOURCE, t_ns=now_ns, reason=line))
                    self._states.tick(now_ns, contact_ns=contact_ns, period_ms=period_ms, status=self._capture.status)
                    self._give_up(now_ns)
                self._expire(now_ns)
        except Exception as error:  # a sink or a callback that was called with a change
            self._fail(error)
            self._inbox.close()

    def _give_up(self, now_ns: int) -> None:
        """Ends the loop where a live source gave no frame within the time it was given."""
        limit_s = self.options.connect_timeout_s
        if limit_s is None or not self.is_live or self._states.waited_ms(now_ns) < 1e3 * limit_s:
            return
        status = self._capture.status
        self._fail(NoSourceError(f"no frame within {limit_s:g} s{status and f': {status}'}"))
        self.close()

    def _expire(self, now_ns: int) -> None:
        expired = self._overlay.expire(now_ns)
        if expired is not None:
            self.report(expired)

    # any thread

    def report(self, event: LiveEvent) -> None:
        """Tells of an event; may come from any thread."""
        if event.kind is LiveEventKind.DEADLINE_MISSED:
            self._states.missed(event.t_ns, self._capture.period.ms)
        self._report(event)

    def _report(self, event: StateChange | LiveEvent) -> None:
        for sink in self._sinks:
            announce(sink, event)
        if self._on_event is not None:
            self._on_event(event)

    def _fail(self, error: Exception) -> None:
        if self._failure is None and not self._closing.is_set():
            self._failure = error


def _budget(budget_ms: float | None, *, is_live: bool) -> float | None:
    """The budget in ms, None for none: files have none unless it is given."""
    if budget_ms is None:
        return DEFAULT_BUDGET_MS if is_live else None
    if not budget_ms > 0:
        raise InputError(f"the budget must be above 0 ms, not {budget_ms}")
    return None if math.isinf(budget_ms) else budget_ms


def _named(session: Given | Sequence[Given] | Mapping[str, Given]) -> list[tuple[str, Given]]:
    """What was given as names and models; names are empty where they were not given."""
    if isinstance(session, Mapping):
        given = [(str(name), one) for name, one in session.items()]
        if unnamed := [name for name, _ in given if not is_model_name(name)]:
            raise InputError(f"model name {unnamed[0]!r}: use letters, digits, '.', '-' and '_'")
    elif isinstance(session, Sequence) and not isinstance(session, str):
        given = [("", one) for one in session]
    else:
        given = [("", session)]
    if not given:
        raise InputError("a live loop needs a model: give it a bundle, or several")
    return given


__all__ = ["DEFAULT_BUDGET_MS", "Live"]
