"""Order of a live stream.

Which frame is newer, which came twice, which came late, and when a source began again.

Sequence numbers are compared as serial numbers modulo 2**32 (RFC 1982), so that a counter that wraps goes on. A
source's own clock is never used for ages; here it only decides about frames whose sequence numbers say nothing else. It
keeps no frame and looks at no pixel.
"""

from __future__ import annotations

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.results import DropReason

RESTART_AFTER = 3
"""So many older frames in a row, rising among themselves, are no stragglers: the source counts again."""
CLOCK_STEP_NS = 1_000_000_000
"""No transport holds a frame back for a second: with a rising sequence, such a jump back is a step of the clock."""
_MODULUS, _HALF = 1 << 32, 1 << 31


class OrderGuard:
    """Judges frames one by one.

    Attributes:
        restarts: how often the source began to count again.
        clock_steps: how often its clock jumped back by more than ``CLOCK_STEP_NS``.
    """

    def __init__(self) -> None:
        self.restarts = 0
        self.clock_steps = 0
        self._last: tuple[int, int | None] | None = None
        self._older: tuple[int, int | None] | None = None
        self._run = 0

    def judge(self, frame: Frame) -> DropReason | None:
        """Takes a frame, or says why not.

        Args:
            frame: the next frame as it was received.

        Returns:
            None if it is newer than all that were taken, else DUPLICATE or OUT_OF_ORDER.
        """
        here = (frame.seq, frame.t_source_ns)
        if self._last is not None:
            if _same(here, self._last):
                return DropReason.DUPLICATE
            if _before(here, self._last) and not self._began_again(here):
                return DropReason.OUT_OF_ORDER
            if self._run < RESTART_AFTER and _stepped(here, self._last):
                self.clock_steps += 1
        self._last, self._older, self._run = here, None, 0
        return None

    def began_again(self) -> None:
        """The link was made again: the next frame is taken, whatever its number."""
        self._last, self._older, self._run = None, None, 0

    def _began_again(self, here: tuple[int, int | None]) -> bool:
        rising = self._older is not None and not _same(here, self._older) and not _before(here, self._older)
        self._run = self._run + 1 if rising else 1
        self._older = here
        if self._run < RESTART_AFTER:
            return False
        self.restarts += 1
        return True


def _ahead(seq: int, last: int) -> int:
    """How far a number lies ahead, -2**31 to 2**31 - 1."""
    return (seq - last + _HALF) % _MODULUS - _HALF


def _same(here: tuple[int, int | None], last: tuple[int, int | None]) -> bool:
    return _ahead(here[0], last[0]) == 0 or (here[1] is not None and here[1] == last[1])


def _stepped(here: tuple[int, int | None], last: tuple[int, int | None]) -> bool:
    return here[1] is not None and last[1] is not None and last[1] - here[1] > CLOCK_STEP_NS


def _before(here: tuple[int, int | None], last: tuple[int, int | None]) -> bool:
    if _ahead(here[0], last[0]) < 0:
        return True
    if here[1] is None or last[1] is None:
        return False
    return here[1] < last[1] and not _stepped(here, last)


__all__ = ["CLOCK_STEP_NS", "RESTART_AFTER", "OrderGuard"]
