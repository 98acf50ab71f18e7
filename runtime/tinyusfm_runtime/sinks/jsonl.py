"""Sink: one JSON object a line and result. No pixels and no file names, so it may go into a log.

Keys (schema 1): ``schema seq valid verified degraded target precision engine age_ms timings_ms
measurement scores``, and
``drift`` where the stream is watched. Numbers that are not finite become null. ``-`` writes to standard output.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.plugins import Probe
from tinyusfm_runtime.session import Prediction
from tinyusfm_runtime.sinks import PendingFile, wants_file

SCHEMA = 1


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
    }
    if prediction.drift is not None:
        record["drift"] = prediction.drift.to_json()
    return {key: _plain(value) for key, value in record.items()}


class JsonLinesSink:
    """Writes lines as they come; the file gets its name at the end."""

    def __init__(self, location: str) -> None:
        self._pending = None if location == "-" else PendingFile(location, "the JSON lines file")
        self._file: TextIO = sys.stdout
        if self._pending is not None:
            try:
                self._file = self._pending.path.open("w", encoding="utf-8")
            except OSError as error:
                raise self._pending.failed(error) from error

    def __enter__(self) -> JsonLinesSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if wants_file(error):
            self.close()
        elif self._pending is not None:
            self._pending.discard()
            self._file.close()

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Appends one result.

        Raises:
            OutputError: no room, or the reader of the pipe went away.
        """
        try:
            self._file.write(json.dumps(as_record(prediction), allow_nan=False) + "\n")
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


__all__ = ["SCHEMA", "JsonLinesSink", "as_record", "open_sink", "probe"]
