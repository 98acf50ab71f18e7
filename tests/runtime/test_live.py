"""The live loop: every frame accounted for, newest first, never late without saying so, and it ends cleanly."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import NumpyEngine, tiny_logits
from tests.plugged import plug_in_module, plugged
from tests.runtime.live_sources import HandSource, PacedSource, images, only, wait_until
from tinyusfm_runtime import sources
from tinyusfm_runtime.errors import InputError, OutputError, SourceError
from tinyusfm_runtime.frame import Frame, LiveSource
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.live.smoothing import TemporalOptions
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.numerics.shape import fill_holes
from tinyusfm_runtime.results import (
    DropPolicy,
    LiveEvent,
    LiveEventKind,
    LiveResult,
    LiveState,
    StateChange,
)
from tinyusfm_runtime.session import Session

FRAMES = images(8)
LONG_MS = 60_000.0
"""A budget nobody misses, however loaded the machine."""


class Gate:
    """Holds the engine up until the test lets it go on."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.inside = threading.Event()

    def __call__(self, outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.inside.set()
        assert self.open.wait(30)
        return outputs

    def shut(self) -> None:
        self.open.clear()
        self.inside.clear()


@pytest.fixture
def gate(plug_in: type[NumpyEngine]) -> Gate:
    made = Gate()
    plug_in.bend = staticmethod(made)  # type: ignore[assignment]
    return made


@pytest.fixture
def session(gate: Gate, fake_bundle: Path) -> Iterator[Session]:
    with Session.open(fake_bundle) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    wait_until(lambda: threading.active_count() <= before)


def numbered(count: int, first: int = 0) -> list[Frame]:
    """Frames with rising numbers and source times."""
    return [replace(FRAMES[i % len(FRAMES)], seq=first + i, t_source_ns=(first + i) * 1_000_000) for i in range(count)]


class ListSource:
    """A file: its frames wait."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames

    def __enter__(self) -> ListSource:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Iterator[Frame]:
        yield from self.frames


def test_a_file_is_answered_whole_and_in_order(session: Session) -> None:
    frames = numbered(40)
    with Live(session, ListSource(frames), budget_ms=None) as live:
        results = list(live)
    assert live.policy is DropPolicy.LOSSLESS
    assert [result.frame.seq for result in results] == list(range(40))
    assert [result.index for result in results] == list(range(40))
    assert all(result.valid and not result.stale and not result.degraded and not result.withheld for result in results)
    counters = live.counters
    assert counters.balanced and counters.received == counters.processed == 40 and not counters.dropped
    for result in results:
        want = session.predict(result.frame)
        assert result.prediction is not None
        np.testing.assert_array_equal(result.prediction.mask_HW, want.mask_HW)
    assert len(live.latency().age_ms) == 40 and live.latency().deepest <= live.options.queue_places


def test_a_slow_reader_holds_a_file_up_and_loses_nothing(session: Session) -> None:
    with Live(session, ListSource(numbered(30)), budget_ms=None, advanced=LiveOptions(queue_places=2)) as live:
        seen = []
        for result in live:
            time.sleep(0.005)
            assert live.counters.balanced
            seen.append(result.frame.seq)
    assert seen == list(range(30))


def test_the_newest_frame_wins_and_the_others_are_counted(session: Session, gate: Gate) -> None:
    source = HandSource()
    assert isinstance(source, LiveSource) and not isinstance(ListSource([]), LiveSource)
    sink = Collector()
    with Live(session, source, budget_ms=LONG_MS, sinks=[sink]) as live:  # type: ignore[list-item]
        assert live.policy is DropPolicy.NEWEST
        gate.shut()
        source.push(*numbered(1))
        assert gate.inside.wait(20)
        source.push(*numbered(9, first=1))
        wait_until(lambda: live.counters.received == 10)
        counters = live.counters
        assert counters.balanced and counters.waiting == 2 and counters.dropped == {"overtaken": 8}
        gate.open.set()
        wait_until(lambda: len(sink.results) == 2)
        first, newest = sink.results
        assert first.frame.seq == 0 and first.dropped_since_last == 0
        assert newest.frame.seq == 9 and newest.dropped_since_last == 8
        assert live.latency().deepest == 1
    counters = live.counters
    assert counters.balanced and counters.processed == 2 and counters.waiting == 0
    assert source.entered == source.left == source.closed == 1


def test_a_slow_reader_of_a_probe_sees_the_newest_result(session: Session) -> None:
    source = HandSource()
    with Live(session, source, budget_ms=LONG_MS) as live:
        for count, frame in enumerate(numbered(5), 1):
            source.push(frame)
            wait_until(lambda count=count: live.counters.processed == count)
        time.sleep(0.05)
        result = next(live)
        assert result.frame.seq == 4 and result.age_ms >= 50
        assert live.counters.source["results_unseen"] == 4


def test_the_book_balances_at_every_instant(session: Session) -> None:
    wrong: list[object] = []
    source = PacedSource(400, FRAMES, seconds=1.0)
    stop = threading.Event()

    def audit(live: Live) -> None:
        while not stop.is_set():
            counters = live.counters
            if not counters.balanced or counters.waiting > 3:
                wrong.append(counters)
            time.sleep(0)

    with Live(session, source, budget_ms=LONG_MS) as live:
        auditors = [threading.Thread(target=audit, args=(live,)) for _ in range(2)]
        for auditor in auditors:
            auditor.start()
        for _ in live:
            pass
        stop.set()
        for auditor in auditors:
            auditor.join()
    assert not wrong
    assert live.counters.balanced and live.counters.received == source.sent and live.counters.waiting == 0


def test_frames_that_wait_at_the_end_are_counted(session: Session, gate: Gate) -> None:
    source = HandSource()
    with Live(session, source, budget_ms=LONG_MS) as live:
        gate.shut()
        source.push(*numbered(1))
        assert gate.inside.wait(20)
        source.push(*numbered(1, first=1))
        wait_until(lambda: live.counters.received == 2)
        threading.Timer(0.1, gate.open.set).start()
    assert live.counters.balanced
    assert live.counters.dropped == {"closing": 1} and live.counters.processed == 1
    live.close()


def test_stragglers_and_doubles_are_dropped_by_reason(session: Session) -> None:
    source = HandSource()
    ten, eleven, twelve = numbered(3, first=10)
    with Live(session, source, budget_ms=LONG_MS) as live:
        for frame in (ten, twelve, eleven, twelve, replace(FRAMES[0], seq=13, t_source_ns=twelve.t_source_ns)):
            received = live.counters.received
            source.push(frame)
            wait_until(lambda n=received: live.counters.received == n + 1 and not live.counters.waiting)
    assert live.counters.dropped == {"out_of_order": 1, "duplicate": 2}
    assert live.counters.processed == 2 and live.counters.balanced


def test_a_late_result_is_counted_flagged_and_withheld(session: Session, gate: Gate) -> None:
    source = HandSource()
    with Live(session, source, budget_ms=20, advanced=LiveOptions(deadline_ms=LONG_MS)) as live:
        gate.shut()
        source.push(*numbered(1))
        assert gate.inside.wait(20)
        time.sleep(0.05)
        gate.open.set()
        result = next(live)
        assert result.stale and result.withheld and not result.valid and result.age_ms > 20
        assert result.prediction is not None and result.prediction.valid, "it is there for the record"
        assert live.overlay() is None and live.latency().stale == 1
        assert live.state is LiveState.STALE


def test_a_late_result_may_be_shown_if_that_is_asked_for(session: Session, gate: Gate) -> None:
    source = HandSource()
    options = LiveOptions(withhold_stale=False, deadline_ms=LONG_MS, overlay_limit_ms=LONG_MS)
    with Live(session, source, budget_ms=1e-3, advanced=options) as live:
        source.push(*numbered(1))
        result = next(live)
        assert result.stale and not result.withheld and result.valid
        assert live.overlay() is not None


def test_the_last_overlay_is_withdrawn_without_another_frame(session: Session) -> None:
    source, events = HandSource(), list[LiveEvent]()
    options = LiveOptions(overlay_limit_ms=700)
    with Live(session, source, budget_ms=LONG_MS, on_event=only(LiveEvent, events), advanced=options) as live:
        source.push(*numbered(1))
        result = next(live)
        shown = live.overlay()
        seen_ms = (time.monotonic_ns() - (result.frame.t_recv_ns or 0)) / 1e6
        # on a machine so busy that the limit has passed by now, nothing is the right answer
        assert shown.frame.seq == 0 if shown is not None else seen_ms > 700
        wait_until(lambda: events)
        (event,) = events
        assert event.kind is LiveEventKind.OVERLAY_EXPIRED and event.seq == 0
        assert live.overlay() is None
        time.sleep(0.1)
        assert len(events) == 1, "told once"


def test_the_overlay_is_never_handed_out_too_old(session: Session) -> None:
    source = HandSource()
    with Live(session, source, budget_ms=LONG_MS, advanced=LiveOptions(overlay_limit_ms=60, tick_ms=10_000)) as live:
        source.push(*numbered(1))
        next(live)
        time.sleep(0.1)
        assert live.overlay() is None, "although the clock thread has not looked yet"


@pytest.mark.parametrize("spoil", ["size", "channels"])
def test_a_change_of_size_or_channels_costs_no_frame(session: Session, spoil: str) -> None:
    source = HandSource()
    before, after = numbered(3), numbered(3, first=3)
    if spoil == "size":
        after = [replace(frame, pixels=np.ascontiguousarray(frame.pixels[:80, :100])) for frame in after]
    else:
        after = [replace(f, pixels=np.repeat(f.pixels[..., None], 3, axis=2), pixel_format="rgb") for f in after]
    with Live(session, source, budget_ms=LONG_MS) as live:
        for frame in (*before, *after):
            source.push(frame)
            result = next(live)
            assert result.valid and result.frame.seq == frame.seq
            want = tiny_logits(preprocess(frame, session.spec.preprocess)[0])[0, 0] > 0
            assert result.prediction is not None and result.prediction.mask_HW is not None
            assert not result.prediction.mask_HW[~fill_holes(want.astype(np.uint8)).astype(bool)].any()
    assert live.counters.processed == 6 and not live.counters.rejected


def test_what_is_no_frame_is_rejected_and_the_stream_goes_on(session: Session) -> None:
    source = HandSource()
    with Live(session, source, budget_ms=LONG_MS) as live:
        source.push("no frame", FRAMES[0].pixels, *numbered(1))
        assert next(live).frame.seq == 0
    assert live.counters.rejected == {"not_a_frame": 2} and live.counters.balanced


def test_reception_times_of_another_clock_are_not_believed(session: Session) -> None:
    source, now_ns = HandSource(), time.monotonic_ns()
    with Live(session, source, budget_ms=LONG_MS) as live:
        for seq, claimed in enumerate([time.time_ns(), now_ns + 10**12, -5, None]):
            source.push(replace(FRAMES[seq], seq=seq, t_recv_ns=claimed))
            result = next(live)
            assert 0 <= result.age_ms < 30_000 and result.frame.t_recv_ns is not None
            assert abs(result.frame.t_recv_ns - now_ns) < 60e9


def test_a_step_of_the_wall_clock_ages_nothing(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real = HandSource(), time.time
    with Live(session, source, budget_ms=LONG_MS) as live:
        for seq, step_s in enumerate([0, 3600, -7200]):
            monkeypatch.setattr(time, "time", lambda step_s=step_s: real() + step_s)
            monkeypatch.setattr(time, "time_ns", lambda step_s=step_s: int((real() + step_s) * 1e9))
            source.push(replace(FRAMES[seq], seq=seq, t_source_ns=time.time_ns()))
            result = next(live)
            assert result.valid and 0 <= result.age_ms < 30_000
    assert live.counters.source["clock_steps"] == 1


def test_a_held_result_never_changes(session: Session) -> None:
    source = HandSource()
    with Live(session, source, budget_ms=LONG_MS, temporal=TemporalOptions()) as live:
        kept: list[tuple[LiveResult, list[np.ndarray]]] = []
        for frame in numbered(24):
            source.push(frame)
            result = next(live)
            kept.append((result, [array.copy() for array in arrays_of(result)]))
    for result, copies in kept:
        for array, copy in zip(arrays_of(result), copies, strict=True):
            np.testing.assert_array_equal(array, copy)
    masks = [arrays_of(result)[1] for result, _ in kept]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(masks) for b in masks[:i])


def arrays_of(result: LiveResult) -> list[np.ndarray]:
    assert result.prediction is not None and result.prediction.mask_HW is not None
    assert result.reading is not None and result.reading.mask_HW is not None
    return [result.frame.pixels, result.prediction.mask_HW, result.reading.mask_HW]


@pytest.mark.parametrize("copies", [True, False])
def test_a_source_that_fills_one_buffer_needs_copies(session: Session, gate: Gate, copies: bool) -> None:
    buffer = FRAMES[0].pixels.copy()
    source = HandSource()
    with Live(session, source, budget_ms=LONG_MS, advanced=LiveOptions(copy_frames=copies)) as live:
        source.push(replace(FRAMES[0], pixels=buffer, seq=0))
        result = next(live)
        before = result.frame.pixels.copy()
        buffer[:] = 0
        assert np.array_equal(result.frame.pixels, before) is copies


def test_a_source_that_breaks_off_is_an_error_of_the_loop(session: Session) -> None:
    for failure, wanted in ((SourceError("the file is cut short"), "cut short"), (RuntimeError("x"), "RuntimeError")):
        source = HandSource()
        with Live(session, source, budget_ms=LONG_MS) as live:
            source.push(*numbered(1), failure)
            with pytest.raises(SourceError, match=wanted):
                for _ in live:
                    pass
        assert live.counters.balanced and live.counters.processed == 1


class BrokenSink:
    """A sink whose disk is full."""

    def write(self, frame: Frame, prediction: object) -> None:
        raise OutputError("no room left")


def test_a_sink_that_cannot_write_is_an_error_of_the_loop(session: Session) -> None:
    source = HandSource()
    with Live(session, source, budget_ms=LONG_MS, sinks=[BrokenSink()]) as live:  # type: ignore[list-item]
        source.push(*numbered(1))
        with pytest.raises(OutputError, match="no room"):
            for _ in live:
                pass


class Collector:
    """A sink that takes live results."""

    def __init__(self) -> None:
        self.results: list[LiveResult] = []

    def write_live(self, result: LiveResult) -> None:
        self.results.append(result)


def test_sinks_get_every_result_in_order(session: Session) -> None:
    sink = Collector()
    with Live(session, ListSource(numbered(20)), budget_ms=None, sinks=[sink]) as live:  # type: ignore[list-item]
        for _ in live:
            pass
    assert [result.index for result in sink.results] == list(range(20))


def test_states_are_told_and_logged_in_one_line(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    source, changes = HandSource(), list[StateChange]()
    caplog.set_level(logging.INFO, logger="tinyusfm_runtime")
    options = LiveOptions(period_ms=20)
    with Live(session, source, budget_ms=LONG_MS, on_event=only(StateChange, changes), advanced=options) as live:
        assert live.state is LiveState.LOST
        source.push(*numbered(1))
        wait_until(lambda: live.state is LiveState.LIVE)
        wait_until(lambda: live.state is LiveState.STALE)
        for _ in range(40):
            source.keep_alive()
            time.sleep(0.01)
        wait_until(lambda: live.state is LiveState.LOST)
        source.push(*numbered(1, first=1))
        wait_until(lambda: live.state is LiveState.LIVE)
    names = [change.after.value for change in changes]
    assert names[:2] == ["live", "stale"] and "frozen" in names and names.index("frozen") < names.index("lost")
    assert [change.before for change in changes[1:]] == [change.after for change in changes[:-1]]
    lines = [record.getMessage() for record in caplog.records if record.name.endswith("live.state")]
    assert len(lines) == len(changes) and not any("\n" in line for line in lines)
    assert any("live state live -> stale" in line for line in lines)


def test_a_probe_seen_through_a_window_is_still_a_probe(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = HandSource()
    plugged(monkeypatch, "sources", hand=plug_in_module("hand", open_source=lambda location: probe))
    source = sources.open_source("hand:1", crop=(8, 16, 64, 80))
    assert isinstance(source, LiveSource)
    with Live(session, source, budget_ms=LONG_MS) as live:
        assert live.policy is DropPolicy.NEWEST
        probe.count["reconnects"] = 1
        probe.push(*numbered(1))
        result = next(live)
        assert result.frame.pixels.shape == (64, 80) and result.frame.crop == (8, 16, 64, 80)
        assert source.last_contact_ns == probe.contact_ns and live.counters.source == {"reconnects": 1}
    assert probe.closed == probe.left == 1


def test_a_reconnected_source_may_count_anew(session: Session) -> None:
    source = HandSource()
    with Live(session, source, budget_ms=LONG_MS) as live:
        source.push(*numbered(1, first=500))
        assert next(live).frame.seq == 500
        source.count["reconnects"] = 1
        source.push(*numbered(1, first=0))
        assert next(live).frame.seq == 0
    assert not live.counters.dropped


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are pinned on Linux")
def test_threads_are_pinned_where_that_is_asked_for(session: Session, plug_in: type[NumpyEngine]) -> None:
    seen: dict[str, set[int]] = {}

    class Looking(HandSource):
        def __iter__(self) -> Iterator[Frame]:
            seen["capture"] = os.sched_getaffinity(0)
            yield from super().__iter__()

    def tap(*_: object) -> None:
        seen["infer"] = os.sched_getaffinity(0)

    before, source = os.sched_getaffinity(0), Looking()
    cpu = frozenset({min(before)})
    options = LiveOptions(capture_cpus=cpu, infer_cpus=cpu)
    live = Live(session, source, budget_ms=LONG_MS, advanced=options)
    live.taps.append(tap)
    with live:
        source.push(*numbered(1))
        assert next(live).valid
    assert seen == {"capture": cpu, "infer": cpu} and os.sched_getaffinity(0) == before
    with (
        Live(
            session, ListSource(numbered(1)), budget_ms=None, advanced=LiveOptions(infer_cpus=frozenset({99999}))
        ) as bad,
        pytest.raises(InputError, match="cannot pin"),
    ):
        list(bad)


@pytest.mark.parametrize("where", ["state", "event", "sink"])
def test_every_callback_may_close_the_loop(session: Session, where: str) -> None:
    source, box = HandSource(), list[Live]()

    class Closing:
        def write_live(self, result: LiveResult) -> None:
            box[0].close()

    def close(event: LiveEvent | StateChange) -> None:
        if where == ("state" if isinstance(event, StateChange) else "event"):
            box[0].close()

    options = LiveOptions(overlay_limit_ms=1)
    sinks: list[Any] = [Closing()] if where == "sink" else []
    live = Live(session, source, budget_ms=LONG_MS, sinks=sinks, on_event=close, advanced=options)
    box.append(live)
    with live:
        source.push(*numbered(3))
        for _ in live:
            pass
    assert source.closed == source.left == 1 and live.counters.balanced and not live.counters.waiting


def test_a_budget_must_be_a_time_and_a_loop_runs_once(session: Session) -> None:
    with pytest.raises(InputError, match="budget"):
        Live(session, HandSource(), budget_ms=0)
    with pytest.raises(InputError, match="tick_ms"):
        LiveOptions(tick_ms=0)
    live = Live(session, ListSource(numbered(1)), budget_ms=None)
    with pytest.raises(InputError, match="not begun"):
        live.fallback.request(0)
    with live:
        list(live)
    with pytest.raises(InputError, match="once"):
        live.__enter__()
