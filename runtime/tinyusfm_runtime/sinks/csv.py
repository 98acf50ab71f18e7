"""Sink: a table with one row a result, for spreadsheets and statistics programs. No pixels and no names.

The columns are ``COLUMNS``, always all of them, in this order; the first is the version of the
layout. What does not exist (no spacing, no answer, not from the live loop) is an empty cell, and so
is the reading of a withheld answer. ``hc_mm`` is that of this very frame; the columns from ``smoothed_hc_mm`` on are
filled where the loop smooths over time, and ``held`` says that an older measurement stands in for a missing one.
Decimal points, commas between, RFC 4180.
"""

from __future__ import annotations

import csv
import math
from typing import Any

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live_result import LiveResult
from tinyusfm_runtime.plugins import Probe
from tinyusfm_runtime.session import Prediction
from tinyusfm_runtime.sinks import PendingFile, WholeFile, smoothed

SCHEMA = 2
"""1 ended with ``score``."""
COLUMNS = (
    "schema", "index", "seq", "state", "valid", "verified", "degraded", "stale", "withheld", "age_ms",
    "dropped_since_last", "rung", "target", "precision", "preprocess_ms", "infer_ms", "postprocess_ms", "total_ms",
    "found", "hc_mm", "hc_px", "major_mm", "minor_mm", "touches_border", "label", "score",
    "smoothed_hc_mm", "held", "held_ms", "flicker", "flicker_smoothed",
)  # fmt: skip


def probe() -> Probe:
    """Always works: standard library only."""
    return Probe(works=True, reason="standard library only", extra=None)


def open_sink(location: str, *, labels: tuple[str, ...] = ()) -> CsvSink:
    """Opens the file.

    Args:
        location: path of the file.
        labels: names of a classifier's classes; their index is written where there are none.

    Raises:
        OutputError: it cannot be written.
    """
    return CsvSink(location, labels)


class CsvSink(WholeFile):
    """Writes rows as they come; the file gets its name at the end."""

    def __init__(self, location: str, labels: tuple[str, ...]) -> None:
        self._labels = labels
        self._pending = PendingFile(location, "the CSV file")
        try:
            self._file = self._pending.path.open("w", encoding="utf-8", newline="")
            self._table = csv.writer(self._file)
            self._table.writerow(COLUMNS)
        except OSError as error:
            raise self._pending.failed(error) from error

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Appends one result.

        Raises:
            OutputError: no room.
        """
        self._append(self._cells(prediction))

    def write_live(self, result: LiveResult) -> None:
        """Appends one result of the live loop.

        Raises:
            OutputError: no room.
        """
        cells = {} if result.prediction is None else self._cells(result.prediction, reading=not result.withheld)
        over_time = {
            ("smoothed_hc_mm" if key == "hc_mm" else key): value for key, value in (smoothed(result) or {}).items()
        }
        self._append(
            cells
            | over_time
            | {
                "index": result.index,
                "seq": result.frame.seq,
                "state": result.state.value,
                "valid": result.valid,
                "degraded": result.degraded,
                "stale": result.stale,
                "withheld": result.withheld,
                "age_ms": result.age_ms,
                "dropped_since_last": result.dropped_since_last,
                "rung": result.rung,
            }
        )

    def close(self) -> None:
        """Publishes the file.

        Raises:
            OutputError: no room.
        """
        if self._file.closed:
            return
        try:
            self._file.close()
        except OSError as error:
            raise self._pending.failed(error) from error
        self._pending.publish()

    def _discard(self) -> None:
        self._pending.discard()
        self._file.close()

    def _append(self, cells: dict[str, Any]) -> None:
        cells["schema"] = SCHEMA
        try:
            self._table.writerow([_cell(cells.get(column)) for column in COLUMNS])
        except OSError as error:
            raise self._pending.failed(error) from error

    def _cells(self, prediction: Prediction, *, reading: bool = True) -> dict[str, Any]:
        times = prediction.timings
        cells: dict[str, Any] = {
            "seq": prediction.seq,
            "valid": prediction.valid,
            "verified": prediction.verified,
            "degraded": prediction.degraded,
            "age_ms": prediction.age_ms,
            "target": prediction.target,
            "precision": prediction.precision,
            "preprocess_ms": times.preprocess_ms,
            "infer_ms": times.infer_ms,
            "postprocess_ms": times.postprocess_ms,
            "total_ms": times.total_ms,
        }
        return cells | self._reading(prediction) if reading else cells

    def _reading(self, prediction: Prediction) -> dict[str, Any]:
        cells: dict[str, Any] = {}
        measured, scores = prediction.measurement, prediction.scores
        if measured is not None:
            major_mm, minor_mm = measured.axes_mm or (None, None)
            cells |= {"found": measured.found, "touches_border": measured.touches_border}
            cells |= {"hc_mm": measured.hc_mm, "major_mm": major_mm, "minor_mm": minor_mm}
            cells |= {"hc_px": measured.hc_px if measured.found else None}
        if scores is not None and scores.ndim == 1 and len(self._labels) in (0, len(scores)):
            best = int(scores.argmax())
            cells |= {"label": self._labels[best] if self._labels else best, "score": float(scores[best])}
        return cells


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return value


__all__ = ["COLUMNS", "SCHEMA", "CsvSink", "open_sink", "probe"]
