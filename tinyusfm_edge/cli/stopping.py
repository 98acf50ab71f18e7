"""SIGTERM and SIGHUP end a command as Ctrl-C does.

What it was writing is closed first.

Service managers and container runtimes stop a program that way, and by default Python just dies of it, records half
written. It knows no command.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C stopped."""
_NAMES = ("SIGTERM", "SIGHUP")


@dataclass(slots=True)
class Stop:
    """Which signal was heard.

    Attributes:
        number: of the signal, 0 while there was none.
    """

    number: int = 0

    @property
    def exit_code(self) -> int:
        """What the command returns, as a shell would say it: 128 + the signal's number."""
        return 128 + self.number if self.number else INTERRUPTED

    @property
    def words(self) -> str:
        """What the command says."""
        return f"stopped by {signal.Signals(self.number).name}" if self.number else "stopped"


@contextmanager
def signals_as_ctrl_c() -> Iterator[Stop]:
    """Turns the first SIGTERM or SIGHUP into a KeyboardInterrupt in the main thread.

    Further ones wait for the closing.

    Outside the main thread, where Python sets no handlers, nothing is changed.
    """
    stop = Stop()

    def hear(number: int, _frame: FrameType | None) -> None:
        if not stop.number:
            stop.number = number
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    known = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    # what somebody switched off (nohup) stays off
    before = {number: signal.signal(number, hear) for number in known if signal.getsignal(number) is signal.SIG_DFL}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
