"""A signal that ends long work is heard between two steps.

What was done can be saved first.

    with StopSignal() as stop:
        for step in range(steps):
            work(step)
            if stop.heard:
                save()
                stop.leave(f"stopped at step {step + 1} of {steps}; saved")

The first Ctrl-C (or SIGTERM, SIGHUP) is noted; a second one ends the work at once. It does not know what is done.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
Handler = Callable[[int, FrameType | None], object]


class StopSignal:
    """Takes note of the first signal while it is entered.

    Outside the main thread it hears nothing.

    Args:
        on_heard: called once, in the signal handler, with a line for people.
    """

    def __init__(self, on_heard: Callable[[str], None] | None = None) -> None:
        self._on_heard = on_heard
        self._before: dict[int, Handler] = {}
        self._number = 0

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                before = signal.getsignal(number)
                # what somebody switched off, or what would end the process anyway, stays as it is
                if callable(before):
                    self._before[number] = before
                    signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    @property
    def heard(self) -> bool:
        """Whether the work is to end after this step."""
        return self._number != 0

    def leave(self, message: str) -> NoReturn:
        """Ends the work as the signal would have done, with what was saved in the message.

        Args:
            message: one line.

        Raises:
            KeyboardInterrupt: always.
        """
        before = self._before.get(self._number)
        self._restore()
        try:
            if before is not None:
                before(self._number, None)
        except KeyboardInterrupt:
            pass
        raise KeyboardInterrupt(message)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._number:
            before = self._before[number]
            self._restore()
            before(number, frame)
            return
        self._number = number
        if self._on_heard is not None:
            self._on_heard("stopping after this step; once more stops at once")

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {number: before for number, before in self._before.items() if number == self._number}


__all__ = ["Handler", "StopSignal"]
