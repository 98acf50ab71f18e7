"""Replay: the same seed gives the same faults, each fault does what it says, and what is counted is what arrives."""

from __future__ import annotations

import random
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.fakes.live_rigs import image
from tinyusfm_runtime.errors import InputError, UnsupportedError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.replay import outlets
from tinyusfm_runtime.replay.faults import FAULTS, JITTER_PERIODS, PlanStep, plan, read_faults
from tinyusfm_runtime.replay.player import play

RATE_HZ = 30.0
CLIP = [Frame(pixels=image(i), seq=i) for i in range(3000)]


def steps(*faults: str, seed: int = 1) -> list[PlanStep]:
    return list(plan(CLIP, rate_hz=RATE_HZ, faults=frozenset(faults), seed=seed))


def test_without_faults_a_plan_is_the_clip_at_its_rate() -> None:
    made = steps()
    assert [step.frame for step in made] == CLIP and not any(step.faults or step.corrupt for step in made)
    assert [step.due_s for step in made] == [index / RATE_HZ for index in range(3000)]


@pytest.mark.parametrize("faults", [(name,) for name in FAULTS] + [FAULTS])
def test_same_seed_same_faults(faults: tuple[str, ...]) -> None:
    assert steps(*faults) == steps(*faults)
    assert steps(*faults) != steps(*faults, seed=2)


def test_each_fault_does_what_it_says() -> None:
    dropped = steps("drop")
    assert 200 < sum(step.frame is None for step in dropped) < 400
    jittered = steps("jitter")
    shifts = [abs(step.due_s - step.taken_s) * RATE_HZ for step in jittered]
    assert max(shifts) <= JITTER_PERIODS + 1e-9 and np.mean(shifts) > 0.1
    reordered = [step.seq for step in steps("reorder")]
    backwards = sum(second < first for first, second in zip(reordered, reordered[1:], strict=False))
    assert 80 < backwards < 250 and sorted(reordered) == list(range(3000))
    assert 80 < sum(step.corrupt for step in steps("corrupt")) < 250
    frozen = [step for step in steps("freeze") if step.faults]
    kinds = Counter(step.frame is None for step in frozen)
    assert kinds[True] and kinds[False] and 300 < len(frozen) < 2000
    still = next(step for step in frozen if step.frame is not None)
    assert still.frame is CLIP[still.frame.seq] and still.frame.seq < still.seq, "an older image with a new time"


def test_steps_are_due_in_order_unless_jitter_says_otherwise() -> None:
    due = [step.due_s for step in steps("drop", "freeze", "reorder", "corrupt")]
    assert due == sorted(due)


def test_fault_names() -> None:
    assert read_faults("drop, jitter") == {"drop", "jitter"} and read_faults(None) == read_faults("") == frozenset()
    with pytest.raises(InputError, match="'explode'; there is: drop, jitter"):
        read_faults("drop,explode")


class Recorder:
    """An outlet that remembers."""

    address = "nowhere:"

    def __init__(self) -> None:
        self.sent: list[tuple[int, int, bool]] = []
        self.beats = 0

    def send(self, frame: Frame, *, seq: int, t_unix_ns: int, damage: random.Random | None) -> None:
        self.sent.append((seq, t_unix_ns, damage is not None))

    def keep_alive(self) -> None:
        self.beats += 1

    def close(self) -> None: ...


def test_the_player_counts_what_it_does() -> None:
    outlet = Recorder()
    made = list(plan(CLIP[:150], rate_hz=200.0, faults=frozenset(FAULTS), seed=5))
    tally = play(made, outlet, rate_hz=200.0, seed=5, stop=threading.Event())
    assert tally.sent == len(outlet.sent) == sum(step.frame is not None for step in made)
    assert tally.faults == Counter(fault for step in made for fault in step.faults)
    assert [seq for seq, _, _ in outlet.sent] == [step.seq for step in made if step.frame is not None]
    assert sum(bad for _, _, bad in outlet.sent) == sum(step.corrupt and step.frame is not None for step in made)
    assert outlet.beats == tally.keep_alives >= 1
    times = dict((seq, t_ns) for seq, t_ns, _ in outlet.sent)
    assert sorted(times.values()) == [times[seq] for seq in sorted(times)], "times are those of taking the image"


def test_the_player_stops_when_told() -> None:
    stop, outlet = threading.Event(), Recorder()
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    tally = play(
        iter([PlanStep(due_s=60.0, taken_s=60.0, seq=0, frame=CLIP[0])]), outlet, rate_hz=1.0, seed=0, stop=stop
    )
    timer.join()
    assert tally.sent == 0


def test_without_an_output_device_the_camera_says_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlets.v4l2, "nodes", list)
    with pytest.raises(UnsupportedError, match="v4l2loopback.*igtl or shm"):
        outlets.CameraOutlet(None)
    with pytest.raises(UnsupportedError, match="no Video4Linux output device"):
        outlets.CameraOutlet("/dev/null")


def test_what_a_video_device_is_given() -> None:
    colour = np.stack([image(1)] * 3, axis=-1)
    grey = outlets.as_grey(Frame(pixels=colour, pixel_format=PixelFormat.RGB))
    np.testing.assert_array_equal(grey, image(1))
    ends: Any = outlets.as_yuyv(np.array([[0, 255]], np.uint8))
    np.testing.assert_array_equal(ends, [[[16, 128], [235, 128]]])
