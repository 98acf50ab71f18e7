"""A stream in C: the newest frame wins, every frame is accounted for, nothing old is shown, failures are survived."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.capi.binding import NO_TIME, STATES, Failed, Frame, Library, Session
from tests.capi.conftest import MakeStub
from tests.conftest import tiny_spec
from tinyusfm_runtime.frame import Frame as PythonFrame
from tinyusfm_runtime.live.order import OrderGuard
from tinyusfm_runtime.results import DropReason

OPENING = 12
"""Runs of the stub before the first frame: 1, 4 golden, 5 warm-up (4 are golden answers), and some to spare."""


def moving(library: Library, number: int, side: int = 96, **fields: object) -> Frame:
    """A bright disc that moves with the number."""
    y, x = np.mgrid[:side, :side]
    disc = (y - side / 2) ** 2 + (x - 30 - number % 30) ** 2 < (side / 4) ** 2
    values = {"seq": number, "spacing_row_mm": 0.3, "spacing_column_mm": 0.3, **fields}
    return library.frame(np.where(disc, 200, 20).astype(np.uint8), **values)


def drain(session: Session, seconds: float, until: int = 1 << 30) -> list[int]:
    """Sequence numbers of the results of some seconds, or up to one of them."""
    seen: list[int] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and (not seen or seen[-1] < until):
        if (reading := session.newest(20)) is not None:
            seen.append(reading.seq)
    return seen


def wait_for(what: object, seconds: float = 20.0) -> None:
    """Waits until a call gives something true; the machine may be busy."""
    assert callable(what)
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def test_every_frame_is_answered_or_counted(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub("sleep=8"), budget_ms=2000) as session:
        for number in range(60):
            session.submit(moving(library, number))
            time.sleep(0.002)
        wait_for(lambda: session.counters().waiting == 0)
        seen = drain(session, 0.2)
        counters = session.counters()
        assert counters.received == 60 and counters.balanced and counters.overtaken > 10
        assert counters.processed + counters.overtaken == 60
        assert seen and seen[-1] == 59, "the newest frame is always answered"


def test_a_reader_sees_the_newest_result_and_what_was_left_out(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub("sleep=5")) as session:
        dropped = results = 0
        for number in range(40):
            session.submit(moving(library, number))
            if (reading := session.newest(0 if number % 3 else 30)) is not None:
                results += 1
                dropped += reading.dropped_since_last
                assert reading.answered and reading.found and reading.hc_mm > 0
        while (reading := session.newest(300)) is not None:
            results += 1
            dropped += reading.dropped_since_last
        counters = session.counters()
        assert counters.processed == results + counters.unseen
        assert dropped <= counters.overtaken


def test_before_the_first_frame_there_is_nothing_to_read(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub()) as session:
        for call in (session.newest, session.overlay):
            with pytest.raises(Failed, match="nothing was submitted"):
                call()
        assert session.counters().received == 0
        session.submit(moving(library, 0))
        wait_for(lambda: session.newest(50) is not None)
        with pytest.raises(Failed, match="answers a stream"):
            session.predict(moving(library, 1))


def test_pixels_are_copied_at_submission(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub("sleep=30")) as session:
        frame = moving(library, 0)
        session.submit(frame)
        frame.kept[:] = 0  # type: ignore[attr-defined]
        wait_for(lambda: session.counters().processed == 1)
        reading = session.newest(1000)
        assert reading is not None and reading.found


def test_old_results_are_stale_withheld_and_leave_the_overlay(library: Library, make_stub: MakeStub) -> None:
    told: list[str] = []
    bundle = make_stub("sleep=1")
    with Session(library, bundle, budget_ms=150, overlay_limit_ms=300, log=lambda _l, t: told.append(t)) as session:
        session.submit(moving(library, 0))
        wait_for(lambda: session.overlay() is not None)
        shown = session.overlay()
        assert shown is not None and shown.valid and shown.mask_HW() is not None
        time.sleep(0.2)
        late = session.newest(0)
        assert late is not None and late.stale and late.withheld and not late.valid and late.age_ms > 150
        time.sleep(0.2)
        assert session.overlay() is None
        assert any("last result that could be shown" in line for line in told)
        session.submit(moving(library, 1, t_recv_ns=library.lib.tusfm_now_ns() - 200_000_000))
        wait_for(lambda: session.counters().processed == 2)
        old = session.newest(0)
        assert old is not None and old.stale and session.overlay() is None, "it was old when it came"


def test_frames_out_of_order_and_twice_are_dropped_by_pythons_rules(library: Library, make_stub: MakeStub) -> None:
    rng = np.random.default_rng(1)
    numbers = [0, 1, 1, 2, 5, 3, 4, 6, 6, 100, 7, 8, 9, 10, 11, 3, (1 << 32) - 2, (1 << 32) - 1, 1 << 32, 12, 13, 14]
    numbers += [int(n) for n in rng.integers(0, 40, 60)]
    times = [None if rng.random() < 0.3 else int(n) * 10 + int(rng.integers(0, 30)) for n in numbers]
    guard = OrderGuard()
    want = [guard.judge(PythonFrame(pixels=np.zeros((9, 9), np.uint8), seq=n, t_source_ns=t))
            for n, t in zip(numbers, times, strict=True)]  # fmt: skip
    with Session(library, make_stub()) as session:
        for number, source in zip(numbers, times, strict=True):
            session.submit(moving(library, number, t_source_ns=NO_TIME if source is None else source))
        counters = session.counters()
        assert counters.duplicate == want.count(DropReason.DUPLICATE) > 0
        assert counters.out_of_order == want.count(DropReason.OUT_OF_ORDER) > 0
        assert counters.restarts == guard.restarts


def test_frames_that_cannot_be_used_are_rejected_and_counted(library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub()) as session:
        for number in range(6):
            frame = moving(library, number)
            frame.format = 9 if number % 2 else 0
            if number % 2:
                with pytest.raises(Failed, match="FRAME"):
                    session.submit(frame)
            else:
                session.submit(frame)
        wait_for(lambda: session.counters().waiting == 0)
        assert session.counters().rejected == 3 and session.counters().balanced


def test_states_follow_frames_pixels_and_contact(library: Library, make_stub: MakeStub) -> None:
    def state() -> str:
        return STATES[session.counters().state]

    told: list[str] = []
    with Session(library, make_stub(), log=lambda _l, text: told.append(text)) as session:
        for number in range(12):
            session.submit(moving(library, number))
            time.sleep(0.02)
        wait_for(lambda: state() == "live")
        for number in range(12, 40):
            session.submit(moving(library, 5, seq=number))
            time.sleep(0.01)
        wait_for(lambda: state() == "frozen")
        wait_for(lambda: state() == "stale" or state() == "lost")
        wait_for(lambda: state() == "lost")
        library.lib.tusfm_contact(session.handle)
        wait_for(lambda: state() == "frozen")
    assert any("live state live -> frozen: the same pixels" in line for line in told)


def test_an_engine_that_fails_is_replaced_and_flagged(library: Library, make_stub: MakeStub) -> None:
    told: list[str] = []
    bundle = make_stub(f"fail_from={OPENING + 4}", "")
    with Session(library, bundle, fallback=1, recheck_s=0.0, log=lambda _l, t: told.append(t)) as session:
        assert session.info().artefacts == 2
        readings = [session.predict(moving(library, number)) for number in range(20)]
        assert all(reading.valid for reading in readings), "the same frame is asked again"
        assert not readings[0].degraded and readings[-1].degraded and readings[-1].level == 1
        assert readings[-1].engine.startswith(b"stub2-fp32 on stub")
    assert any("stub-fp32 failed" in line for line in told) and any("stub2-fp32 answers" in line for line in told)


def test_without_fallback_a_failure_is_a_status_and_the_next_call_works(library: Library, make_stub: MakeStub) -> None:
    bundle = make_stub(f"fail_from={OPENING} fail_to={OPENING + 2}")
    with Session(library, bundle) as session:
        outcomes = []
        for number in range(8):
            try:
                outcomes.append(bool(session.predict(moving(library, number)).valid))
            except Failed as error:
                assert error.code == "ENGINE"
                outcomes.append(False)
        assert outcomes.count(False) == 2 and outcomes[-1]


@pytest.mark.parametrize("bend", ["fail_from=30", "nan_from=30", "shift_from=30"])
def test_a_stream_falls_back_within_its_frames(bend: str, library: Library, make_stub: MakeStub) -> None:
    with Session(library, make_stub(bend, ""), fallback=1, recheck_s=0.05) as session:
        for number in range(400):
            session.submit(moving(library, number))
            reading = session.newest(50)
            if reading is not None and reading.level == 1:
                break
            time.sleep(0.002)
        assert reading is not None and reading.level == 1 and reading.degraded and reading.valid


def test_a_slow_engine_is_late_cancelled_and_used_again(library: Library, make_stub: MakeStub) -> None:
    told: list[str] = []
    bundle = make_stub(f"sleep=60000 sleep_from={OPENING}")
    with Session(
        library, bundle, deadline_ms=30, give_up_ms=90, grace_ms=5000, recheck_s=0.0, log=lambda _l, t: told.append(t)
    ) as session:
        session.submit(moving(library, 0))
        for number in range(1, 400):
            session.submit(moving(library, number))
            reading = session.newest(50)
            if reading is not None and not reading.answered:
                break
        assert reading is not None and b"cancelled" in reading.error and reading.degraded and not reading.valid
        assert session.counters().balanced
    assert any("passed its deadline" in line for line in told)


def test_an_engine_that_hangs_is_given_up_and_another_one_answers(library: Library, make_stub: MakeStub) -> None:
    bundle = make_stub("hang_from=30", "")
    with Session(library, bundle, fallback=1, deadline_ms=50, give_up_ms=100, grace_ms=100, recheck_s=0.0) as session:
        reading = None
        for number in range(600):
            session.submit(moving(library, number))
            reading = session.newest(20)
            if reading is not None and reading.level == 1 and reading.valid:
                break
        assert reading is not None and reading.level == 1 and reading.degraded
        assert session.counters().balanced


def test_cancel_stops_a_prediction_from_another_thread(library: Library, make_stub: MakeStub) -> None:
    import threading

    with Session(library, make_stub(f"sleep=60000 sleep_from={OPENING + 4}")) as session:
        failures: list[Failed] = []

        def predict() -> None:
            try:
                for number in range(20):
                    session.predict(moving(library, number))
            except Failed as error:
                failures.append(error)

        thread = threading.Thread(target=predict)
        thread.start()
        end = time.monotonic() + 20
        while thread.is_alive() and time.monotonic() < end:
            session.cancel()
            time.sleep(0.01)
        thread.join(1)
        assert failures and failures[0].code == "ENGINE" and "cancelled" in str(failures[0])


def test_several_threads_queue_up(library: Library, make_stub: MakeStub) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Session(library, make_stub()) as session, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: session.predict(moving(library, n)).seq, range(120)))
    assert answers == list(range(120))


def test_a_swap_between_calls_answers_with_the_other_bundle(library: Library, make_stub: MakeStub) -> None:
    other = make_stub(spec=tiny_spec(name="other", threshold=0.9))
    with Session(library, make_stub()) as session:
        before = session.predict(moving(library, 0)).area_px
        report = session.swap(other)
        assert report.outcome == 0 and report.load_ms > 0 and len(report.bundle_sha256) == 64
        assert session.info().model == b"other" and session.predict(moving(library, 0)).area_px <= before
        for wrong in (make_stub(spec=tiny_spec(labels=("background", "head"))), other.parent / "nothing"):
            assert session.swap(wrong).outcome == 1
        assert session.info().model == b"other"


def feed(library: Library, session: Session, stop: list[bool]) -> None:
    number = 0
    while not stop:
        session.submit(moving(library, number, side=96))
        session.newest(0)
        number += 1
        time.sleep(0.004)


@pytest.mark.parametrize(
    ("bend", "options", "outcome"),
    [
        ("", {"shadow_frames": 5, "min_dice": 0.9}, 0),
        ("", {"shadow_frames": 5, "min_dice": 1.0, "threshold": 0.999}, 1),
        ("fail_from=24", {"shadow_frames": 0, "probation_frames": 60}, 2),
    ],
)
def test_a_swap_under_load(
    bend: str, options: dict[str, float], outcome: int, library: Library, make_stub: MakeStub
) -> None:
    import threading

    options = dict(options)
    threshold = options.pop("threshold", 0.5)
    other = make_stub(bend, spec=tiny_spec(name="other", threshold=threshold))
    with Session(library, make_stub(), recheck_s=0.05) as session:
        stop: list[bool] = []
        thread = threading.Thread(target=feed, args=(library, session, stop))
        thread.start()
        try:
            wait_for(lambda: session.counters().processed > 3)
            report = session.swap(other, patience_s=60.0, **options)
        finally:
            stop.append(True)
            thread.join()
        assert report.outcome == outcome, report.reason
        wait_for(lambda: session.counters().waiting == 0)
        assert session.counters().balanced
        assert session.info().model == (b"other" if outcome == 0 else b"tiny")
        if options["shadow_frames"] and outcome == 0:
            assert report.shadow_frames == 5 and report.dice_mean == 1.0 and report.hc_max_mm == 0.0


def test_closing_ends_a_stream_with_a_frame_in_the_engine(library: Library, make_stub: MakeStub) -> None:
    session = Session(library, make_stub(f"sleep=300 sleep_from={OPENING}"))
    for number in range(8):
        session.submit(moving(library, number))
        time.sleep(0.01)
    begin = time.monotonic()
    session.close()
    assert time.monotonic() - begin < 8


@given(steps=st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=10, deadline=None)
def test_the_book_balances_whatever_is_done(
    steps: list[tuple[int, bool]], library: Library, kept_bundle: object
) -> None:
    with Session(library, kept_bundle) as session:  # type: ignore[arg-type]
        for number, look in steps:
            session.submit(moving(library, number))
            if look:
                session.newest(1)
            assert session.counters().balanced


@pytest.fixture(scope="module")
def kept_bundle(tmp_path_factory: pytest.TempPathFactory) -> object:
    from tests.capi.conftest import stub_parts

    return stub_parts("sleep=1").publish(tmp_path_factory.mktemp("kept") / "kept.bundle")
