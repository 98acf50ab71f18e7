"""A command in a process of its own, with a bound of time and memory.

Exporting loads a student, builds graphs and runs engines over them: libraries that have no bound of their own. So the
program ``tinyusfm-edge`` does it in a second process, which it can stop; the screen, the exit code and Ctrl-C are those
of the command. A Python program that calls ``main`` with arguments stays in its own process, without a bound.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.isolate.session import memory_bytes

INSIDE = "TINYUSFM_BOUNDED"
"""Environment variable that tells the second process what it is."""
MAX_MINUTES, MAX_GB = 120.0, 16.0
"""Bounds of an export: a hundred times what the shipped student takes."""
CHECK_S = 0.2
GRACE_S = 10.0
"""How long it may take to close what it was writing once it was asked to stop."""


@dataclass(slots=True)
class _Program:
    """Whether this process is the program, not a caller of ``main``."""

    started: bool = False
    inside: bool = False


_program = _Program()


def as_program() -> None:
    """This process is the program.

    The second process of a command ends where the first one dies.
    """
    _program.started = True
    # what this process starts is no second process of the command
    _program.inside = os.environ.pop(INSIDE, "") != ""
    if _program.inside:
        threading.Thread(target=_end_with_first, name="tinyusfm-first", daemon=True).start()


def _end_with_first() -> None:
    while os.read(0, 1):
        continue
    os._exit(128 + signal.SIGTERM)


def should_start() -> bool:
    """Whether a bounded command is to be run in a process of its own.

    In the program, and not inside such a process already.
    """
    return _program.started and not _program.inside


def run_bounded(command: Sequence[str], what: str, *, minutes: float, gigabytes: float) -> int:
    """Runs a command in a process of its own.

    Args:
        command: program and arguments.
        what: the command's name, for messages.
        minutes: it may take so long.
        gigabytes: it and whatever it starts may hold so much memory each, 10^9 bytes (Linux says how much it is).

    Returns:
        Its exit code.

    Raises:
        EngineError: it took more than it may, or died of a signal; nothing was published.
        KeyboardInterrupt: Ctrl-C or SIGTERM; it was stopped first.
    """
    environment = {**os.environ, INSIDE: "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # a session of its own: Ctrl-C reaches it once, by this process
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        end_s = time.monotonic() + 60 * minutes
        while True:
            try:
                code = process.wait(CHECK_S)
                break
            except subprocess.TimeoutExpired:
                pass
            if time.monotonic() > end_s:
                raise EngineError(
                    f"{what} took more than {minutes:g} minutes and was stopped: --max-minutes allows more"
                )
            if (held := memory_bytes(process.pid)) > gigabytes * 1e9:
                raise EngineError(
                    f"{what} took {held / 1e9:.1f} GB of memory, more than {gigabytes:g}, and was stopped: --max-gb "
                    "allows more"
                )
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdin is not None:
            process.stdin.close()
    if code < 0:
        raise EngineError(f"{what} died of signal {-code} in its process; nothing was published")
    return code


__all__ = ["CHECK_S", "GRACE_S", "INSIDE", "MAX_GB", "MAX_MINUTES", "as_program", "run_bounded", "should_start"]
