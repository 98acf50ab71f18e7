"""Sink: the audit log, hash-chained JSON lines.

They say what was answered by what, when and how late.

It holds nothing about a patient: no pixels, no file names, no measurement, no free text; only the keys
below. How the chain works, and what it proves, stands in audit_chain.py; ``tinyusfm-edge audit
verify`` checks a file.

Bodies, by ``event``:

* ``open``: ``bundle`` (SHA-256 of its manifest, or null), ``utc``;
* ``models``: in a loop of several models the bundle of each, ``models``: name to SHA-256 of its manifest;
* ``recovered``: ``cut_bytes``, where a killed writer had left half a line;
* ``result``: ``index seq valid stale withheld degraded answered age_ms state level target precision dropped``, and how
  far the answer may be trusted: ``reading`` (good, doubtful, none, unchecked), ``second_pass``, ``drift_status``;
  In a loop of several models there is one for each, with ``model``, its name, and ``skipped``, whether a rule left it
  out;
* ``state``: ``before after seq t_ns``;
* ``close``: ``results dropped utc failed`` (the type of the error that ended the run, or null).

Unlike other sinks it appends to its file and keeps it whatever happens: a run that was killed leaves
a chain whose last line may break off, and the next run cuts that line and says so. Each line is
handed to the system at once, and forced onto the disk every second, at changes of state and at the end.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from tinyusfm_runtime.atomic import SYNC_EVERY_S, fsync_folder, refuse_irregular
from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveResult, Prediction, StateChange
from tinyusfm_runtime.sinks import ModelFacts
from tinyusfm_runtime.sinks.audit.chain import START, record_line, verify_file


def available() -> Availability:
    """Works where files can be locked (POSIX)."""
    try:
        import fcntl  # noqa: F401
    except ImportError:
        return Availability(usable=False, reason="this system cannot lock files", extra=None)
    return Availability(usable=True, reason="standard library only", extra=None)


def open_sink(location: str, *, bundle_id: str | None = None) -> AuditSink:
    """Opens the log for appending; what is there already is verified first.

    Args:
        location: path of the file.
        bundle_id: SHA-256 of the bundle's manifest, or None.

    Raises:
        OutputError: it cannot be written, another run writes it, or what is there does not hold together.
    """
    return AuditSink(location, bundle_id)


class AuditSink:
    """Appends to a chain.

    ``head`` is the hash of the last record, ``records`` how many there are.
    """

    def __init__(self, location: str | Path, bundle_id: str | None) -> None:
        self._lock = threading.Lock()
        self._results = self._dropped = 0
        self._synced = time.monotonic()
        try:
            place = Path(location).resolve()
            if os.path.lexists(place):
                refuse_irregular(place, "the audit log")
            self._fd: int | None = os.open(place, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise OutputError(f"cannot write the audit log: {error.strerror or type(error).__name__}") from error
        try:
            self.records, self.head, cut = self._continue(Path(location))
            self._append({"event": "open", "bundle": bundle_id, "utc": _utc()})
            if cut:
                self._append({"event": "recovered", "cut_bytes": cut})
            self._sync()
            fsync_folder(place.parent)
        except BaseException:
            self._abandon()
            raise

    def __enter__(self) -> AuditSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(None if kind is None else kind.__name__)

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Appends one result from outside the live loop.

        Raises:
            OutputError: no room.
        """
        body = {
            "index": self._results,
            "seq": prediction.seq,
            "valid": prediction.valid,
            "degraded": prediction.degraded,
            "age_ms": prediction.age_ms,
            "target": prediction.target,
            "precision": prediction.precision,
            "answered": True,
            **_trust(prediction),
        }
        self._result(body, 0)

    def on_models(self, models: Sequence[ModelFacts]) -> None:
        """Appends which models answer from here on, and forces it onto the disk.

        Raises:
            OutputError: no room.
        """
        with self._lock:
            if self._fd is not None:
                self._append({"event": "models", "models": {model.name: model.bundle_id for model in models}})
                self._sync()

    def write_live(self, result: LiveResult) -> None:
        """Appends one result of the live loop, a record for each model.

        Raises:
            OutputError: no room.
        """
        for number, each in enumerate(result.each):
            self._write_one(each, dropped=0 if number else each.dropped_since_last)

    def _write_one(self, result: LiveResult, *, dropped: int) -> None:
        prediction = result.prediction
        body = {
            "index": result.index,
            "seq": result.frame.seq,
            "valid": result.valid,
            "degraded": result.degraded,
            "age_ms": result.age_ms,
            "target": None if prediction is None else prediction.target,
            "precision": None if prediction is None else prediction.precision,
            "answered": prediction is not None,
            "stale": result.stale,
            "withheld": result.withheld,
            "state": result.state.value,
            "level": result.level,
            "dropped": result.dropped_since_last,
            **_trust(result.prediction),
            **({"model": result.model, "skipped": result.skipped is not None} if result.model else {}),
        }
        self._result(body, dropped)

    def on_state(self, change: StateChange) -> None:
        """Appends a change of state and forces it onto the disk.

        One that comes after the end is left out.

        Raises:
            OutputError: no room.
        """
        body = {"before": change.before.value, "after": change.after.value, "seq": change.seq, "t_ns": change.t_ns}
        with self._lock:
            if self._fd is not None:
                self._append({"event": "state", **body})
                self._sync()

    def close(self) -> None:
        """Appends the end and forces everything onto the disk.

        Raises:
            OutputError: no room.
        """
        self._end(None)

    def _end(self, failed: str | None) -> None:
        with self._lock:
            if self._fd is None:
                return
            try:
                body = {"results": self._results, "dropped": self._dropped, "utc": _utc(), "failed": failed}
                self._append({"event": "close", **body})
                self._sync()
            finally:
                self._abandon()

    def _result(self, body: dict[str, Any], dropped: int) -> None:
        age_ms = body["age_ms"]
        body["age_ms"] = round(age_ms, 3) if age_ms is not None and math.isfinite(age_ms) else None
        with self._lock:
            if self._fd is None:
                raise OutputError("the audit log is closed")
            self._append({"event": "result", **body})
            self._results += 1
            self._dropped += dropped
            if time.monotonic() - self._synced > SYNC_EVERY_S:
                self._sync()

    def _continue(self, path: Path) -> tuple[int, str, int]:
        """Locks the file and finds the end of its chain.

        Records, head, and bytes of half a line that were cut.
        """
        import fcntl

        assert self._fd is not None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError("cannot write the audit log: another run is writing it") from error
        if os.fstat(self._fd).st_size == 0:
            return 0, START, 0
        report = verify_file(path)
        if report.torn_bytes:
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - report.torn_bytes)
        elif not report:
            raise OutputError(f"cannot go on with this audit log ({report.fault}): keep it and give a new name")
        return report.records, report.head, report.torn_bytes

    def _append(self, body: dict[str, Any]) -> None:
        assert self._fd is not None
        line, digest = record_line(self.records, self.head, body)
        before = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            if written < len(line):
                raise OSError(None, "No space left on device")
        except OSError as error:
            # half a line would end the chain; take it back while that is possible
            os.ftruncate(self._fd, before)
            raise OutputError(f"cannot write the audit log: {error.strerror or type(error).__name__}") from error
        self.records, self.head = self.records + 1, digest

    def _sync(self) -> None:
        assert self._fd is not None
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def _abandon(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _trust(prediction: Prediction | None) -> dict[str, str | None]:
    """States alone: no number of a patient."""
    if prediction is None:
        return {"reading": None, "second_pass": None, "drift_status": None}
    return {
        "reading": prediction.reading.value,
        "second_pass": prediction.second_pass.value,
        "drift_status": prediction.drift_status.value,
    }


def _utc() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


__all__ = ["SYNC_EVERY_S", "AuditSink", "available", "open_sink"]
