"""Player: the steps of a plan at their times, into an outlet.

Everything is counted.

A step that is late is done at once and the clip's clock is not stretched: a receiver sees a source of the asked rate,
or the counters say how often this machine could not keep it. It does not know what the outlet is.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from tinyusfm_runtime.replay.faults import PlanStep
from tinyusfm_runtime.replay.outlets import Outlet

KEEP_ALIVE_S = 0.25
"""As often as PLUS sends its STATUS."""


@dataclass(kw_only=True, slots=True)
class PlaybackCounts:
    """What a replay did.

    Attributes:
        sent: frames handed to the outlet, corrupt ones included.
        late: of these, more than half a period after their time.
        keep_alives: signs of life between frames.
        faults: steps by the fault that made them.
    """

    sent: int = 0
    late: int = 0
    keep_alives: int = 0
    faults: dict[str, int] = field(default_factory=dict)


def play(
    steps: Iterable[PlanStep], outlet: Outlet, *, rate_hz: float, seed: int, stop: threading.Event
) -> PlaybackCounts:
    """Does the steps.

    Args:
        steps: what ``plan`` gave.
        outlet: where frames go.
        rate_hz: of the plan, for what counts as late.
        seed: draws the bytes that corruption changes.
        stop: ends it at once.

    Returns:
        What was done.

    Raises:
        OutputError: the outlet cannot take a frame.
        UnsupportedError: the outlet's device cannot.
    """
    tally, draw = PlaybackCounts(), random.Random(seed)
    start_s, start_unix_ns = time.monotonic(), time.time_ns()
    alive_s = start_s
    for step in steps:
        while not stop.is_set():
            now_s = time.monotonic()
            if now_s - alive_s >= KEEP_ALIVE_S:
                outlet.keep_alive()
                tally.keep_alives += 1
                alive_s = now_s
            left_s = start_s + step.due_s - now_s
            if left_s <= 0 or stop.wait(min(left_s, KEEP_ALIVE_S)):
                break
        if stop.is_set():
            break
        for fault in step.faults:
            tally.faults[fault] = tally.faults.get(fault, 0) + 1
        if step.frame is None:
            continue
        tally.late += time.monotonic() - start_s - step.due_s > 0.5 / rate_hz
        taken_ns = start_unix_ns + round(step.taken_s * 1e9)
        outlet.send(step.frame, seq=step.seq, t_unix_ns=taken_ns, damage=draw if step.corrupt else None)
        tally.sent += 1
    return tally


__all__ = ["KEEP_ALIVE_S", "PlaybackCounts", "play"]
