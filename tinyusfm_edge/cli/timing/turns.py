"""Two sessions measured in turns, so that whatever slows the machine slows both."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.session import Session


def in_turns(first: Session, second: Session, frames: Sequence[Frame], rounds: int) -> np.ndarray:
    """Time of every prediction, both sessions in turns.

    Args:
        first: one session.
        second: the other one.
        frames: answered for in every round.
        rounds: at least one.

    Returns:
        ms, rounds x frames x 2.
    """
    took_RF2 = np.zeros((rounds, len(frames), 2))
    for session in (first, second):
        session.predict(frames[0])
    for turn in range(rounds):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            for number, frame in enumerate(frames):
                start = time.perf_counter_ns()
                (first, second)[side].predict(frame)
                took_RF2[turn, number, side] = (time.perf_counter_ns() - start) / 1e6
    return took_RF2


__all__ = ["in_turns"]
