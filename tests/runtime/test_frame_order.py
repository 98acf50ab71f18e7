"""Order of frames: wrapping counters, doubles, stragglers, sources that begin again, clocks that step."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.order import CLOCK_STEP_NS, RESTART_AFTER, OrderGuard
from tinyusfm_runtime.results import DropReason

PIXELS = np.zeros((8, 8), np.uint8)
DOUBLE, STRAGGLER = DropReason.DUPLICATE, DropReason.OUT_OF_ORDER


def judged(*numbers: int | tuple[int, int | None]) -> tuple[OrderGuard, list[DropReason | None]]:
    """A fresh guard after some frames, (number, source time) each, and what it said."""
    guard = OrderGuard()
    pairs = [(n, None) if isinstance(n, int) else n for n in numbers]
    return guard, [guard.judge(Frame(pixels=PIXELS, seq=seq, t_source_ns=t)) for seq, t in pairs]


def test_rising_numbers_are_taken_and_gaps_do_not_matter() -> None:
    assert judged(5, 6, 9, 1000)[1] == [None] * 4


def test_doubles_and_stragglers_are_named() -> None:
    assert judged(5, 5, 7, 6, 8)[1] == [None, DOUBLE, None, STRAGGLER, None]
    assert judged((1, 10), (2, 10), (3, 5), (4, 20))[1] == [None, DOUBLE, STRAGGLER, None]


def test_a_counter_may_wrap() -> None:
    top = 2**32 - 1
    assert judged(top - 1, top, 0, 1, top)[1] == [None, None, None, None, STRAGGLER]
    assert judged(top, 2**32, 2**32 + 1)[1] == [None] * 3


def test_a_source_that_counts_anew_is_believed_after_some_frames() -> None:
    guard, said = judged(100, 101, 1, 2, 3, 4)
    assert said == [None, None, *[STRAGGLER] * (RESTART_AFTER - 1), None, None]
    assert guard.restarts == 1
    guard, said = judged(100, 1, 101, 2, 102, 3, 103, 4)
    assert said == [None, STRAGGLER] + [None, STRAGGLER] * 3 and guard.restarts == 0, "stragglers are no new start"


def test_after_a_reconnection_the_next_frame_is_taken() -> None:
    guard, _ = judged(100)
    guard.began_again()
    assert guard.judge(Frame(pixels=PIXELS, seq=0)) is None


def test_a_clock_that_steps_back_costs_no_frame() -> None:
    hour = 3600 * CLOCK_STEP_NS
    guard, said = judged((1, 2 * hour), (2, 2 * hour + 1), (3, hour), (4, hour + 1), (5, 3 * hour))
    assert said == [None] * 5 and guard.clock_steps == 1 and guard.restarts == 0


@given(st.permutations(list(range(1, 30))), st.integers(0, 2**32 - 1))
def test_what_is_taken_rises_but_for_new_starts(order: list[int], offset: int) -> None:
    guard = OrderGuard()
    taken = [n for n in order if guard.judge(Frame(pixels=PIXELS, seq=(n + offset) % 2**32)) is None]
    falls = sum(b < a for a, b in zip(taken, taken[1:], strict=False))
    assert falls == guard.restarts and len(set(taken)) == len(taken)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
def test_a_rising_stream_is_taken_whole_and_each_double_refused(steps: list[int], start: int) -> None:
    guard, seq = OrderGuard(), start
    for step in steps:
        seq = (seq + step) % 2**32
        assert guard.judge(Frame(pixels=PIXELS, seq=seq)) is None
        assert guard.judge(Frame(pixels=PIXELS, seq=seq)) is DOUBLE
