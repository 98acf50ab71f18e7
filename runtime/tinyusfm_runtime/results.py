"""What comes out, as plain data.

Predictions, live results, states, events and counters.

Sessions and the loop (live/loop.py) make these, sinks and pages read them. Nothing here runs, waits or knows an engine.
All times are ``time.monotonic_ns`` of this machine; a source's own clock stays in the frame.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.reading import DriftStatus, Judged, ReadingState, Reason, SecondPassState, judge_all

if TYPE_CHECKING:
    import numpy.typing as npt

    from tinyusfm_runtime.frame import Frame
    from tinyusfm_runtime.numerics.measure import Measurement


@dataclass(frozen=True, kw_only=True, slots=True)
class SmoothedReading:
    """What the last moments say together.

    Attributes:
        mask_HW: uint8 label map after smoothing, or None; the reading's own array.
        hc_mm: median head circumference of the last measurements, mm, or None.
        held: the measurement is an older one that is held.
        held_ms: age of the newest measurement in it, ms.
        flicker: 1 - Dice of this mask and the one before, 0 to 1, before smoothing; None for the first.
        flicker_smoothed: the same after smoothing.
    """

    mask_HW: npt.NDArray[np.uint8] | None
    hc_mm: float | None
    held: bool
    held_ms: float
    flicker: float | None
    flicker_smoothed: float | None


STRANGE_SHARE: Final = 0.5
"""A window with at least this share of strange frames has drifted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftReading:
    """What is known about the stream after one more frame.

    Attributes:
        kind: ``features``, or ``grey levels`` where the artefact gives no features.
        score: of this frame, in nats; infinite where the model's output was not finite.
        threshold: score above which a frame is strange.
        share: share of strange frames in the window, 0..1.
        frames: frames in the window; no decision before it is full.
        window: frames of a full window.
        strangest: feature farthest from the calibration frames on this frame, in words.
    """

    kind: str
    score: float
    threshold: float
    share: float
    frames: int
    window: int
    strangest: str

    @property
    def strange(self) -> bool:
        """Whether this frame lies above the threshold."""
        return self.score > self.threshold

    @property
    def alarm(self) -> bool:
        """Whether the stream has drifted.

        The window is full and at least half of it strange.
        """
        return self.frames == self.window and self.share >= STRANGE_SHARE

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "kind": self.kind,
            "score": self.score if math.isfinite(self.score) else None,
            "threshold": self.threshold,
            "strange": self.strange,
            "share": self.share,
            "frames": self.frames,
            "window": self.window,
            "alarm": self.alarm,
            "strangest": self.strangest,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """How long one prediction took, in ms.

    Attributes:
        preprocess_ms: frame to tensor.
        infer_ms: the engine, first pass.
        postprocess_ms: logits to answer, and whatever is not named here.
        total_ms: all of it and what lies between.
        second_pass_ms: the whole second pass where there was one; part of the total, of no other stage.
        drift_ms: comparing the frame with the calibration frames; part of the total, of no other stage.
    """

    preprocess_ms: float
    infer_ms: float
    postprocess_ms: float
    total_ms: float
    second_pass_ms: float = 0.0
    drift_ms: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a session says about one frame.

    Attributes:
        seq: the frame's running number.
        mask_HW: uint8 label map at the input's size, or None; owned by the prediction.
        placement: where the frame lies in the input.
        scores: float32 class probabilities, or the raw values of a feature model, or None.
        measurements: of a mask, one for each label but the background, in pixels of the frame; else none.
        engine: library, version, device, precision and threads that really answered.
        target: such as ``openvino``.
        precision: such as ``int8``.
        verified: False if the artefact never passed its gate, at export or on this device.
        degraded: True if another artefact than the chosen one answered (never by a session's own doing).
        valid: False if an output was not finite: mask, scores and measurements are then None or none.
        timings: how long it took.
        t_recv_ns: ``time.monotonic_ns`` at the frame's reception, or None.
        age_ms: time from reception to this prediction, or None.
        auxiliary: further outputs of the graph by name.
        drift: how strange the frame is, where it was checked; a monitor adds what it knows of the stream.
        exit_index: of a chain with early exits, which one answered: counted from 0, the end is the last; else None.
        confidence: mean probability inside the first label's mask, or the top probability of a classifier; or None.
        judged: of each measurement, in the same order; of a classifier the one of its answer.
        second_pass: whether the frame was looked at twice.
        drift_status: whether the frame was compared with the calibration frames.
    """

    seq: int
    mask_HW: npt.NDArray[np.uint8] | None
    placement: Placement
    scores: np.ndarray | None
    measurements: tuple[Measurement, ...] = ()
    engine: str
    target: str
    precision: str
    verified: bool
    degraded: bool = False
    valid: bool
    timings: Timings
    t_recv_ns: int | None
    age_ms: float | None
    auxiliary: Mapping[str, np.ndarray]
    drift: DriftReading | None = None
    exit_index: int | None = None
    confidence: float | None = None
    judged: tuple[Judged, ...] = ()
    second_pass: SecondPassState = SecondPassState.NEVER
    drift_status: DriftStatus = DriftStatus.NOT_CHECKED

    @property
    def measurement(self) -> Measurement | None:
        """The measurement of the first label, or None.

        None where the model gives no mask or the answer is not valid.
        """
        return self.measurements[0] if self.measurements else None

    @property
    def found(self) -> bool:
        """Whether the answer holds anything: a label's component, or scores."""
        if self.measurements:
            return any(measured.found for measured in self.measurements)
        return self.valid and self.scores is not None

    @property
    def reading(self) -> ReadingState:
        """How far the answer may be trusted; with several labels doubtful where one is."""
        return judge_all(self.judged).state

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """What speaks against it."""
        return judge_all(self.judged).reasons

    @property
    def mask(self) -> npt.NDArray[np.uint8] | None:
        """The mask on the frame, computed when asked for; None where there is none.

        uint8, rows x columns of the frame.

        ``mask_HW`` is the same mask at the model's input size.
        """
        return None if self.mask_HW is None else self.mask_on_frame()

    def __repr__(self) -> str:
        """What was found, by what, in what time; no arrays."""
        parts = [f"seq={self.seq}", "valid" if self.valid else "NOT VALID"]
        if self.measurement is not None and self.measurement.found:
            hc_mm, hc_px = self.measurement.hc_mm, self.measurement.hc_px
            parts.append(f"head {hc_px:.0f} px" if hc_mm is None else f"head {hc_mm:.1f} mm")
        if self.scores is not None:
            parts.append(f"{self.scores.size} scores")
        if self.mask_HW is not None:
            parts.append("mask")
        parts += [f"{self.target} {self.precision}", f"{self.timings.total_ms:.1f} ms"]
        parts += [text for text, holds in (("not verified", not self.verified), ("degraded", self.degraded)) if holds]
        return f"Prediction({', '.join(parts)})"

    def mask_on_frame(self) -> npt.NDArray[np.uint8]:
        """The mask at the frame's own size, nearest neighbour.

        0 outside the region the model saw.

        Returns:
            uint8, rows x columns of the frame.

        Raises:
            InputError: this prediction has no mask.
        """
        if self.mask_HW is None:
            raise InputError("this prediction has no mask: it is not valid, or the model gives none")
        row, col, height, width = self.placement.crop
        top, left, box_h, box_w = self.placement.box
        # the input pixel in which the centre of a frame pixel falls, in integers
        rows = top + (2 * np.arange(height) + 1) * box_h // (2 * height)
        cols = left + (2 * np.arange(width) + 1) * box_w // (2 * width)
        out = np.zeros(self.placement.frame_size, np.uint8)
        out[row : row + height, col : col + width] = self.mask_HW[rows[:, None], cols]
        return out


class LiveState(str, Enum):
    """How the stream is doing."""

    LIVE = "live"
    """Frames arrive and results are younger than the budget."""
    STALE = "stale"
    """Frames are late, or results are older than the budget: what is shown is not what the probe sees now."""
    FROZEN = "frozen"
    """The link lives (keep-alives, heartbeat or identical pixels) but the image does not change."""
    LOST = "lost"
    """Nothing arrives: the source is gone or being reconnected."""
    DEGRADED = "degraded"
    """Frames arrive and are answered, but not by the artefact that was chosen, or the engine missed its deadline."""


class DropPolicy(str, Enum):
    """What happens to frames that arrive while the engine is busy."""

    NEWEST = "newest"
    """A slot of one: the newest frame wins, older ones are dropped and counted. For probes."""
    LOSSLESS = "lossless"
    """The source waits: every frame is processed. For files."""


class DropReason(str, Enum):
    """Why a received frame was not processed."""

    OVERTAKEN = "overtaken"
    """A newer frame arrived before the engine was free."""
    OUT_OF_ORDER = "out_of_order"
    """Its sequence or source time lies before a frame that was already taken."""
    DUPLICATE = "duplicate"
    """Same sequence number or source time as a frame that was already taken."""
    CLOSING = "closing"
    """The loop was closed before its turn came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveResult:
    """One answered frame and how much it may be trusted now.

    Attributes:
        frame: the frame that was answered.
        prediction: the answer; None where the engine failed, ran out of time, or the frame could not be used.
        index: running number of results, from 0.
        state: state of the loop when the result was made.
        age_ms: from the frame's reception to now, on this machine's monotonic clock.
        stale: older than the budget.
        withheld: stale and, by policy, not to be shown.
        valid: the answer is finite, in time for its policy, and made by a checked artefact.
        dropped_since_last: received frames that were not processed between the last result and this one.
        engine: artefact and engine that really answered, one line.
        level: its place in the fallback order, 0 is the chosen one.
        degraded: another artefact than the chosen one answered, or the engine missed its deadline.
        error: why there is no prediction, one line without pixels or names, or None.
        reading: what smoothing over time makes of it, where that was asked for; the prediction stays as it was.
        model: in a loop of several models, which one this is about; else empty.
        labels: in a loop of several models, those of this one; else none.
        skipped: why a rule left the model out of this frame, one line, or None.
        models: in a loop of several models, one result for each, in the order they were given; else none. The fields
            above are then those of the first, but for ``degraded``, which holds where it does for any.
    """

    frame: Frame
    prediction: Prediction | None
    index: int
    state: LiveState
    age_ms: float
    stale: bool
    withheld: bool
    valid: bool
    dropped_since_last: int
    engine: str
    level: int
    degraded: bool
    error: str | None = None
    reading: SmoothedReading | None = None
    model: str = ""
    labels: tuple[str, ...] = ()
    skipped: str | None = None
    models: tuple[LiveResult, ...] = ()

    @property
    def each(self) -> tuple[LiveResult, ...]:
        """The result of every model; of a loop of one model this result alone."""
        return self.models or (self,)

    def of(self, model: str) -> LiveResult:
        """What one of several models says about the frame.

        Args:
            model: its name in the loop.

        Raises:
            InputError: there is none of that name.
        """
        for result in self.models:
            if result.model == model:
                return result
        there = ", ".join(result.model for result in self.models) or "a single one, without a name"
        raise InputError(f"there is no model {model!r} in this result; there is: {there}")

    def __repr__(self) -> str:
        """State, age and answer; no arrays."""
        parts = [f"index={self.index}", f"seq={self.frame.seq}", self.state.value, f"{self.age_ms:.0f} ms old"]
        flags = (("NOT VALID", not self.valid), ("stale", self.stale), ("withheld", self.withheld))
        parts += [text for text, holds in (*flags, ("degraded", self.degraded)) if holds]
        if self.models:
            said = (f"{one.model}: {one.skipped or one.error or one.prediction}" for one in self.models)
            return f"LiveResult({', '.join(parts)}, {'; '.join(said)})"
        return f"LiveResult({', '.join(parts)}, {self.skipped or self.error or self.prediction})"

    @classmethod
    def outside_loop(cls, frame: Frame, prediction: Prediction, index: int) -> LiveResult:
        """A prediction from outside a live loop, as a result.

        Nothing was dropped, its validity is kept.
        """
        return cls(
            frame=frame,
            prediction=prediction,
            index=index,
            state=LiveState.LIVE,
            age_ms=prediction.age_ms or 0.0,
            stale=False,
            withheld=False,
            valid=prediction.valid,
            dropped_since_last=0,
            engine=prediction.engine,
            level=0,
            degraded=prediction.degraded,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StateChange:
    """The loop went from one state to another.

    Attributes:
        before: the state until now.
        after: the state from now on.
        t_ns: ``time.monotonic_ns`` of the change.
        reason: one line for people, without pixels or names.
        seq: sequence number of the last frame that was seen, or None.
    """

    before: LiveState
    after: LiveState
    t_ns: int
    reason: str
    seq: int | None = None


class LiveEventKind(str, Enum):
    """What else can happen in a loop."""

    OVERLAY_EXPIRED = "overlay_expired"
    """The last result that could be shown is older than the limit: take it off the screen."""
    DEADLINE_MISSED = "deadline_missed"
    """The engine has not answered within its deadline and is still running."""
    ENGINE_FAILED = "engine_failed"
    """An artefact raised, gave up, hung, or answered what cannot be right."""
    LEVEL_CHANGED = "level_changed"
    """Another artefact answers from the next frame on."""
    ENGINE_BACK = "engine_back"
    """An artefact that had failed passed its golden frames again; it is not used before it is asked for."""
    SOURCE = "source"
    """The source says what its connection is at, or refuses something for the first time; the reason is its line."""
    BUNDLE_CHANGED = "bundle_changed"
    """Another bundle answers from the next frame on."""
    BUNDLE_REFUSED = "bundle_refused"
    """Another bundle was not taken, or taken back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveEvent:
    """Something happened that is neither a result nor a state.

    Attributes:
        kind: what it was.
        t_ns: ``time.monotonic_ns`` when it was noticed.
        reason: one line for people, without pixels or names of people or files.
        seq: sequence number of the frame it concerns, or None.
        model: in a loop of several models, the one it concerns, which also begins the reason; or None.
    """

    kind: LiveEventKind
    t_ns: int
    reason: str
    seq: int | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveCounters:
    """Where every frame went.

    ``received == processed + sum(dropped.values()) + sum(rejected.values()) + waiting``

    Attributes:
        received: frames the source delivered.
        processed: frames that became a result.
        dropped: frames that were left out on purpose, by reason.
        rejected: frames that could not be used (wrong type, size, values), by reason.
        waiting: frames in the slot or the queue right now.
        source: the source's own counters (messages refused before they became frames, reconnects and the like).
    """

    received: int = 0
    processed: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=dict)
    waiting: int = 0
    source: Mapping[str, int] = field(default_factory=dict)

    @property
    def balanced(self) -> bool:
        """True if every received frame is accounted for."""
        return self.received == self.processed + sum(self.dropped.values()) + sum(self.rejected.values()) + self.waiting


__all__ = [
    "STRANGE_SHARE",
    "DriftReading",
    "DropPolicy",
    "DropReason",
    "LiveCounters",
    "LiveEvent",
    "LiveEventKind",
    "LiveResult",
    "LiveState",
    "Prediction",
    "SmoothedReading",
    "StateChange",
    "Timings",
]
