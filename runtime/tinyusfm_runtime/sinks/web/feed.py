"""What the live page shows, as plain data.

The newest frame with its overlay, the last results, state and drops.

``PageFeed`` is written by the loop and read by a server; each message is one JSON header, a PNG and the
bits of the mask, packed as ``page/live.js`` unpacks them:

    4 bytes  length of the header, little-endian
    header   UTF-8 JSON, schema 4; ``png_bytes`` and ``mask_bytes`` say what follows
    PNG      the frame, grey or RGB, thinned to ``MAX_SIDE`` where it is larger
    mask     one bit a pixel of that image, most significant first; empty where nothing may be shown

Of several models ``frame.models`` lists what each says, with the ``mask_bytes`` of its own; their masks follow one
another.

Writing costs the loop one copy of the frame; whatever packs and compresses runs in the reader's thread. Names and
files of patients are not known here. It knows no server and no browser.

Shapes: HW = rows, columns; HWC = rows, columns, RGB.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tinyusfm_runtime.numerics.preprocess import to_grey
from tinyusfm_runtime.overlay import as_rgb, ellipse_curve, encode_png
from tinyusfm_runtime.results import (
    LiveCounters,
    LiveEvent,
    LiveEventKind,
    LiveResult,
    LiveState,
    Prediction,
    StateChange,
)
from tinyusfm_runtime.sinks import labels_of, reading_of, shown, smoothed

_log = logging.getLogger(__name__)
SCHEMA = 4
"""1 had neither ``frame.smoothed`` nor ``events``; 2 had no ``unshown``; 3 no ``frame.reading``."""
EVENTS = 6
"""Last events that a page lists."""
QUIET = (LiveEventKind.DEADLINE_MISSED, LiveEventKind.OVERLAY_EXPIRED)
"""Events that states and histograms show already, and that would push the others off the list."""
MAX_SIDE = 1024
"""A larger frame is thinned by a whole number until its longer side fits."""
OF_A_LABEL = (
    "label", "found", "reading", "confidence", "area_px", "area_mm2", "box_px", "centroid_px", "contour_px",
    "touches_border",
)  # fmt: skip
"""What a page shows of each label of a mask."""
TREND = 600
"""Results that trend and histograms look back on."""
ELLIPSE_STEPS = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class PageImage:
    """One encoded frame; it is the same for every browser.

    Attributes:
        header: the part of the header that belongs to the frame.
        png: the frame.
        mask: packed bits, empty where no overlay may be shown.
        number: of the result, as this feed counts; a loop that begins again does not begin there.
        age_ms: of the result when it was made.
        made_ns: when that was.
    """

    header: dict[str, Any]
    png: bytes
    mask: bytes
    number: int
    age_ms: float
    made_ns: int


class PageFeed:
    """Newest result and short history. One writer, any number of readers.

    Args:
        title: model and bundle, for people.
        labels: of the model.
        budget_ms: age above which a result is stale, or None.
        overlay_ms: age above which an overlay is taken off.

    Attributes:
        counters: asked for the loop's counters with every message, or None.
        seen: results so far.
        unshown: frames that could not be made into an image.
    """

    def __init__(self, *, title: str, labels: Sequence[str], budget_ms: float | None, overlay_ms: float) -> None:
        self._facts = {"title": title, "budget_ms": budget_ms, "overlay_ms": overlay_ms}
        self._labels = tuple(labels)
        self._lock = threading.Lock()
        self._start_ns = time.monotonic_ns()
        self._newest: tuple[LiveResult, int, int] | None = None
        self._trend: deque[tuple[int, list[float | int | None]]] = deque(maxlen=TREND)
        self._state, self._reason, self._since_ns = LiveState.LOST, "no frame yet", self._start_ns
        self._ended: str | None = None
        self._events: deque[tuple[int, str, str]] = deque(maxlen=EVENTS)
        self.counters: Callable[[], LiveCounters] | None = None
        self.seen = self.unshown = 0
        self._unshown_reason: str | None = None

    def add(self, result: LiveResult) -> None:
        """Takes a result; its pixels are copied, since their owner may fill them again."""
        frame = result.frame
        kept = replace(result, frame=replace(frame, pixels=frame.pixels.copy()))
        now_ns = time.monotonic_ns()
        value, _, _ = reading(result, result.labels or self._labels)
        times = [each.prediction.timings.total_ms for each in result.each if each.prediction is not None]
        point = [
            result.index,
            round((now_ns - self._start_ns) / 1e6),
            None if value is None else round(value, 2),
            _finite(result.age_ms),
            _finite(sum(times)) if times else None,
            int(result.stale) + 2 * int(result.degraded) + 4 * int(not result.valid),
        ]
        with self._lock:
            self._newest = kept, now_ns, self.seen
            self._trend.append((self.seen, point))
            self.seen += 1
            if result.state is not self._state:
                self._go(result.state, "", now_ns)

    def change(self, change: StateChange) -> None:
        """Takes a change of state."""
        with self._lock:
            self._go(change.after, change.reason, change.t_ns)

    def event(self, event: LiveEvent) -> None:
        """Takes an event of the loop.

        Which artefact failed, which one answers from now on.
        """
        if event.kind not in QUIET:
            with self._lock:
                self._events.append((event.t_ns, event.kind.value, event.reason))

    def end(self, reason: str) -> None:
        """Says that nothing more will come."""
        with self._lock:
            self._ended = reason

    def image(self) -> PageImage | None:
        """Encodes the newest frame; None before the first.

        Takes some milliseconds and touches no lock meanwhile.
        """
        with self._lock:
            newest = self._newest
        if newest is None:
            return None
        result, made_ns, number = newest
        return encode(result, made_ns, self._labels, number=number)

    def try_image(self) -> PageImage | None:
        """As ``image``, but a frame that cannot be shown is counted.

        It is reported in every message until another one can be shown.
        """
        try:
            image = self.image()
        except Exception as error:  # whatever it is, the next frame is another one
            with self._lock:
                self.unshown += 1
                self._unshown_reason = type(error).__name__
            _log.warning("a frame cannot be shown on the live page: %s", type(error).__name__)
            return None
        self._unshown_reason = None
        return image

    def message(self, image: PageImage | None, *, after: int, skipped: int = 0) -> tuple[bytes, int]:
        """Packs what one browser is sent.

        Args:
            image: a frame, or None to tell state and history alone.
            after: results of the trend that this browser has had already.
            skipped: frames that this browser was too slow for.

        Returns:
            The message, and what ``after`` is next time.
        """
        now_ns = time.monotonic_ns()
        counters = None if self.counters is None else self.counters()
        with self._lock:
            header: dict[str, Any] = {
                "schema": SCHEMA,
                **self._facts,
                "state": "ended" if self._ended is not None else self._state.value,
                "reason": self._reason if self._ended is None else self._ended,
                "state_ms": round((now_ns - self._since_ns) / 1e6),
                "trend": [point for number, point in self._trend if number >= after],
                "results": self.seen,
                "skipped": skipped,
                "unshown": {"count": self.unshown, "newest": self._unshown_reason},
                "events": [
                    {"kind": kind, "ago_ms": round((now_ns - t_ns) / 1e6), "reason": reason}
                    for t_ns, kind, reason in self._events
                ],
            }
            after = self.seen
        header["counters"] = None if counters is None else _counted(counters)
        header["frame"] = None
        png = mask = b""
        if image is not None:
            age_ms = _finite(image.age_ms + (now_ns - image.made_ns) / 1e6)
            header["frame"] = {**image.header, "age_ms": age_ms}
            png, mask = image.png, image.mask
        header |= {"png_bytes": len(png), "mask_bytes": len(mask)}
        packed = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
        return len(packed).to_bytes(4, "little") + packed + png + mask, after

    def _go(self, state: LiveState, reason: str, now_ns: int) -> None:
        if state is not self._state:
            self._since_ns = now_ns
        self._state, self._reason = state, reason


def encode(result: LiveResult, made_ns: int, labels: Sequence[str], *, number: int = 0) -> PageImage:
    """Encodes one result for browsers.

    Args:
        result: what was answered; its frame is not written to by anybody.
        made_ns: ``time.monotonic_ns`` when it was made.
        labels: of the model.
        number: running number of the image.

    Returns:
        The image.
    """
    frame = result.frame
    thin = -(-max(frame.pixels.shape[:2]) // MAX_SIDE)
    # arrays are thinned, not frames: what is left of a long, narrow one is too small to be a frame
    if frame.pixels.ndim == 2:
        pixels = to_grey(np.ascontiguousarray(frame.pixels[::thin, ::thin]), frame.pixel_format, frame.video_range)
    else:
        pixels = np.ascontiguousarray(as_rgb(frame)[::thin, ::thin])
    said, mask = _said(result, result.labels or labels, thin)
    header = {
        "seq": frame.seq,
        "index": result.index,
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "full": [frame.pixels.shape[1], frame.pixels.shape[0]],
        **said,
    }
    if result.models:
        each = [(one, *_said(one, one.labels, thin)) for one in result.models]
        header["skipped"] = result.skipped
        header["models"] = [
            {**words, "model": one.model, "state": one.state.value, "skipped": one.skipped, "mask_bytes": len(bits)}
            for one, words, bits in each
        ]
        mask = b"".join(bits for _, _, bits in each)
    return PageImage(
        header=header,
        png=encode_png(pixels, level=1),
        mask=mask,
        number=number,
        age_ms=result.age_ms,
        made_ns=made_ns,
    )


def _said(result: LiveResult, labels: Sequence[str], thin: int) -> tuple[dict[str, Any], bytes]:
    """What one model says about a frame, and its mask's bits."""
    prediction = shown(result)
    mask, ellipse = b"", None
    over_time = False
    # a late overlay lies where the head was, not where it is
    if prediction is not None and not result.stale:
        if prediction.mask_HW is not None:
            if result.reading is not None and result.reading.mask_HW is not None:
                prediction, over_time = replace(prediction, mask_HW=result.reading.mask_HW), True
            mask = np.packbits(prediction.mask_on_frame()[::thin, ::thin] > 0).tobytes()
        measured = prediction.measurement
        if measured is not None and measured.found and measured.has_ellipse:
            rows, cols = ellipse_curve(measured, ELLIPSE_STEPS)
            # pixel centres lie at halves on a canvas
            points = np.stack([(cols + 0.5) / thin, (rows + 0.5) / thin], axis=1)
            ellipse = points.round(1).tolist()
    value, unit, name = reading(result, labels)
    return {
        "ellipse": ellipse,
        "value": None if value is None else round(value, 2),
        "unit": unit,
        "name": name,
        **_trust_fields(prediction, labels),
        "valid": result.valid,
        "stale": result.stale,
        "withheld": result.withheld,
        "degraded": result.degraded,
        "verified": result.prediction is None or result.prediction.verified,
        "level": result.level,
        "engine": result.engine,
        "error": result.error,
        "smoothed": _rounded(smoothed(result)),
        "mask_smoothed": bool(mask) and over_time,
    }, mask


def _trust_fields(prediction: Prediction | None, labels: Sequence[str]) -> dict[str, Any]:
    """How far the answer may be trusted; empty where there is none.

    Each label of a mask, and the classes of a classifier.
    """
    if prediction is None:
        unknown = ("found", "confidence", "reading", "second_pass", "drift_status", "none")
        return {**dict.fromkeys(unknown), "reasons": [], "border": False, "labels": [], "classes": []}
    measured, scores = prediction.measurement, prediction.scores
    rows = [{name: _short(trusted[name]) for name in OF_A_LABEL} for trusted in labels_of(prediction)]
    classes = []
    if scores is not None and scores.ndim == 1 and len(scores) == len(labels):
        classes = [[label, round(float(score), 4)] for label, score in zip(labels, scores, strict=True)]
    return {
        **reading_of(prediction),
        "border": measured is not None and measured.touches_border,
        "none": f"no {measured.label or 'mask'}" if measured is not None else None,
        "labels": rows,
        "classes": classes,
    }


def reading(result: LiveResult, labels: Sequence[str]) -> tuple[float | None, str, str]:
    """The one number of a result.

    Circumference, area of a mask's first label, or probability of the likeliest class.

    Args:
        result: what was answered.
        labels: of the model.

    Returns:
        Value, unit and name; the value is None where nothing may be shown.
    """
    prediction = shown(result)
    if prediction is None:
        return None, "", ""
    measured, scores = prediction.measurement, prediction.scores
    if measured is not None and measured.has_ellipse:
        in_mm = measured.hc_mm is not None or prediction.placement.spacing_mm is not None
        value = None if not measured.found else measured.hc_mm if in_mm else measured.hc_px
        return value, "mm" if in_mm else "px", "Head circumference"
    if measured is not None:
        in_mm = prediction.placement.spacing_mm is not None
        value = None if not measured.found else measured.area_mm2 if in_mm else measured.area_px
        return value, "mm\u00b2" if in_mm else "px", f"Area of {measured.label or 'the mask'}"
    if scores is not None and scores.ndim == 1 and len(scores) == len(labels):
        best = int(scores.argmax())
        return 100.0 * float(scores[best]), "%", labels[best]
    return None, "", ""


def _counted(counters: LiveCounters) -> dict[str, Any]:
    return {
        "received": counters.received,
        "processed": counters.processed,
        "dropped": dict(counters.dropped),
        "rejected": dict(counters.rejected),
        "source": dict(counters.source),
        "balanced": counters.balanced,
    }


def _short(value: Any) -> Any:
    """Numbers as they are shown, so that a contour takes few bytes."""
    if isinstance(value, float):
        return round(value, 3)
    return [_short(item) for item in value] if isinstance(value, (list, tuple)) else value


def _rounded(record: dict[str, Any] | None) -> dict[str, Any] | None:
    if record is None:
        return None
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in record.items()}


def _finite(value: float) -> float | None:
    return round(value, 2) if math.isfinite(value) else None


__all__ = [
    "ELLIPSE_STEPS",
    "EVENTS",
    "MAX_SIDE",
    "OF_A_LABEL",
    "QUIET",
    "SCHEMA",
    "TREND",
    "PageFeed",
    "PageImage",
    "encode",
    "reading",
]
