"""Sink: one JSON object per line and result.

No pixels, and no file names unless asked for, so it may go into a log.

Keys (schema 4): ``schema kind seq valid verified degraded target precision engine age_ms timings_ms found confidence
reading reasons second_pass drift_status measurement measurements scores live smoothed``, ``drift`` where the frame
was compared with the calibration frames, and ``exit_index`` (from 0, the end is the last) of a classifier with early
exits, ``label`` (the likeliest class) where the classes' names are known, ``name`` (of the file the frame came from)
where names were asked for. ``reading`` is good, doubtful, none or
unchecked, ``reasons`` say why. ``measurement`` is that of a mask's first label, in pixels of the frame and mm, with
its contour; ``measurements`` has all of them where there are several labels, else null. ``kind`` is ``result``;
``live`` is null, or, for a result of the live loop, ``index state stale withheld dropped_since_last level error``.
``measurement`` is always that of this very frame; ``smoothed`` is null, or, where the loop smooths over time, ``hc_mm
held held_ms flicker flicker_smoothed`` (sinks.smoothed): ``held`` says that an older measurement stands in for a
missing one. A withheld answer keeps its line and loses its measurements, scores, confidence and reading. Between
results stand lines of kind ``state``, one per change: ``schema kind seq before after t_ns reason``. Numbers that are
not finite become null. In a loop of several models each has a line of its own for every frame, with two keys more:
``model``, its name, and ``skipped``, null or why a rule left it out; ``index`` and ``age_ms`` are those of the frame,
``live.state`` is the model's. Lines are appended to a file as they come (atomic.RecordFile); those of earlier runs
stay in front. ``-`` writes to standard output.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveResult, Prediction, StateChange
from tinyusfm_runtime.sinks import FileSink, RecordFile, labels_of, likeliest, reading_of, smoothed
from tinyusfm_runtime.strict_json import parse_json

SCHEMA = 4
"""2 had no ``smoothed``; 3 no ``reading``, and measured in pixels of the model's input."""
_ANSWER_KEYS = ("found", "confidence", "reading", "reasons", "measurement", "measurements", "scores")
"""What a withheld answer loses."""
_OF_A_PREDICTION = (
    "valid", "verified", "degraded", "target", "precision", "engine", "age_ms", "timings_ms", "second_pass",
    "drift_status", *_ANSWER_KEYS,
)  # fmt: skip


def available() -> Availability:
    """Always works: standard library only."""
    return Availability(usable=True, reason="standard library only", extra=None)


def open_sink(location: str, *, labels: tuple[str, ...] = ()) -> JsonLinesSink:
    """Opens the file.

    Args:
        location: path of the file, or ``-`` for standard output.
        labels: names of a classifier's classes, so that a line names the likeliest.

    Raises:
        OutputError: it cannot be written.
    """
    return JsonLinesSink(location, labels)


def as_record(prediction: Prediction) -> dict[str, Any]:
    """The line's object for one result."""
    labels = labels_of(prediction)
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
        **reading_of(prediction),
        "measurement": labels[0] if labels else None,
        "measurements": labels if len(labels) > 1 else None,
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
    """The line's object for one result of the live loop.

    The same keys, whatever happened.
    """
    prediction = result.prediction
    record: dict[str, Any] = dict.fromkeys(("schema", "kind", "seq", *_OF_A_PREDICTION))
    if prediction is not None:
        record |= as_record(prediction)
    if result.withheld:
        record |= dict.fromkeys(_ANSWER_KEYS)
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
            "level": result.level,
            "error": result.error,
        },
        "smoothed": smoothed(result),
        **_named(result.frame),
        **({"model": result.model, "skipped": result.skipped} if result.model else {}),
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


class JsonLinesSink(FileSink):
    """Appends lines as they come, each handed to the system at once.

    Changes of state are forced onto the disk.
    """

    def __init__(self, location: str, labels: tuple[str, ...] = ()) -> None:
        self._labels = labels
        self._file = None if location == "-" else RecordFile(location, "the JSON lines file", _is_record)
        self._turn = threading.Lock()

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Appends one result.

        Raises:
            OutputError: no room, or the reader of the pipe went away.
        """
        self._append(as_record(prediction) | likeliest(prediction, self._labels) | _named(frame))

    def write_live(self, result: LiveResult) -> None:
        """Appends one result of the live loop, a line for each model.

        Raises:
            OutputError: no room, or the reader of the pipe went away.
        """
        for each in result.each:
            said = None if each.withheld else each.prediction
            self._append(live_record(each) | likeliest(said, each.labels or self._labels))

    def on_state(self, change: StateChange) -> None:
        """Appends a change of state; one that comes after the end is dropped.

        Raises:
            OutputError: no room, or the reader of the pipe went away.
        """
        if self._file is None or not self._file.closed:
            self._append(state_record(change), sync=True)

    def close(self) -> None:
        """Forces the lines onto the disk.

        Raises:
            OutputError: the disk fails.
        """
        if self._file is not None:
            self._file.close()

    def _append(self, record: dict[str, Any], *, sync: bool = False) -> None:
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._file is not None:
            self._file.append(line.encode("ascii"), sync=sync)
            return
        try:
            # results and states may come from two threads; one call writes the whole line
            with self._turn:
                sys.stdout.write(line)
                sys.stdout.flush()
        except OSError as error:
            raise OutputError(f"cannot write to standard output: {error.strerror or type(error).__name__}") from error


def _named(frame: Frame) -> dict[str, str]:
    return {} if frame.name is None else {"name": frame.name}


def _is_record(line: bytes, complete: bool) -> bool:
    """Whether a first line is one of ours, or the beginning of one.

    Whatever its schema.
    """
    if not complete:
        return line[:11] == b'{"schema": '[: len(line)]
    try:
        found = parse_json(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("schema"), int)


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


__all__ = ["SCHEMA", "JsonLinesSink", "as_record", "available", "live_record", "open_sink", "state_record"]
