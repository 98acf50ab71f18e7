"""Capture: drains a source into the inbox.

Frame by frame checked, stamped and in order.

``run`` is the body of the loop's capture thread. It keeps what is known about arrivals: order, the frame period, how
long the pixels have been the same. It knows no engine and no result.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tinyusfm_runtime.device.machine import pin
from tinyusfm_runtime.errors import EdgeError, SourceError
from tinyusfm_runtime.frame import Frame, FrameSource, LiveSource
from tinyusfm_runtime.live import check as frame_check
from tinyusfm_runtime.live.freeze import FramePeriod, StillImage
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.live.order import OrderGuard
from tinyusfm_runtime.live.queues import Inbox
from tinyusfm_runtime.live.state import StateMachine
from tinyusfm_runtime.results import DropPolicy

_STATUS_NS = 1_000_000_000
_OLDEST_RECEPTION_NS = 3_600_000_000_000  # a reception time that lies further back is another clock's


class Capture:
    """The source's side of a loop.

    Args:
        source: where frames come from, not entered yet.
        inbox: takes every frame that can be used, and books the others.
        states: is called with arrivals, where they are watched.
        options: CPUs, copying, a known frame period.
        policy: LOSSLESS takes frames as they come; NEWEST also looks at order and stillness.
        on_failure: called with the error when the source breaks off.

    Attributes:
        period: the frame period, given or estimated.
    """

    def __init__(
        self,
        source: FrameSource,
        inbox: Inbox,
        states: StateMachine,
        options: LiveOptions,
        policy: DropPolicy,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.period = FramePeriod(options.period_ms)
        self._source: Any = source
        self._inbox, self._states, self._options, self._policy = inbox, states, options, policy
        self._on_failure = on_failure
        self._live = isinstance(source, LiveSource)
        self._order, self._still = OrderGuard(), StillImage()
        self._stopping = threading.Event()
        self._reconnects = 0
        self._status, self._status_ns = "", -_STATUS_NS
        self._reported: set[str] = set()

    @property
    def is_live(self) -> bool:
        """True if frames of the source are lost when nobody takes them."""
        return self._live

    @property
    def contact_ns(self) -> int | None:
        """``time.monotonic_ns`` of a live source's last sign of life, or None."""
        return self._source.last_contact_ns if self._live else None

    @property
    def status(self) -> str:
        """What a live source's connection is at, or "" where it does not say."""
        return str(getattr(self._source, "status", "")) if self._live else ""

    def news(self, now_ns: int) -> list[str]:
        """Lines that a live source has not said yet.

        Its status where that changed, and its notes and doubts.

        Args:
            now_ns: ``time.monotonic_ns``; a status that comes and goes is said once a second at most.
        """
        if not self._live:
            return []
        lines = []
        status = self.status
        if status != self._status and now_ns - self._status_ns > _STATUS_NS:
            self._status, self._status_ns = status, now_ns
            lines.append(status)
        for text in (*getattr(self._source, "notes", ()), *getattr(self._source, "doubts", ())):
            if text not in self._reported:
                self._reported.add(text)
                lines.append(text)
        return [line for line in lines if line]

    def counters(self) -> dict[str, int]:
        """The source's own counters, and how often order began again.

        Zeros of the latter are left out.
        """
        own = {"sequence_restarts": self._order.restarts, "clock_steps": self._order.clock_steps}
        return (dict(self._source.counters) if self._live else {}) | {name: n for name, n in own.items() if n}

    def enter(self) -> None:
        """Opens the source."""
        self._source = self._source.__enter__()

    def leave(self) -> None:
        """Frees the source, after its iteration has ended."""
        self._source.__exit__(None, None, None)

    def stop(self) -> None:
        """Asks for the end; may come from any thread."""
        self._stopping.set()
        close = getattr(self._source, "close", None)
        if self._live and close is not None:
            close()

    def run(self) -> None:
        """Reads until the source ends, breaks off, or the loop is closed."""
        frames: Any = None
        try:
            pin(self._options.capture_cpus)
            frames = iter(self._source)
            for item in frames:
                if not self._receive(item):
                    break
        except EdgeError as error:
            self._on_failure(error)
        except Exception as error:  # a source of another distribution may raise anything
            failure = SourceError(f"the source broke off: {type(error).__name__}")
            failure.__cause__ = error
            self._on_failure(failure)
        finally:
            if hasattr(frames, "close"):
                with contextlib.suppress(Exception):
                    frames.close()
            self._inbox.end()

    def _receive(self, item: Any) -> bool:
        """Books one item; False if no more are wanted."""
        now_ns = time.monotonic_ns()
        if (reason := frame_check.refusal(item)) is not None:
            self._inbox.reject(reason)
            return not self._stopping.is_set()
        frame = self._stamped(item, now_ns)
        if self._policy is DropPolicy.LOSSLESS:
            self.period.arrived(now_ns)
            return self._inbox.put(frame)
        self._look_for_reconnects()
        if (drop := self._order.judge(frame)) is not None:
            self._inbox.refuse(drop)
            return not self._stopping.is_set()
        self.period.arrived(now_ns)
        self._still.see(frame.pixels)
        kept = self._inbox.put(frame)
        self._states.frame(now_ns, seq=frame.seq, identical_run=self._still.run, period_ms=self.period.ms)
        return kept

    def _stamped(self, frame: Frame, now_ns: int) -> Frame:
        """The frame with a reception time, and pixels of its own if asked for.

        The time is that of this machine's monotonic clock.
        """
        changes: dict[str, Any] = {}
        received = frame.t_recv_ns
        if received is None or not max(0, now_ns - _OLDEST_RECEPTION_NS) <= received <= now_ns:
            changes["t_recv_ns"] = now_ns
        if self._options.copy_frames:
            changes["pixels"] = frame.pixels.copy()
        return replace(frame, **changes) if changes else frame

    def _look_for_reconnects(self) -> None:
        """After a reconnect numbers and clocks of the source may begin again."""
        if not self._live:
            return
        count = self._source.counters.get("reconnects", 0)
        if count != self._reconnects:
            self._reconnects = count
            self._order.began_again()


__all__ = ["Capture"]
