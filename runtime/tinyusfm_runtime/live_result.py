"""What a live loop says: states, drops, results and counters, as plain data.

The loop (live.py) makes these, sinks and pages read them. Nothing here runs, waits or knows an engine. All times are
``time.monotonic_ns`` of this machine; a source's own clock stays in the frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyusfm_runtime.frame import Frame
    from tinyusfm_runtime.session import Prediction
    from tinyusfm_runtime.temporal import Reading


class LiveState(str, Enum):
    """How the stream is doing."""

    LIVE = "live"
    """Frames arrive and results are younger than the budget."""
    STALE = "stale"
    """Frames are late, or results are older than the budget: what is shown is not what the probe sees now."""
    FROZEN = "frozen"
    """The link lives (keep-alives, heartbeat or identical pixels) but the picture does not change."""
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
        rung: its place in the fallback ladder, 0 is the chosen one.
        degraded: another artefact than the chosen one answered, or the engine missed its deadline.
        error: why there is no prediction, one line without pixels or names, or None.
        reading: what smoothing over time makes of it, where that was asked for; the prediction stays as it was.
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
    rung: int
    degraded: bool
    error: str | None = None
    reading: Reading | None = None

    @classmethod
    def outside_loop(cls, frame: Frame, prediction: Prediction, index: int) -> LiveResult:
        """A prediction that no live loop made, as a result: nothing was dropped, and it is as good as it says."""
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
            rung=0,
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
    """The engine has not answered within its deadline and is still at it."""
    ENGINE_FAILED = "engine_failed"
    """An artefact raised, gave up, hung, or answered what cannot be right."""
    RUNG_CHANGED = "rung_changed"
    """Another artefact answers from the next frame on."""
    ENGINE_BACK = "engine_back"
    """An artefact that had failed passed its golden frames again; it is not used before it is asked for."""
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
        reason: one line for people, without pixels or names.
        seq: sequence number of the frame it concerns, or None.
    """

    kind: LiveEventKind
    t_ns: int
    reason: str
    seq: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveCounters:
    """Where every frame went: ``received == processed + sum(dropped.values()) + sum(rejected.values()) + waiting``.

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
    "DropPolicy",
    "DropReason",
    "LiveCounters",
    "LiveEvent",
    "LiveEventKind",
    "LiveResult",
    "LiveState",
    "StateChange",
]
