"""The process an engine runs in when it has to be killable.

``python -m tinyusfm_runtime.isolate.process``

It opens the requested session, then answers frames from one pipe into another (wire.py), one after the other. A
thread reads, so that a cancellation arrives while the engine computes; another sends a heartbeat. It ends when its pipe
is closed, which also happens when the program that started it dies.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from tinyusfm_runtime.device.machine import pin
from tinyusfm_runtime.errors import EdgeError, FrameError, SectorError
from tinyusfm_runtime.isolate import messages as wire
from tinyusfm_runtime.isolate.session import HEARTBEAT_S
from tinyusfm_runtime.session import Session


class _Mouth:
    """The pipe to the program; whole messages only, from any thread."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def say(self, head: Mapping[str, Any]) -> None:
        with self._lock:
            wire.send(self._pipe, head)

    def progress(self, what: str, share: float) -> None:
        self.say({"kind": wire.PROGRESS, "what": what, "share": share})

    def answer(self, number: int, prediction: Any) -> None:
        with self._lock:
            wire.send_prediction(self._pipe, number, prediction)


def main(arguments: Sequence[str]) -> int:
    """Serves until the pipe is closed.

    Args:
        arguments: file descriptor to read from, file descriptor to write to, options as JSON.

    Returns:
        The exit code.
    """
    # a service manager signals the whole group, as Ctrl-C does: the program handles it, and closes the pipe
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    incoming = os.fdopen(int(arguments[0]), "rb")
    mouth = _Mouth(os.fdopen(int(arguments[1]), "wb", buffering=0))
    options = json.loads(arguments[2])
    try:
        pin(options.pop("cpus"))
        session = Session.open(options.pop("bundle"), progress=mouth.progress, **options)
    except EdgeError as error:
        mouth.say({"kind": wire.FAILED, "number": 0, "text": str(error)})
        return error.exit_code
    with session:
        hello = {"bundle_id": session.manifest.bundle_id, "description": session.description}
        mouth.say({"kind": wire.HELLO, "number": 0, "hello": hello})
        threading.Thread(target=_pulse, args=(mouth,), daemon=True).start()
        jobs: queue.SimpleQueue[wire.Message | None] = queue.SimpleQueue()
        threading.Thread(target=_hear, args=(incoming, jobs, session), daemon=True).start()
        while (job := jobs.get()) is not None:
            _serve(session, job, mouth)
    return 0


def _pulse(mouth: _Mouth) -> None:
    wait = threading.Event()
    while not wait.wait(HEARTBEAT_S):
        try:
            mouth.say({"kind": wire.PULSE})
        except OSError:
            os._exit(0)  # nobody listens any more, and the engine may be hanging


def _hear(incoming: BinaryIO, jobs: queue.SimpleQueue[wire.Message | None], session: Session) -> None:
    try:
        while (message := wire.receive(incoming)) is not None:
            if message.head["kind"] == wire.CANCEL:
                session.cancel()
            else:
                jobs.put(message)
    except (OSError, ValueError, EOFError):
        pass
    jobs.put(None)


def _serve(session: Session, job: wire.Message, mouth: _Mouth) -> None:
    number = int(job.head["number"])
    try:
        mouth.answer(number, session.predict(wire.frame_of(job)))
    except FrameError as error:
        kind = wire.OTHER_SECTOR if isinstance(error, SectorError) else wire.REFUSED
        mouth.say({"kind": kind, "number": number, "text": str(error)})
    except EdgeError as error:
        mouth.say({"kind": wire.FAILED, "number": number, "text": str(error)})
    except OSError:
        os._exit(0)
    except Exception as error:  # an engine of another distribution may raise anything
        mouth.say({"kind": wire.FAILED, "number": number, "text": f"the engine raised {type(error).__name__}"})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
