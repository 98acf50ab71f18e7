"""Sink: a table with one row per result. No pixels.

One more row for each further label of a mask.

The columns are ``COLUMNS``, always all of them, in this order; the first is the version of the layout. What does not
exist (no spacing, no answer, not from the live loop) is an empty cell, and so is the reading of a withheld answer.
``name`` is that of the file the frame came from, empty unless names were asked for. ``contour`` is ``row:column`` of
each point, spaces between. ``probabilities`` are those of a classifier's classes, in their order, spaces between.
Lengths in px are pixels of the frame. ``label`` is that of the mask or the likeliest class, ``reading`` good,
doubtful, none or unchecked. ``hc_mm`` is that of this very frame; the columns from ``smoothed_hc_mm`` on are filled
where the loop smooths over time, and ``held`` says that an older measurement stands in for a missing one. Decimal
points, commas between, RFC 4180. Rows are appended as they come (atomic.RecordFile); those of earlier runs stay in
front, and a file of another layout is refused. In a loop of several models each has rows of its own for every frame,
and two more columns say which it is: ``model``, its name, and ``skipped``, empty or why a rule left it out.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveResult, Prediction
from tinyusfm_runtime.sinks import FileSink, ModelFacts, RecordFile, labels_of, reading_of, smoothed

SCHEMA = 4
"""1 ended with ``score``; 2 had no ``reading``, and measured in pixels of the input; 3 had no ``contour``."""
COLUMNS = (
    "schema", "index", "seq", "state", "valid", "verified", "degraded", "stale", "withheld", "age_ms",
    "dropped_since_last", "level", "target", "precision", "preprocess_ms", "infer_ms", "postprocess_ms", "total_ms",
    "second_pass_ms", "drift_ms", "found", "confidence", "reading", "reasons", "second_pass", "drift_status", "strange",
    "hc_mm", "hc_px", "major_mm", "minor_mm", "agreement", "area_px", "area_mm2", "box_row", "box_col", "box_height",
    "box_width", "centroid_row", "centroid_col", "touches_border", "label", "score",
    "smoothed_hc_mm", "held", "held_ms", "flicker", "flicker_smoothed", "contour", "probabilities", "name",
)  # fmt: skip


OF_SEVERAL = ("model", "skipped")
"""Columns behind the others, where a loop has several models."""
_OF_A_LABEL = (
    "found", "confidence", "reading", "reasons", "hc_mm", "hc_px", "major_mm", "minor_mm", "agreement", "area_px",
    "area_mm2", "box_row", "box_col", "box_height", "box_width", "centroid_row", "centroid_col", "touches_border",
    "label", "contour",
)  # fmt: skip
_LABEL_EMPTY: dict[str, Any] = dict.fromkeys(_OF_A_LABEL)


def available() -> Availability:
    """Always works: standard library only."""
    return Availability(usable=True, reason="standard library only", extra=None)


def open_sink(location: str, *, labels: tuple[str, ...] = ()) -> CsvSink:
    """Opens the file.

    Args:
        location: path of the file.
        labels: names of a classifier's classes; their index is written where there are none.

    Raises:
        OutputError: it cannot be written.
    """
    return CsvSink(location, labels)


class CsvSink(FileSink):
    """Appends rows as they come, each handed to the system at once.

    A file that is empty gets the header first, as soon as it is known whether there are several models.
    """

    def __init__(self, location: str, labels: tuple[str, ...]) -> None:
        self._labels = labels
        self._columns: tuple[str, ...] | None = None
        self._file = RecordFile(location, "the CSV file", self._fits)

    def on_models(self, models: Sequence[ModelFacts]) -> None:
        """Gives the file the columns of several models.

        Raises:
            OutputError: rows of a single model are there already.
        """
        self._begin(several=True)

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Appends one result.

        Raises:
            OutputError: no room.
        """
        self._append(self._cells(prediction) | {"name": frame.name}, prediction)

    def write_live(self, result: LiveResult) -> None:
        """Appends one result of the live loop.

        Raises:
            OutputError: no room.
        """
        for each in result.each:
            self._write_one(each)

    def _write_one(self, result: LiveResult) -> None:
        labels = result.labels or None
        cells = {}
        if result.prediction is not None:
            cells = self._cells(result.prediction, reading=not result.withheld, labels=labels)
        over_time = {
            ("smoothed_hc_mm" if key == "hc_mm" else key): value for key, value in (smoothed(result) or {}).items()
        }
        self._append(
            cells
            | over_time
            | {
                "index": result.index,
                "seq": result.frame.seq,
                "name": result.frame.name,
                "state": result.state.value,
                "valid": result.valid,
                "degraded": result.degraded,
                "stale": result.stale,
                "withheld": result.withheld,
                "age_ms": result.age_ms,
                "dropped_since_last": result.dropped_since_last,
                "level": result.level,
                "model": result.model,
                "skipped": result.skipped,
            },
            None if result.withheld else result.prediction,
        )

    def close(self) -> None:
        """Forces the rows onto the disk.

        Raises:
            OutputError: the disk fails.
        """
        if not self._file.closed:
            self._begin(several=False)
        self._file.close()

    def _fits(self, line: bytes, complete: bool) -> bool:
        """Whether rows of ours may follow a first line, and which columns they have then."""
        for columns in (COLUMNS, (*COLUMNS, *OF_SEVERAL)):
            if _is_header(line, complete, columns):
                self._columns = columns if complete else None
                return True
        return False

    def _begin(self, *, several: bool) -> None:
        if self._columns is None:
            self._columns = (*COLUMNS, *OF_SEVERAL) if several else COLUMNS
            self._file.append(_line(self._columns), sync=True)
        if several and self._columns == COLUMNS:
            raise OutputError("the CSV file there holds rows of a single model: give a new name for those of several")

    def _append(self, cells: dict[str, Any], prediction: Prediction | None) -> None:
        cells["schema"] = SCHEMA
        self._begin(several=bool(cells.get("model")))
        assert self._columns is not None
        labels = [] if prediction is None else labels_of(prediction)
        for row in (cells, *({**cells, **_LABEL_EMPTY, **_label_cells(record)} for record in labels[1:])):
            self._file.append(_line([_cell(row.get(column)) for column in self._columns]))

    def _cells(
        self, prediction: Prediction, *, reading: bool = True, labels: Sequence[str] | None = None
    ) -> dict[str, Any]:
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
            "second_pass_ms": times.second_pass_ms,
            "drift_ms": times.drift_ms,
            "second_pass": prediction.second_pass.value,
            "drift_status": prediction.drift_status.value,
        }
        return cells | self._reading(prediction, self._labels if labels is None else labels) if reading else cells

    def _reading(self, prediction: Prediction, names: Sequence[str]) -> dict[str, Any]:
        record, scores = reading_of(prediction), prediction.scores
        cells: dict[str, Any] = {name: record[name] for name in ("found", "confidence", "reading")}
        cells["reasons"] = " ".join(record["reasons"])
        if prediction.drift is not None:
            cells["strange"] = prediction.drift.strange
        if scores is not None and scores.ndim == 1 and len(names) in (0, len(scores)):
            best = int(scores.argmax())
            cells |= {"label": names[best] if names else best, "score": float(scores[best])}
            cells["probabilities"] = " ".join(f"{float(score):.6g}" for score in scores)
        return cells | (_label_cells(labels_of(prediction)[0]) if prediction.measurements else {})


def _label_cells(record: Mapping[str, Any]) -> dict[str, Any]:
    """Cells of one label of a mask."""
    cells: dict[str, Any] = {name: record[name] for name in ("found", "confidence", "reading", "label")}
    cells |= {"touches_border": record["touches_border"], "reasons": " ".join(record["reasons"])}
    if not record["found"]:
        return cells
    if record["agreement"] is not None:
        major_mm, minor_mm = record["axes_mm"] or (None, None)
        cells |= {"hc_mm": record["hc_mm"], "hc_px": record["hc_px"], "major_mm": major_mm, "minor_mm": minor_mm}
    row, col, height, width = record["box_px"]
    cells |= {"box_row": row, "box_col": col, "box_height": height, "box_width": width}
    cells["centroid_row"], cells["centroid_col"] = record["centroid_px"]
    cells["contour"] = " ".join(f"{row:.6g}:{col:.6g}" for row, col in record["contour_px"])
    return cells | {name: record[name] for name in ("agreement", "area_px", "area_mm2")}


def _line(cells: Sequence[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return text.getvalue().encode()


def _is_header(line: bytes, complete: bool, columns: Sequence[str]) -> bool:
    header = ",".join(columns).encode()
    return line == header if complete else header.startswith(line)


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return value


__all__ = ["COLUMNS", "OF_SEVERAL", "SCHEMA", "CsvSink", "available", "open_sink"]
