"""Sink: one JSON object a line and result. No pixels and no file names, so it may go into a log.

Keys (schema 3): ``schema kind seq valid verified degraded target precision engine age_ms timings_ms
measurement scores live smoothed``, ``drift`` where the stream is watched, and ``exit_index`` (from 0, the end is the
last) of a classifier with early exits. ``kind`` is ``result``; ``live`` is null, or, for a result of the live loop,
``index state stale withheld dropped_since_last rung error``. ``measurement`` is always that of this very frame;
``smoothed`` is null, or, where the loop smooths over time, ``hc_mm held held_ms flicker flicker_smoothed``
(sinks.smoothed): ``held`` says that an older measurement stands in for a missing one. A withheld
answer keeps its line and loses its measurement and scores. Between results stand lines of kind ``state``, one a change:
``schema kind seq before after t_ns reason``. Numbers that are not finite become null. ``-`` writes
to standard output.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, TextIO

import numpy as np

from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live_result import LiveResult, StateChange
from tinyusfm_runtime.plugins import Probe
from tinyusfm_runtime.session import Prediction
from tinyusfm_runtime.sinks import PendingFile, WholeFile, smoothed

SCHEMA = 3
"""2 had no ``smoothed``."""
_OF_A_PREDICTION = (
    "valid", "verified", "degraded", "target", "precision", "engine", "age_ms", "timings_ms", "measurement", "scores",
)  # fmt: skip


def probe() -> Probe:
    """Always works: standard library only."""
    return Probe(works=True, reason="standard library only", extra=None)


def open_sink(location: str) -> JsonLinesSink:
    """Opens the file.

    Args:
        location: path of the file, or ``-`` for standard output.

    Raises:
        OutputError: it cannot be written.
    """
    return JsonLinesSink(location)


def as_record(prediction: Prediction) -> dict[str, Any]:
    """The line's object for one result."""
    record = {
        "schema": SCHEMA,
        "kind": "result",
        "seq": prediction.seq,
        "valid": prediction.valid,
        "verified": prediction.verified,
        "degraded": prediction.degraded,
        "target": prediction.target,
        "precision": prediction.precision,
        "engine": prediction.engine,
        "age_ms": prediction.age_ms,
        "timings_ms": {key.removesuffix("_ms"): value for key, value in asdict(prediction.timings).items()},
        "measurement": prediction.measurement,
        "scores": prediction.scores,
        "live": None,
        "smoothed": None,
    }
    if prediction.drift is not None:
        record["drift"] = prediction.drift.to_json()
    if prediction.exit_index is not None:
        record["exit_index"] = prediction.exit_index
    return {key: _plain(value) for key, value in record.items()}


def live_record(result: LiveResult) -> dict[str, Any]:
    """The line's object for one result of the live loop; the same keys, whatever happened."""
    prediction = result.prediction
    record: dict[str, Any] = dict.fromkeys(("schema", "kind", "seq", *_OF_A_PREDICTION))
    if prediction is not None:
        record |= as_record(prediction)
    if result.withheld:
        record |= {"measurement": None, "scores": None}
    record |= {
        "schema": SCHEMA,
        "kind": "result",
        "seq": result.frame.seq,
        "valid": result.valid,
        "degraded": result.degraded,
        "engine": result.engine,
        "age_ms": result.age_ms,
        "live": {
            "index": result.index,
            "state": result.state.value,
            "stale": result.stale,
            "withheld": result.withheld,
            "dropped_since_last": result.dropped_since_last,
            "rung": result.rung,
            "error": result.error,
        },
        "smoothed": smoothed(result),
    }
    return {key: _plain(value) for key, value in record.items()}


def state_record(change: StateChange) -> dict[str, Any]:
    """The line's object for a change of state."""
    return {
        "schema": SCHEMA,
        "kind": "state",
        "seq": change.seq,
        "before": change.before.value,
        "after": change.after.value,
        "t_ns": change.t_ns,
        "reason": change.reason,
    }


class JsonLinesSink(WholeFile):
    """Writes lines as they come; the file gets its name at the end."""

    def __init__(self, location: str) -> None:
        self._pending = None if location == "-" else PendingFile(location, "the JSON lines file")
        self._lock = threading.Lock()
        self._file: TextIO = sys.stdout
        if self._pending is not None:
            try:
                self._file = self._pending.path.open("w", encoding="utf-8")
            except OSError as error:
                raise self._pending.failed(error) from error

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Appends one result.

        Raises:
            OutputError: no room, or the reader of the pipe went away.
        """
        self._append(as_record(prediction))

    def write_live(self, result: LiveResult) -> None:
        """Appends one result of the live loop.

        Raises:
            OutputError: no room, or the reader of the pipe went away.
        """
        self._append(live_record(result))

    def on_state(self, change: StateChange) -> None:
        """Appends a change of state; one that comes after the end is dropped.

        Raises:
            OutputError: no room, or the reader of the pipe went away.
        """
        if not self._file.closed:
            self._append(state_record(change))

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False) + "\n"
        try:
            # results and states may come from two threads; one call writes the whole line
            with self._lock:
                self._file.write(line)
                if self._pending is None:
                    self._file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Publishes the file.

        Raises:
            OutputError: no room.
        """
        if self._pending is None or self._file.closed:
            return
        try:
            self._file.close()
        except OSError as error:
            raise self._failed(error) from error
        self._pending.publish()

    def _discard(self) -> None:
        if self._pending is not None:
            self._pending.discard()
            self._file.close()

    def _failed(self, error: OSError) -> OutputError:
        if self._pending is None:
            return OutputError(f"cannot write to standard output: {error.strerror or type(error).__name__}")
        return self._pending.failed(error)


def _plain(value: Any) -> Any:
    """Plain data for JSON; what is not finite is None."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


__all__ = ["SCHEMA", "JsonLinesSink", "as_record", "live_record", "open_sink", "probe", "state_record"]
