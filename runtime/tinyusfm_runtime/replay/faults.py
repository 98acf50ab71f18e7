"""Faults: what goes wrong between a probe and a receiver.

Drawn from a seed, as a list of steps with times.

A plan turns frames into steps; it sends nothing and waits for nothing, so the same seed gives the same faults whatever
carries them.

* drop     one frame in ten is not sent
* jitter   each frame is early or late by up to 40 % of the period
* freeze   once in three seconds or so the image stands still for half a second to a second and a half: either the
           same pixels come again with new times, or nothing comes but keep-alives
* reorder  one frame in twenty changes places with the next
* corrupt  one frame in twenty has bytes changed on its way
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame

FAULTS = ("drop", "jitter", "freeze", "reorder", "corrupt")
DROP_SHARE, REORDER_SHARE, CORRUPT_SHARE = 0.1, 0.05, 0.05
JITTER_PERIODS = 0.4
FREEZE_EVERY_S = 3.0
FREEZE_S = (0.5, 1.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanStep:
    """One thing to do at one time.

    Attributes:
        due_s: when, seconds from the beginning.
        taken_s: when the probe took the image, seconds from the beginning; goes into the message.
        seq: running number, from 0; those of dropped frames are missing.
        frame: what to send, or None to say only that the probe is alive.
        corrupt: change bytes on the way.
        faults: why this step is not what it would have been.
    """

    due_s: float
    taken_s: float
    seq: int
    frame: Frame | None
    corrupt: bool = False
    faults: tuple[str, ...] = ()


def read_faults(text: str | None) -> frozenset[str]:
    """``drop,jitter`` as a set; nothing is no fault.

    Args:
        text: names from FAULTS with commas between, or None.

    Returns:
        The names.

    Raises:
        InputError: a name that does not exist.
    """
    names = [part.strip() for part in (text or "").split(",") if part.strip()]
    unknown = [name for name in names if name not in FAULTS]
    if unknown:
        raise InputError(f"there is no fault named {unknown[0]!r}; there is: {', '.join(FAULTS)}")
    return frozenset(names)


def plan(frames: Iterable[Frame], *, rate_hz: float, faults: frozenset[str], seed: int) -> Iterator[PlanStep]:
    """Frames as steps in the order in which they are due.

    Args:
        frames: the clip.
        rate_hz: frames per second, more than 0.
        faults: names from FAULTS.
        seed: same seed, same steps.

    Yields:
        One step for each frame that is sent, and for each that is not but leaves a sign of life.
    """
    draw = random.Random(seed)
    held: PlanStep | None = None
    for step in _frozen(_dropped(frames, rate_hz, faults, draw), rate_hz, faults, draw):
        if "jitter" in faults:
            step = replace(step, due_s=max(step.due_s + draw.uniform(-1, 1) * JITTER_PERIODS / rate_hz, 0.0))
        if "corrupt" in faults and step.frame is not None and draw.random() < CORRUPT_SHARE:
            step = replace(step, corrupt=True, faults=(*step.faults, "corrupt"))
        if held is not None:
            yield replace(step, due_s=min(held.due_s, step.due_s))
            yield replace(held, due_s=max(held.due_s, step.due_s))
            held = None
        elif "reorder" in faults and step.frame is not None and draw.random() < REORDER_SHARE:
            held = replace(step, faults=(*step.faults, "reorder"))
        else:
            yield step
    if held is not None:
        yield held


def _dropped(
    frames: Iterable[Frame], rate_hz: float, faults: frozenset[str], draw: random.Random
) -> Iterator[PlanStep]:
    for seq, frame in enumerate(frames):
        at_s = seq / rate_hz
        if "drop" in faults and draw.random() < DROP_SHARE:
            yield PlanStep(due_s=at_s, taken_s=at_s, seq=seq, frame=None, faults=("drop",))
        else:
            yield PlanStep(due_s=at_s, taken_s=at_s, seq=seq, frame=frame)


def _frozen(
    steps: Iterable[PlanStep], rate_hz: float, faults: frozenset[str], draw: random.Random
) -> Iterator[PlanStep]:
    """Stretches in which the first image comes again, or none."""
    left, still = 0, None
    for step in steps:
        if left:
            left -= 1
            yield replace(step, frame=still, faults=(*step.faults, "freeze"))
            continue
        if "freeze" in faults and step.frame is not None and draw.random() < 1 / (FREEZE_EVERY_S * rate_hz):
            left = max(round(draw.uniform(*FREEZE_S) * rate_hz), 1)
            still = step.frame if draw.random() < 0.5 else None
        yield step


__all__ = [
    "CORRUPT_SHARE",
    "DROP_SHARE",
    "FAULTS",
    "FREEZE_EVERY_S",
    "FREEZE_S",
    "JITTER_PERIODS",
    "REORDER_SHARE",
    "PlanStep",
    "plan",
    "read_faults",
]
