"""The overlay of a loop: the last result that may be on the screen.

It is withdrawn when it gets too old.

Times are passed in; nothing here waits or draws. Any thread may ask.
"""

from __future__ import annotations

import threading

from tinyusfm_runtime.results import LiveEvent, LiveEventKind, LiveResult


class Overlay:
    """What may be shown now.

    Args:
        limit_ms: age of the frame at which its result is withdrawn.
    """

    def __init__(self, limit_ms: float) -> None:
        self.limit_ms = limit_ms
        self._shown: LiveResult | None = None
        self._lock = threading.Lock()

    @property
    def shown(self) -> LiveResult | None:
        """The last valid result, until ``expire`` withdrew it."""
        return self._shown

    def show(self, result: LiveResult) -> None:
        """Takes a result over, if it may be shown (of several models, one of them)."""
        if any(each.valid for each in result.each):
            with self._lock:
                self._shown = result

    def expire(self, now_ns: int) -> LiveEvent | None:
        """Withdraws a result that is too old.

        Args:
            now_ns: ``time.monotonic_ns``.

        Returns:
            The event that tells of it, once for each result; None where nothing changed.
        """
        with self._lock:
            shown = self._shown
            if shown is None or shown.frame.t_recv_ns is None:
                return None
            age_ms = (now_ns - shown.frame.t_recv_ns) / 1e6
            if age_ms <= self.limit_ms:
                return None
            self._shown = None
        reason = f"the last result that could be shown is {age_ms:.0f} ms old"
        return LiveEvent(kind=LiveEventKind.OVERLAY_EXPIRED, t_ns=now_ns, reason=reason, seq=shown.frame.seq)


__all__ = ["Overlay"]
