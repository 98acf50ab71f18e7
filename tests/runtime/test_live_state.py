"""States out of facts, on a clock that the test moves: no waiting, no threads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.live.state import StateLimits, StateMachine
from tinyusfm_runtime.results import LiveState, StateChange

PERIOD_MS = 20.0
LIMITS = StateLimits()
LIVE, STALE, FROZEN, LOST, DEGRADED = (
    LiveState.LIVE, LiveState.STALE, LiveState.FROZEN, LiveState.LOST, LiveState.DEGRADED,
)  # fmt: skip


class Story:
    """A machine and its clock."""

    def __init__(self, *, watch: bool = True) -> None:
        self.now_ms = 1e6
        self.contact_ms: float | None = None
        self.changes: list[StateChange] = []
        self.machine = StateMachine(LIMITS, self.changes.append, watch_arrivals=watch, now_ns=self.ns)

    @property
    def ns(self) -> int:
        return int(self.now_ms * 1e6)

    def frame(self, run: int = 0) -> LiveState:
        self.machine.frame(self.ns, seq=1, identical_run=run, period_ms=PERIOD_MS)
        return self.machine.state

    def frames(self, count: int) -> None:
        for _ in range(count):
            self.frame()
            self.now_ms += PERIOD_MS

    def wait(self, ms: float, alive_every_ms: float | None = None) -> LiveState:
        end, spoke = self.now_ms + ms, self.now_ms
        while self.now_ms < end:
            self.now_ms += 5
            if alive_every_ms is not None and self.now_ms - spoke >= alive_every_ms:
                self.contact_ms = spoke = self.now_ms
            contact = None if self.contact_ms is None else int(self.contact_ms * 1e6)
            self.machine.tick(self.ns, contact_ns=contact, period_ms=PERIOD_MS)
        return self.machine.state

    def result(self, *, stale: bool = False, degraded: str | None = None) -> LiveState:
        self.frame()
        self.machine.result(self.ns, stale=stale, degraded=degraded, period_ms=PERIOD_MS)
        return self.machine.state


def test_it_begins_lost_and_lives_with_the_first_frame() -> None:
    story = Story()
    assert story.machine.state is LOST and story.wait(3000) is LOST and not story.changes
    assert story.frame() is LIVE
    assert [(change.before, change.after) for change in story.changes] == [(LOST, LIVE)]


def test_a_stall_is_noticed_within_two_periods_and_a_tenth_of_a_second() -> None:
    story = Story()
    story.frames(20)
    story.wait(2 * PERIOD_MS + 100 - PERIOD_MS)
    assert story.machine.state is STALE
    quiet = Story()
    quiet.frames(20)
    assert quiet.wait(0.9 * PERIOD_MS) is LIVE, "the control: an ordinary pause is none"


def test_signs_of_life_tell_frozen_from_lost() -> None:
    frozen, lost = Story(), Story()
    for story in (frozen, lost):
        story.frames(20)
    assert frozen.wait(2000, alive_every_ms=250) is FROZEN
    assert lost.wait(2000) is LOST
    assert [change.after for change in lost.changes] == [LIVE, STALE, LOST]
    assert [change.after for change in frozen.changes] == [LIVE, STALE, FROZEN]
    assert frozen.wait(1000) is LOST, "the signs of life stop too"
    assert frozen.frame() is LIVE


def test_the_same_pixels_are_frozen_and_new_ones_are_not() -> None:
    story = Story()
    for run in range(LIMITS.identical_frames):
        assert story.frame(run) is LIVE
        story.now_ms += PERIOD_MS
    assert story.frame(LIMITS.identical_frames) is FROZEN
    assert story.frame(0) is LIVE


def test_late_results_are_stale_until_some_are_in_time() -> None:
    story = Story()
    story.frame()
    assert story.result(stale=True) is STALE
    for _ in range(LIMITS.fresh_results - 1):
        assert story.result() is STALE
    assert story.result() is LIVE


def test_a_missed_deadline_and_a_fallback_degrade() -> None:
    story = Story()
    story.frame()
    story.machine.missed(story.ns, PERIOD_MS)
    assert story.machine.state is DEGRADED
    assert story.result(degraded="the engine missed its deadline") is DEGRADED
    for _ in range(50):
        assert story.result(degraded="level 1 answers") is DEGRADED
    assert len(story.changes) == 2, "told once"
    for _ in range(LIMITS.fresh_results):
        story.result()
    assert story.machine.state is LIVE


def test_the_worst_fact_wins() -> None:
    story = Story()
    story.result(degraded="level 1 answers")
    assert story.result(stale=True, degraded="level 1 answers") is STALE
    assert story.frame(LIMITS.identical_frames) is FROZEN
    assert story.wait(2000) is LOST


def test_files_are_never_late() -> None:
    story = Story(watch=False)
    assert story.machine.state is LIVE and story.wait(5000) is LIVE


@given(st.lists(st.sampled_from(["frame", "same", "late", "fallback", "good", "wait", "alive", "miss"]), max_size=60))
def test_every_change_is_told_once_and_in_a_chain(steps: list[str]) -> None:
    story = Story()
    for step in steps:
        before, told = story.machine.state, len(story.changes)
        {
            "frame": story.frame,
            "same": lambda: story.frame(LIMITS.identical_frames),
            "late": lambda: story.result(stale=True),
            "fallback": lambda: story.result(degraded="x"),
            "good": story.result,
            "wait": lambda: story.wait(100),
            "alive": lambda: story.wait(300, alive_every_ms=100),
            "miss": lambda: story.machine.missed(story.ns, PERIOD_MS),
        }[step]()
        chain = story.changes[told:]
        assert (story.machine.state is before) or chain
        for change in chain:
            assert change.before is before and change.after is not before and "\n" not in change.reason
            before = change.after
        assert before is story.machine.state


def test_limits_must_not_contradict_one_another() -> None:
    for wrong in ({"stale_periods": 11.0}, {"slack_ms": 0.0}, {"identical_frames": 0}):
        with pytest.raises(InputError, match="state limits"):
            StateLimits(**wrong)  # type: ignore[arg-type]
