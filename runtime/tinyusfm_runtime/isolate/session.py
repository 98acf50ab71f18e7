"""A session in a process of its own.

A kernel that hangs there can be killed, and the process is made again.

``WorkerSession`` looks like a Session to a fallback. Frames and answers travel through two pipes as messages (wire.py);
the process is a fresh interpreter that imports nothing of the caller's program (``python -m
tinyusfm_runtime.isolate.process``), so it works under every start method and from every ``__main__``. It sends a
heartbeat; silence, like a call given up, ends in its death. A new one opens the bundle, is golden-checked by
Session.open and must be of the same bundle id; until it is up, every call raises.

It knows no fallback and decides nothing but life and death of its process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from tinyusfm_runtime.errors import EdgeError, EngineError, FrameError, InputError, SectorError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.isolate import messages as wire
from tinyusfm_runtime.results import Prediction

_log = logging.getLogger(__name__)
HEARTBEAT_S = 0.1
"""How often the process says that it lives."""
SILENCE_S = 2.0
"""So long without a heartbeat, and the process is killed: not even its idle thread runs any more."""
MAX_MEMORY_BYTES = 4 << 30
"""A process that holds more is killed: no engine of a model for the edge needs it."""
Progress = Callable[[str, float], None]
"""Called with what is done and the share that is done."""
START_S = 120.0
"""Opening and golden-checking a bundle takes a second or two; a process that takes longer has hung."""


class WorkerSession:
    """A predictor whose engine can be killed.

    Open it with ``WorkerSession.open``; a context manager is not needed.

    Attributes:
        restarts: how often a process was made again.
    """

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        target: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        cpus: Iterable[int] | None = None,
        bundle_id: str | None = None,
        silence_s: float = SILENCE_S,
        second_pass: bool = True,
        drift: bool = True,
        progress: Progress | None = None,
    ) -> WorkerSession:
        """Starts the process and waits until its session is open.

        Args:
            bundle: the bundle's folder.
            target: as in ``Session.open``.
            precision: as in ``Session.open``.
            threads: as in ``Session.open``.
            cpus: CPUs the process is pinned to (Linux), or None.
            bundle_id: refuse another bundle at that place, None takes the id of the first start.
            silence_s: so long without a heartbeat, and the process is killed.
            second_pass: as in ``Session.open``.
            drift: as in ``Session.open``.
            progress: as in ``Session.open``; called in a thread of its own.

        Raises:
            EngineError: the process could not be started, or could not open the bundle.
        """
        options = {
            "bundle": str(Path(bundle).absolute()),
            "target": target,
            "precision": precision,
            "threads": threads,
            "cpus": None if cpus is None else sorted(cpus),
            "second_pass": second_pass,
            "drift": drift,
        }
        session = cls(options, bundle_id, silence_s, progress)
        try:
            session._start()
        except BaseException:
            session.close()
            raise
        return session

    def __init__(
        self, options: dict[str, Any], bundle_id: str | None, silence_s: float, progress: Progress | None = None
    ) -> None:
        """Binds options; nothing runs yet. Use ``WorkerSession.open``."""
        self.restarts = 0
        self.bundle_id = bundle_id
        self._options = options
        self._silence_s = silence_s
        self._progress = progress
        self._life: _Life | None = None
        self._description = ""
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._restarter: threading.Thread | None = None

    @property
    def description(self) -> str:
        """Artefact and engine really used, one line."""
        return f"{self._description} in a process of its own"

    @property
    def alive(self) -> bool:
        """True if a process is up and its session open."""
        life = self._life
        return life is not None and life.alive

    @property
    def pid(self) -> int | None:
        """Process id, or None while there is none."""
        life = self._life
        return None if life is None else life.process.pid

    def predict(self, frame: Frame) -> Prediction:
        """Answers for one frame.

        Raises:
            FrameError: the frame cannot be used.
            EngineError: the engine failed, or its process died or is being made again.
        """
        life = self._life
        if life is None or not life.alive:
            raise EngineError("the engine's process is being made again" if not self._closed.is_set() else "closed")
        try:
            kind, content = life.ask(frame)
        except (OSError, EOFError, ValueError) as error:
            self._bury(life)
            raise EngineError("the engine's process died") from error
        if kind == wire.OTHER_SECTOR:
            raise SectorError(str(content))
        if kind == wire.REFUSED:
            raise FrameError(str(content))
        if kind == wire.FAILED:
            raise EngineError(str(content))
        if not isinstance(content, Prediction):
            raise EngineError("the engine's process gave no answer")
        return content

    def cancel(self) -> None:
        """Asks a prediction in progress to stop."""
        life = self._life
        if life is not None:
            life.cancel()

    def kill(self) -> None:
        """Kills the process, whatever it is doing; a new one is started."""
        life = self._life
        if life is not None:
            life.process.kill()
            self._bury(life)

    def close(self) -> None:
        """Ends the process. Idempotent."""
        self._closed.set()
        with self._lock:
            life, self._life = self._life, None
            restarter = self._restarter
        if life is not None:
            life.end()
        if restarter is not None and restarter is not threading.current_thread():
            restarter.join()

    def _start(self) -> None:
        life = _Life(self._options, self._silence_s, self._bury, self._progress)
        try:
            hello = life.hello(self._closed)
            if self.bundle_id is not None and hello["bundle_id"] != self.bundle_id:
                raise EngineError("another bundle stands in the place of the one that was opened")
        except BaseException:
            life.end()
            raise
        with self._lock:
            self.bundle_id, self._description = hello["bundle_id"], hello["description"]
            if not self._closed.is_set():
                self._life = life
                life.watch()
                return
        life.end()

    def _bury(self, life: _Life) -> None:
        """Takes a dead or dying process away and starts another one, once."""
        with self._lock:
            if self._life is not life or self._closed.is_set():
                return
            self._life = None
            self._restarter = threading.Thread(target=self._restart, args=(life,), name="tinyusfm-restart", daemon=True)
            self._restarter.start()

    def _restart(self, life: _Life) -> None:
        life.end()
        pause_s = 0.1
        while not self._closed.is_set():
            self.restarts += 1
            try:
                self._start()
                _log.warning("the engine's process was made again")
                return
            except EdgeError as error:
                _log.warning("the engine's process cannot be made again: %s", error)
                self._closed.wait(pause_s)
                pause_s = min(2 * pause_s, 10.0)


def memory_bytes(pid: int) -> int:
    """Memory that a process holds; 0 where the system does not say (Linux does)."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def try_open(bundle: str | Path, *, target: str, precision: str, progress: Progress | None = None) -> None:
    """Opens an artefact once in a process that can be stopped.

    For whoever will open it in their own.

    What the session itself refuses is not reported here: the next opening reports it.

    Args:
        bundle: the bundle's folder.
        target: of the artefact.
        precision: of the artefact.
        progress: as in ``Session.open``; called in a thread of its own.

    Raises:
        EngineError: it crashed, or took more time or memory than any of ours.
    """
    options = {"bundle": str(Path(bundle).absolute()), "target": target, "precision": precision, "cpus": None}
    life = _Life({**options, "allow_unverified": True}, SILENCE_S, lambda _life: None, progress)
    try:
        life.hello(threading.Event())
    except EngineError as error:
        if life.refused is None:
            raise EngineError(f"artefact {target}-{precision}: {error}") from error
    finally:
        life.end()


class _Life:
    """One process, from its start to its end."""

    def __init__(
        self, options: dict[str, Any], silence_s: float, on_silence: Any, progress: Progress | None = None
    ) -> None:
        frames_read, frames_write = os.pipe()
        answers_read, answers_write = os.pipe()
        fds = (frames_read, answers_write)
        command = [sys.executable, "-m", "tinyusfm_runtime.isolate.process", *map(str, fds), json.dumps(options)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment, pass_fds=fds
            )
        except OSError as error:
            for fd in (frames_write, answers_read):
                os.close(fd)
            raise EngineError(f"the engine's process cannot be started: {error.strerror}") from error
        finally:
            for fd in fds:
                os.close(fd)
        self._to: BinaryIO = os.fdopen(frames_write, "wb", buffering=0)
        self._from: BinaryIO = os.fdopen(answers_read, "rb")
        self._silence_s, self._on_silence, self._progress = silence_s, on_silence, progress
        self._heard_s = time.monotonic()
        self._answers: wire.Answers = wire.Answers()
        self._sending = threading.Lock()
        self._reader: threading.Thread | None = None
        self._watcher: threading.Thread | None = None
        self._over = threading.Event()
        self._number = 0
        self.refused: str | None = None

    @property
    def alive(self) -> bool:
        return not self._over.is_set() and self.process.poll() is None

    def hello(self, closed: threading.Event) -> dict[str, Any]:
        """Waits until the session inside is open."""
        self._reader = threading.Thread(target=self._read, name="tinyusfm-worker-read", daemon=True)
        self._reader.start()
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s and not closed.is_set():
            try:
                kind, content = self._answers.take(0, 0.1)
            except TimeoutError:
                if (held := memory_bytes(self.process.pid)) > MAX_MEMORY_BYTES:
                    raise EngineError(
                        f"opening the artefact takes more than {MAX_MEMORY_BYTES >> 30} GiB ({held >> 20} MiB): refused"
                    ) from None
                continue
            except EOFError:
                break
            if kind == wire.FAILED:
                self.refused = str(content)
                raise EngineError(f"the engine's process could not open the bundle: {content}")
            if not isinstance(content, dict):
                raise InputError("the engine's process did not say what it opened")
            return content
        ended = None
        if time.monotonic() < end_s:  # its pipe is closed, so it ends now
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = self.process.wait(2.0)
        if ended is not None and ended < 0:
            raise EngineError(
                f"the engine's process died of signal {-ended} while it opened the artefact: do not use it"
            )
        if time.monotonic() >= end_s:
            raise EngineError(f"the artefact was not open within {START_S:.0f} s: do not use it")
        raise EngineError("the engine's process did not come up")

    def watch(self) -> None:
        """From now on its heartbeat is listened to."""
        self._heard_s = time.monotonic()
        self._watcher = threading.Thread(target=self._listen, name="tinyusfm-worker-pulse", daemon=True)
        self._watcher.start()

    def ask(self, frame: Frame) -> tuple[str, Any]:
        self._number += 1
        with self._sending:
            wire.send_frame(self._to, self._number, frame)
        return self._answers.take(self._number, None)

    def cancel(self) -> None:
        # a frame that does not go through holds the pipe, and nothing would after it
        if not self._sending.acquire(timeout=HEARTBEAT_S):
            return
        try:
            wire.send(self._to, {"kind": wire.CANCEL})
        except (OSError, ValueError):
            return  # it is dying already
        finally:
            self._sending.release()

    def end(self) -> None:
        """Kills the process and frees everything. Idempotent."""
        self._over.set()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        here = threading.current_thread()
        for thread in (self._reader, self._watcher):
            if thread is not None and thread is not here:
                thread.join()
        self._answers.end()
        self._to.close()
        self._from.close()

    def _read(self) -> None:
        try:
            while (message := wire.receive(self._from)) is not None:
                self._heard_s = time.monotonic()
                if message.head["kind"] == wire.PROGRESS:
                    if self._progress is not None:
                        self._progress(str(message.head["what"]), float(message.head["share"]))
                elif message.head["kind"] != wire.PULSE:
                    self._answers.put(message)
        except (OSError, ValueError, EOFError, KeyError):
            return
        finally:
            self._answers.end()

    def _listen(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            silent_s = time.monotonic() - self._heard_s
            greedy = memory_bytes(self.process.pid) > MAX_MEMORY_BYTES
            if greedy or silent_s > self._silence_s or self.process.poll() is not None:
                _log.warning("the engine's process is gone or silent for %.1f s: killed", silent_s)
                self.process.kill()
                self._on_silence(self)
                return


__all__ = [
    "HEARTBEAT_S",
    "MAX_MEMORY_BYTES",
    "SILENCE_S",
    "START_S",
    "Progress",
    "WorkerSession",
    "memory_bytes",
    "try_open",
]
