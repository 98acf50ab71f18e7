"""Sink: a ring of readings in shared memory.

It is for the program that shows them, in C or Python.
``shm-out:NAME`` writes what ``tinyusfm-run --sink shm-out:NAME`` writes (capi/tue_shm_result.h), one reading a result;
nobody waits for anybody, and a reader takes the newest one (``transport.shm_result.ResultReader``, ``tue_res_newest``).
The ring is made at the first answer, when the size of the mask is known, and again for a larger one. In a loop of
several models each has a ring of its own, NAME-MODEL. A withheld result leaves its flags, without mask and numbers.
"""

from __future__ import annotations

import math
import re
import sys
from types import TracebackType
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.results import LiveResult, Prediction
from tinyusfm_runtime.transport.owned_ring import FOLDER, NAME
from tinyusfm_runtime.transport.shm_result import MAX_SCORES, ResultWriter, RingReading

LEAST_ROOM = 64
"""Bytes for a mask that a ring has at least."""


def available() -> Availability:
    """Works where the system has POSIX shared memory as files, which is Linux."""
    if sys.platform != "linux" or not FOLDER.is_dir():
        return Availability(usable=False, reason="POSIX shared memory is reached through /dev/shm, as Linux has it")
    return Availability(usable=True, reason="POSIX shared memory", extra=None)


def open_sink(location: str) -> RingSink:
    """Names a ring; it is made at the first answer.

    Args:
        location: name of the ring: letters, digits, ``.``, ``_`` and ``-``.

    Raises:
        InputError: the name cannot be used.
    """
    if not NAME.fullmatch(location):
        raise InputError("a ring of readings is named with letters, digits, . _ and -, such as shm-out:readings")
    return RingSink(location)


class RingSink:
    """Writes every result into a ring.

    Args:
        name: of the ring.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._rings: dict[str, tuple[ResultWriter, int]] = {}

    def __enter__(self) -> RingSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, frame: Frame, prediction: Prediction) -> None:
        """Writes one answer.

        Raises:
            OutputError: the ring cannot be made.
        """
        facts: dict[str, Any] = {"degraded": prediction.degraded, "valid": prediction.valid}
        self._put("", RingReading(seq=frame.seq, t_recv_ns=frame.t_recv_ns, **facts, **_answered(prediction)))

    def write_live(self, result: LiveResult) -> None:
        """Writes one result of the live loop, one reading for each model.

        Raises:
            OutputError: the ring cannot be made.
        """
        for each in result.each:
            self._put(each.model, live_reading(each))

    def close(self) -> None:
        """Takes the rings away; idempotent."""
        for ring, _ in self._rings.values():
            ring.close()
        self._rings.clear()

    def _put(self, model: str, made: RingReading) -> None:
        size = 0 if made.mask_HW is None else made.mask_HW.size
        ring, room = self._rings.get(model, (None, 0))
        if ring is None or size > room:
            if ring is not None:
                ring.close()
            name = f"{self._name}-{re.sub('[^A-Za-z0-9._-]', '_', model)}" if model else self._name
            ring, room = ResultWriter(name, max(size, LEAST_ROOM)), max(size, LEAST_ROOM)
            self._rings[model] = (ring, room)
        ring.write(made)


def live_reading(result: LiveResult) -> RingReading:
    """A live result as it stands in a ring.

    Args:
        result: of one model.
    """
    prediction = result.prediction
    facts: dict[str, Any] = {
        "seq": result.frame.seq, "t_recv_ns": result.frame.t_recv_ns, "state": result.state.value,
        "stale": result.stale, "withheld": result.withheld, "degraded": result.degraded, "valid": result.valid,
        "level": result.level, "dropped": result.dropped_since_last,
    }  # fmt: skip
    if prediction is None:
        return RingReading(**facts, answered=False)
    if result.withheld:
        return RingReading(**facts, verified=prediction.verified)
    return RingReading(**facts, **_answered(prediction))


def _answered(prediction: Prediction) -> dict[str, Any]:
    """What an answer says, but for its place in a stream."""
    place, first, scores = prediction.placement, prediction.measurement, prediction.scores
    made: dict[str, Any] = {
        "verified": prediction.verified,
        "found": prediction.found,
        "measured": bool(prediction.measurements),
        "crop": place.crop,
        "box": place.box,
        "frame_size": place.frame_size,
        "mask_HW": prediction.mask_HW,
        "infer_ms": prediction.timings.infer_ms,
        "confidence": _number(prediction.confidence),
        "trust": prediction.reading.value,
        "reasons": tuple(reason.value for reason in prediction.reasons),
        "second_pass": prediction.second_pass.value,
        "drift_status": prediction.drift_status.value,
        "strange": prediction.drift is not None and prediction.drift.strange,
        "exit_index": -1 if prediction.exit_index is None else prediction.exit_index,
        "scores": () if scores is None else tuple(float(x) for x in np.ravel(scores)[:MAX_SCORES]),
    }
    if first is None or not first.found:
        return made
    made |= {"area_px": int(first.area_px + 0.5), "touches_border": first.touches_border}
    made["cut_by_sector"] = first.cut_by_sector
    if first.has_ellipse:
        major_mm, minor_mm = first.axes_mm or (math.nan, math.nan)
        row, column = first.centre_px
        made |= {
            "hc_mm": _number(first.hc_mm), "major_mm": major_mm, "minor_mm": minor_mm, "centre_row": row,
            "centre_column": column, "major_px": first.axes_px[0], "minor_px": first.axes_px[1],
            "angle_deg": first.angle_deg,
        }  # fmt: skip
    return made


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


__all__ = ["LEAST_ROOM", "RingSink", "available", "live_reading", "open_sink"]
