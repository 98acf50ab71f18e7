"""Live: frames from a source through a session, newest first, never late without saying so.

    with Session.open("fetal-head.bundle") as session, Live(session, source, budget_ms=33) as live:
        for result in live:
            ...

Three threads, and the engine's own. The capture thread drains the source into a slot of one (a queue for files). The
inference thread answers and hands results on; it is not the iterator's, so that a slow reader sees fewer results
instead of making frames old. The third looks at the clock: states, and the overlay that has to come off the screen. A
fourth belongs to the watchdog around the engine (watchdog.py).

A result owns its mask: nothing in the loop writes to an array it has handed out, however long a result is held. A
source must not write to pixels it has handed out either, or ``copy_frames`` is needed.

It knows no transport and no engine; states are in live_state.py, falling back in ladder.py, swapping in swap.py.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tinyusfm_runtime import frame_check
from tinyusfm_runtime.errors import EdgeError, FrameError, InputError, SourceError
from tinyusfm_runtime.frame import Frame, FrameSource, LiveSource
from tinyusfm_runtime.frame_order import OrderGuard
from tinyusfm_runtime.freeze import FramePeriod, StillPicture
from tinyusfm_runtime.inbox import Inbox
from tinyusfm_runtime.ladder import Answered, Ladder
from tinyusfm_runtime.live_latency import LatencyLog, LiveLatency
from tinyusfm_runtime.live_options import LiveOptions
from tinyusfm_runtime.live_result import (
    DropPolicy,
    LiveCounters,
    LiveEvent,
    LiveEventKind,
    LiveResult,
    LiveState,
    StateChange,
)
from tinyusfm_runtime.live_state import StateMachine
from tinyusfm_runtime.outbox import Outbox
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.sinks import Sink, deliver
from tinyusfm_runtime.temporal import Temporal
from tinyusfm_runtime.watchdog import pin

if TYPE_CHECKING:
    from tinyusfm_runtime.swap import SwapOptions, SwapReport

_log = logging.getLogger(__name__)
_SOURCE_ENDS_S = 5.0  # a source must end its iteration soon after close
Tap = Callable[[Ladder, Frame, Answered, LiveResult], None]
"""Sees every result in the inference thread, before anybody else does: which ladder, what it was asked and said."""
_OLDEST_RECEPTION_NS = 3_600_000_000_000  # a reception time that lies further back is another clock's


class Live:
    """The loop. A context manager and an iterator of results; entering it opens the source and starts.

    Args:
        session: an open session, or an open ladder of fallbacks; it stays its opener's to close.
        source: where frames come from; entered and left by the loop.
        budget_ms: age above which a result is stale, or None for files without one.
        policy: None is NEWEST for a LiveSource and LOSSLESS for anything else.
        sinks: open sinks; every result goes to each of them, in order. They stay their opener's to close.
        on_state: told of every change of state; be quick there.
        advanced: everything else.

    Raises:
        InputError: the budget is not above 0.
    """

    def __init__(
        self,
        session: Session | Ladder,
        source: FrameSource,
        *,
        budget_ms: float | None,
        policy: DropPolicy | None = None,
        sinks: Sequence[Sink] = (),
        on_state: Callable[[StateChange], None] | None = None,
        advanced: LiveOptions | None = None,
    ) -> None:
        if budget_ms is not None and not budget_ms > 0:
            raise InputError(f"the budget must be above 0 ms, not {budget_ms}")
        self.options = advanced or LiveOptions()
        self.budget_ms = budget_ms
        self.is_live = isinstance(source, LiveSource)
        self.policy = policy or (DropPolicy.NEWEST if self.is_live else DropPolicy.LOSSLESS)
        self._ladder: Ladder | None = session if isinstance(session, Ladder) else None
        self._wrapped = None if isinstance(session, Ladder) else session
        self._source: Any = source
        self._sinks = tuple(sinks)
        self._on_state = on_state
        places = self.options.queue_places
        self._inbox, self._outbox = Inbox(self.policy, places), Outbox(self.policy, places)
        self._order, self._still = OrderGuard(), StillPicture()
        self._period = FramePeriod(self.options.period_ms)
        self._latencies = LatencyLog()
        self._temporal = None if self.options.temporal is None else Temporal(self.options.temporal)
        self._states: StateMachine | None = None
        self._overlay: LiveResult | None = None
        self._overlay_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._ended = False
        self._failure: Exception | None = None
        self._index = 0
        self._reconnects = 0
        self._incoming: tuple[Ladder, threading.Event] | None = None
        self._owned: list[Ladder] = []
        self.taps: list[Tap] = []
        self._first: Ladder | None = None
        self._swap_lock = threading.Lock()

    def __enter__(self) -> Live:
        if self._states is not None:
            raise InputError("a live loop runs once: make another one")
        if self._ladder is None:
            assert self._wrapped is not None
            self._ladder = Ladder.of(self._wrapped)
            self._owned.append(self._ladder)
        else:
            self._first = self._ladder
        self._source = self._source.__enter__()
        watch = self.policy is DropPolicy.NEWEST
        self._states = StateMachine(
            self.options.limits, self._on_state, watch_arrivals=watch, now_ns=time.monotonic_ns()
        )
        for name, work in (("capture", self._capture), ("infer", self._infer), ("clock", self._clock)):
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
        """Waits for the next result: with NEWEST the newest one, its age and staleness those of now.

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

    @property
    def state(self) -> LiveState:
        """The state now."""
        return LiveState.LOST if self._states is None else self._states.state

    @property
    def counters(self) -> LiveCounters:
        """Where every frame went, at this instant."""
        source = dict(getattr(self._source, "counters", {})) if self.is_live else {}
        own = {
            "sequence_restarts": self._order.restarts,
            "clock_steps": self._order.clock_steps,
            "results_unseen": self._outbox.unseen,
        }
        return self._inbox.counters(source | {name: count for name, count in own.items() if count})

    @property
    def description(self) -> str:
        """Artefact and engine in use, one line."""
        return "" if self._ladder is None else self._ladder.description

    @property
    def ladder(self) -> Ladder:
        """The ladder in use; ``request`` on it asks for another rung.

        Raises:
            InputError: the loop was not entered.
        """
        if self._ladder is None:
            raise InputError("the live loop has not begun: enter it first")
        return self._ladder

    def overlay(self) -> LiveResult | None:
        """The last result that may be shown now, or None: nothing yet, all withheld or invalid, or too old."""
        self._expire(time.monotonic_ns())
        return self._overlay

    def latency(self) -> LiveLatency:
        """Ages and engine times so far, raw."""
        return self._latencies.report(self._period.ms, self._inbox.deepest)

    def swap(self, bundle: str | Path, *, advanced: SwapOptions | None = None) -> SwapReport:
        """Goes over to another bundle while the loop runs (see swap.py); returns when that is decided.

        Raises:
            InputError: called in one of the loop's own threads, or the loop does not run.
        """
        from tinyusfm_runtime.swap import swap

        with self._swap_lock:
            return swap(self, bundle, advanced)

    def close(self) -> None:
        """Ends the loop: frames that wait are dropped as CLOSING, one in the engine is answered. Twice is harmless.

        From a callback, in one of the loop's own threads, it only asks for the end; leaving the context waits for it.
        """
        if self._states is None:
            return
        if not self._closing.is_set():
            self._closing.set()
            close = getattr(self._source, "close", None)
            if self.is_live and close is not None:
                close()
            self._inbox.close()
            self._outbox.close()
        if self.owns_this_thread or self._ended:
            return
        self._ended = True
        for thread in self._threads:
            thread.join(_SOURCE_ENDS_S if thread is self._threads[0] else None)
            if thread.is_alive():
                _log.warning("the source does not end %.0f s after it was closed", _SOURCE_ENDS_S)
        self._source.__exit__(None, None, None)
        for ladder in self._owned:
            ladder.close()

    # for swap.py

    @property
    def runs(self) -> bool:
        """True from entering until the last frame is answered."""
        return len(self._threads) == 3 and self._threads[1].is_alive() and not self._closing.is_set()

    @property
    def owns_this_thread(self) -> bool:
        """True in one of the loop's own threads, where nobody may wait for the loop."""
        return threading.current_thread() in self._threads

    def take_over(self, ladder: Ladder) -> float:
        """Lets another ladder answer from the next frame on.

        Args:
            ladder: an open one; from now on the loop closes it, unless it is the one the loop began with.

        Returns:
            How long the change waited for the end of the frame in the engine, ms. A loop that ends meanwhile changes
            nothing, and nobody asks the ladder any more.
        """
        begin_ns, done = time.perf_counter_ns(), threading.Event()
        if ladder is not self._first and ladder not in self._owned:
            self._owned.append(ladder)
        self._incoming = (ladder, done)
        while not done.wait(self.options.tick_ms / 1e3) and self._threads[1].is_alive():
            pass
        return (time.perf_counter_ns() - begin_ns) / 1e6

    def hand_back(self, ladder: Ladder) -> None:
        """Closes a ladder that no longer answers, if it is the loop's to close."""
        if ladder in self._owned and ladder is not self._ladder:
            self._owned.remove(ladder)
            ladder.close()

    # capture thread

    def _capture(self) -> None:
        frames: Any = None
        try:
            pin(self.options.capture_cpus)
            frames = iter(self._source)
            for item in frames:
                if not self._receive(item):
                    break
        except EdgeError as error:
            self._fail(error)
        except Exception as error:  # a source of another distribution may raise anything
            failure = SourceError(f"the source broke off: {type(error).__name__}")
            failure.__cause__ = error
            self._fail(failure)
        finally:
            if hasattr(frames, "close"):
                with contextlib.suppress(Exception):
                    frames.close()
            self._inbox.end()

    def _receive(self, item: Any) -> bool:
        now_ns = time.monotonic_ns()
        if (reason := frame_check.refusal(item)) is not None:
            self._inbox.reject(reason)
            return not self._closing.is_set()
        frame = self._stamped(item, now_ns)
        if self.policy is DropPolicy.LOSSLESS:
            self._period.arrived(now_ns)
            return self._inbox.put(frame)
        self._look_for_reconnects()
        if (drop := self._order.judge(frame)) is not None:
            self._inbox.refuse(drop)
            return not self._closing.is_set()
        self._period.arrived(now_ns)
        self._still.see(frame.pixels)
        kept = self._inbox.put(frame)
        assert self._states is not None
        self._states.frame(now_ns, seq=frame.seq, identical_run=self._still.run, period_ms=self._period.ms)
        return kept

    def _stamped(self, frame: Frame, now_ns: int) -> Frame:
        """The frame with a reception time of this machine's monotonic clock, and pixels of its own if asked for."""
        changes: dict[str, Any] = {}
        received = frame.t_recv_ns
        if received is None or not max(0, now_ns - _OLDEST_RECEPTION_NS) <= received <= now_ns:
            changes["t_recv_ns"] = now_ns
        if self.options.copy_frames:
            changes["pixels"] = frame.pixels.copy()
        return replace(frame, **changes) if changes else frame

    def _look_for_reconnects(self) -> None:
        if not self.is_live:
            return
        counters: Mapping[str, int] = self._source.counters
        count = counters.get("reconnects", 0)
        if count != self._reconnects:
            self._reconnects = count
            self._order.began_anew()

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
        incoming, self._incoming = self._incoming, None
        if incoming is not None:
            self._ladder = incoming[0]
            incoming[1].set()
        self.ladder.between_frames(self._limits(), self.report)

    def _answer(self, frame: Frame) -> None:
        insist, ladder = self.policy is DropPolicy.LOSSLESS, self.ladder
        try:
            answered = ladder.answer(frame, self._limits(), self.report, insist=insist)
        except FrameError:
            self._inbox.unusable(frame_check.MISPLACED)
            return
        result = self._result(frame, answered)
        self._show(result)
        for tap in tuple(self.taps):
            tap(ladder, frame, answered, result)
        self._outbox.put(result)
        for sink in self._sinks:
            deliver(sink, result)

    def _result(self, frame: Frame, answered: Answered) -> LiveResult:
        assert self._states is not None and frame.t_recv_ns is not None
        prediction = answered.prediction
        if prediction is not None and answered.rung > 0:
            prediction = replace(prediction, degraded=True)
        degraded = _why_degraded(answered)
        now_ns = time.monotonic_ns()
        age_ms = (now_ns - frame.t_recv_ns) / 1e6
        stale = self.budget_ms is not None and age_ms > self.budget_ms
        infer_ms = None if prediction is None else prediction.timings.infer_ms
        self._latencies.add(age_ms, infer_ms, stale=stale, late=answered.late)
        self._states.result(now_ns, stale=stale, degraded=degraded, period_ms=self._period.ms)
        withheld = stale and self._withholds
        usable = prediction is not None and prediction.valid and prediction.verified
        result = LiveResult(
            frame=frame,
            prediction=prediction,
            index=self._index,
            state=self._states.state,
            age_ms=age_ms,
            stale=stale,
            withheld=withheld,
            valid=usable and not withheld,
            dropped_since_last=self._inbox.processed(),
            engine=answered.engine,
            rung=answered.rung,
            degraded=degraded is not None,
            error=answered.error,
            reading=None if self._temporal is None else self._temporal.add(prediction, frame.t_recv_ns),
        )
        self._index += 1
        return result

    @property
    def _withholds(self) -> bool:
        return self.options.withhold_stale and self.policy is DropPolicy.NEWEST

    def _aged(self, result: LiveResult) -> LiveResult:
        """The result as it is worth now: it may have waited for its reader."""
        assert result.frame.t_recv_ns is not None
        age_ms = (time.monotonic_ns() - result.frame.t_recv_ns) / 1e6
        stale = result.stale or (self.budget_ms is not None and age_ms > self.budget_ms)
        withheld = stale and self._withholds
        return replace(result, age_ms=age_ms, stale=stale, withheld=withheld, valid=result.valid and not withheld)

    def _limits(self) -> Any:
        return self.options.call_limits(self.budget_ms, self._period.ms)

    # clock thread

    def _clock(self) -> None:
        assert self._states is not None
        while not self._closing.wait(self.options.tick_ms / 1e3):
            now_ns = time.monotonic_ns()
            if self.policy is DropPolicy.NEWEST:
                contact_ns = self._source.last_contact_ns if self.is_live else None
                self._states.tick(now_ns, contact_ns=contact_ns, period_ms=self._period.ms)
            self._expire(now_ns)

    def _show(self, result: LiveResult) -> None:
        if result.valid:
            with self._overlay_lock:
                self._overlay = result

    def _expire(self, now_ns: int) -> None:
        with self._overlay_lock:
            shown = self._overlay
            if shown is None or shown.frame.t_recv_ns is None:
                return
            age_ms = (now_ns - shown.frame.t_recv_ns) / 1e6
            if age_ms <= self.options.overlay_ms(self.budget_ms):
                return
            self._overlay = None
        reason = f"the last result that could be shown is {age_ms:.0f} ms old"
        self.report(LiveEvent(kind=LiveEventKind.OVERLAY_EXPIRED, t_ns=now_ns, reason=reason, seq=shown.frame.seq))

    # any thread

    def report(self, event: LiveEvent) -> None:
        """Tells of an event; may come from any thread."""
        if event.kind is LiveEventKind.DEADLINE_MISSED and self._states is not None:
            self._states.missed(event.t_ns, self._period.ms)
        if self.options.on_event is not None:
            self.options.on_event(event)

    def _fail(self, error: Exception) -> None:
        if self._failure is None and not self._closing.is_set():
            self._failure = error


def _why_degraded(answered: Answered) -> str | None:
    if answered.error is not None:
        return f"no usable answer: {answered.error}"
    if answered.rung > 0:
        return f"rung {answered.rung} answers instead of the chosen artefact: {answered.engine}"
    return "the engine missed its deadline" if answered.late else None


__all__ = ["Live", "Tap"]
