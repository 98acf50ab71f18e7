"""The state of a live stream: LIVE, STALE, FROZEN, LOST or DEGRADED.

Out of arrivals, contact, pixels and results.

Facts go in with their time, the state comes out; a change is logged in one line and handed to a callback. Thresholds
are counted in frame periods, so one setting fits 15 and 60 frames per second. Times are ``time.monotonic_ns`` and are
always passed in: nothing here reads a clock, waits, or sees an image.

    no frame for 2 periods + slack                          STALE
    ... for 10 periods, with signs of life since the frame  FROZEN
    ... and none of those for the contact limit             LOST
    the same pixels for 10 frames                           FROZEN
    results older than the budget                           STALE
    another artefact answers, or the deadline was missed    DEGRADED
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.results import LiveState, StateChange

_log = logging.getLogger(__name__)
_ORDER = (LiveState.LIVE, LiveState.DEGRADED, LiveState.STALE, LiveState.FROZEN, LiveState.LOST)  # better to worse


@dataclass(frozen=True, kw_only=True, slots=True)
class StateLimits:
    """When a state begins.

    Attributes:
        stale_periods: frame periods without a frame before STALE.
        slack_ms: what arrivals may jitter on top of periods.
        frozen_periods: frame periods without a frame before FROZEN or LOST.
        identical_frames: frames in a row with the same pixels before FROZEN.
        contact_ms: silence after which a link counts as gone; a PLUS server gives a sign of life every 250 ms
            (vtkPlusOpenIGTLinkServer.cxx), so this is two of them and a half.
        fresh_results: results in time, and by the chosen artefact, before STALE or DEGRADED ends.
    """

    stale_periods: float = 2.0
    slack_ms: float = 50.0
    frozen_periods: float = 10.0
    identical_frames: int = 10
    contact_ms: float = 625.0
    fresh_results: int = 3

    def __post_init__(self) -> None:
        """Checks the order of the limits.

        Raises:
            InputError: they contradict one another.
        """
        if not 0 < self.stale_periods <= self.frozen_periods or min(self.slack_ms, self.contact_ms) <= 0:
            raise InputError("state limits: stale_periods must be above 0 and not above frozen_periods, times above 0")
        if self.identical_frames < 1 or self.fresh_results < 1:
            raise InputError("state limits: identical_frames and fresh_results must be at least 1")


class StateMachine:
    """Keeps the state. Any thread may report to it.

    Args:
        limits: thresholds.
        on_change: called on every change, in order, in the thread that caused it; must not block.
        watch_arrivals: False for files, whose frames come when they are asked for.
        now_ns: the beginning, until ``begin`` names another one.
    """

    def __init__(
        self,
        limits: StateLimits,
        on_change: Callable[[StateChange], None] | None,
        *,
        watch_arrivals: bool,
        now_ns: int,
    ) -> None:
        self.limits = limits
        self._on_change = on_change
        self._watch = watch_arrivals
        # a callback may ask for the state, hence re-entrant
        self._lock = threading.RLock()
        self._state = LiveState.LOST if watch_arrivals else LiveState.LIVE
        self._began_ns = now_ns
        self._frame_ns: int | None = None
        self._contact_ns: int | None = None
        self._seq: int | None = None
        self._identical = 0
        self._stale_left = self._degraded_left = 0
        self._late_in_engine = False
        self._why_degraded = ""
        self._status = ""

    @property
    def state(self) -> LiveState:
        """The state now."""
        return self._state

    def begin(self, now_ns: int) -> None:
        """The stream begins now; a source has this long to send its first frame."""
        with self._lock:
            self._began_ns = now_ns

    def frame(self, now_ns: int, *, seq: int, identical_run: int, period_ms: float) -> None:
        """A new frame was taken."""
        with self._lock:
            self._frame_ns, self._seq, self._identical = now_ns, seq, identical_run
            self._settle(now_ns, period_ms)

    def result(self, now_ns: int, *, stale: bool, degraded: str | None, period_ms: float) -> None:
        """A frame was answered.

        ``degraded`` says why the answer counts as degraded, or is None.
        """
        with self._lock:
            self._late_in_engine = False
            self._stale_left = self.limits.fresh_results if stale else max(self._stale_left - 1, 0)
            if degraded is not None:
                self._why_degraded = degraded
            self._degraded_left = self.limits.fresh_results if degraded else max(self._degraded_left - 1, 0)
            self._settle(now_ns, period_ms)

    def missed(self, now_ns: int, period_ms: float) -> None:
        """The engine missed its deadline and is still running."""
        with self._lock:
            self._late_in_engine = True
            self._settle(now_ns, period_ms)

    def waited_ms(self, now_ns: int) -> float:
        """How long the first frame has been waited for, ms; 0 after it."""
        return 0.0 if self._frame_ns is not None else (now_ns - self._began_ns) / 1e6

    def tick(self, now_ns: int, *, contact_ns: int | None, period_ms: float, status: str = "") -> None:
        """Time went by.

        ``contact_ns`` is the source's last sign of life or None, ``status`` what it says of itself.
        """
        with self._lock:
            self._status = status
            self._contact_ns = contact_ns
            self._settle(now_ns, period_ms)

    def _settle(self, now_ns: int, period_ms: float) -> None:
        after, reason = self._judge(now_ns, period_ms)
        before, self._state = self._state, after
        if after is before:
            return
        worse = _ORDER.index(after) > _ORDER.index(before)
        _log.log(
            logging.WARNING if worse else logging.INFO, "live state %s -> %s: %s", before.value, after.value, reason
        )
        if self._on_change is not None:
            self._on_change(StateChange(before=before, after=after, t_ns=now_ns, reason=reason, seq=self._seq))

    def _judge(self, now_ns: int, period_ms: float) -> tuple[LiveState, str]:
        if self._watch and (found := self._arrivals(now_ns, period_ms)) is not None:
            return found
        if self._identical >= self.limits.identical_frames:
            return LiveState.FROZEN, f"the same pixels in {self._identical + 1} frames"
        if self._stale_left:
            return LiveState.STALE, "results are older than the budget"
        if self._late_in_engine:
            return LiveState.DEGRADED, "the engine passed its deadline"
        if self._degraded_left:
            return LiveState.DEGRADED, self._why_degraded
        return LiveState.LIVE, "frames arrive and results are in time"

    def _arrivals(self, now_ns: int, period_ms: float) -> tuple[LiveState, str] | None:
        limits = self.limits
        last_ns = self._began_ns if self._frame_ns is None else self._frame_ns
        gap_ms = (now_ns - last_ns) / 1e6
        since = self._contact_ns is not None and self._contact_ns > last_ns
        silent_ms = (now_ns - max(last_ns, self._contact_ns or last_ns)) / 1e6
        long_ms = limits.frozen_periods * period_ms + limits.slack_ms
        suffix = f" ({self._status})" if self._status else ""
        if silent_ms > max(limits.contact_ms, limits.stale_periods * period_ms + limits.slack_ms):
            return LiveState.LOST, f"no sign of life for {silent_ms:.0f} ms{suffix}"
        if gap_ms > long_ms and since:
            return LiveState.FROZEN, f"signs of life but no frame for {gap_ms:.0f} ms{suffix}"
        if self._frame_ns is None:
            return self._state, "waiting for the first frame"
        if gap_ms > limits.stale_periods * period_ms + limits.slack_ms:
            return LiveState.STALE, f"no frame for {gap_ms:.0f} ms, {gap_ms / period_ms:.1f} periods"
        return None


__all__ = ["StateLimits", "StateMachine"]
