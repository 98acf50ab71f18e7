"""A watchdog around one predictor: a call has a deadline.

It is cancelled when it takes too long, given up when it hangs.

The call runs in a thread of its own while the caller waits with a timeout:

    deadline passed       the caller is informed at once; the call goes on
    given up              ``cancel`` (ONNX Runtime stops between operators, OpenVINO cancels its request)
    no reaction to that   a worker process is killed; a predictor in this process is abandoned with its thread

An abandoned thread cannot be ended from outside; it closes its predictor whenever the kernel comes back. Where that is
not good enough, run the artefact in a process of its own (worker.py). It knows neither fallbacks nor frames' meaning.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tinyusfm_runtime.device.machine import pin
from tinyusfm_runtime.errors import EdgeError, EngineError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.results import Prediction

_LOOK_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class CallLimits:
    """How long one call may take, ms from its beginning.

    Attributes:
        deadline_ms: when the caller is informed that it is late.
        give_up_ms: when it is cancelled.
        grace_ms: how long after that it may take to stop.
    """

    deadline_ms: float
    give_up_ms: float
    grace_ms: float = 500.0

    def __post_init__(self) -> None:
        """Checks the order.

        Raises:
            InputError: the limits contradict one another.
        """
        if not 0 < self.deadline_ms <= self.give_up_ms or self.grace_ms <= 0:
            raise InputError("call limits: 0 < deadline_ms <= give_up_ms, and grace_ms above 0")


@runtime_checkable
class Predictor(Protocol):
    """What answers frames: a Session, or a worker process that holds one."""

    @property
    def description(self) -> str:
        """Artefact and engine really used, one line."""
        ...

    def predict(self, frame: Frame) -> Prediction: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class _Job:
    __slots__ = ("done", "error", "frame", "prediction")

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.done = threading.Event()
        self.prediction: Prediction | None = None
        self.error: Exception | None = None


class Watchdog:
    """Calls one predictor from one thread of its own.

    Args:
        predictor: what answers; it stays the owner's, unless its thread has to be abandoned.
        cpus: CPUs the thread is pinned to (Linux), or None.
        owns: ``close`` also closes the predictor.

    Attributes:
        predictor: the same.
        abandoned: True once a call hung; the watchdog then refuses every further one.
    """

    def __init__(self, predictor: Predictor, cpus: Iterable[int] | None = None, *, owns: bool = True) -> None:
        self.predictor = predictor
        self._owns = owns
        self.abandoned = False
        self._cpus = None if cpus is None else frozenset(cpus)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def call(self, frame: Frame, limits: CallLimits, on_miss: Callable[[], None]) -> Prediction:
        """Answers one frame within limits.

        Args:
            frame: what to answer for.
            limits: deadline, giving up, grace.
            on_miss: called in this thread when the deadline has passed without an answer.

        Returns:
            The prediction, late or not.

        Raises:
            FrameError: the frame cannot be used.
            EngineError: the engine raised, took too long, or hung.
        """
        if self.abandoned:
            raise EngineError("the engine hangs in an earlier frame")
        job = self._hand_over(frame)
        if not job.done.wait(limits.deadline_ms / 1e3):
            on_miss()
            if not job.done.wait((limits.give_up_ms - limits.deadline_ms) / 1e3):
                self._stop(job, limits)
        if job.error is not None:
            raise job.error
        if job.prediction is None:
            raise EngineError("the engine gave no answer")
        return job.prediction

    def close(self) -> None:
        """Ends the thread after a call in progress. Idempotent.

        The predictor is closed if it is ours.
        """
        thread, self._thread = self._thread, None
        self._jobs.put(None)
        if self.abandoned:
            return
        while thread is not None and thread.is_alive():
            thread.join(_LOOK_S)
            if self._was_abandoned():  # its caller gave the call in progress up meanwhile
                return
        if self._owns:
            self.predictor.close()

    def _was_abandoned(self) -> bool:
        return self.abandoned

    def _hand_over(self, frame: Frame) -> _Job:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="tinyusfm-engine", daemon=True)
            self._thread.start()
        job = _Job(frame)
        self._jobs.put(job)
        return job

    def _stop(self, job: _Job, limits: CallLimits) -> None:
        late = f"no answer within {limits.give_up_ms:.0f} ms"
        self.predictor.cancel()
        if job.done.wait(limits.grace_ms / 1e3):
            if job.error is not None:
                raise EngineError(f"{late}, cancelled") from job.error
            return
        kill = getattr(self.predictor, "kill", None)
        if kill is not None:
            kill()
            job.done.wait()
            raise EngineError(f"{late}, no reaction to cancelling: its process was killed")
        with self._lock:
            if job.done.is_set():
                return
            self.abandoned = True
            self._jobs.put(None)
        raise EngineError(f"{late}, no reaction to cancelling: it was abandoned")

    def _serve(self) -> None:
        pin(self._cpus)
        while (job := self._jobs.get()) is not None:
            try:
                job.prediction = self.predictor.predict(job.frame)
            except EdgeError as error:
                job.error = error
            except Exception as error:  # an engine of another distribution may raise anything
                job.error = EngineError(f"the engine raised {type(error).__name__}")
                job.error.__cause__ = error
            with self._lock:
                job.done.set()
                gone = self.abandoned
            if gone:
                self.predictor.close()
                return


__all__ = ["CallLimits", "Predictor", "Watchdog"]
