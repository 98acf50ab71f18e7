"""What is kept of each result of a file for the summary.

Numbers only, so that hours of frames fit in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_runtime.numerics.order import wide

if TYPE_CHECKING:
    from tinyusfm_runtime.results import DriftReading, LiveResult, Prediction


@dataclass(kw_only=True, slots=True)
class DriftCount:
    """How often frames looked unlike the calibration set."""

    watched: int = 0
    strange: int = 0
    alarms: int = 0
    last: DriftReading | None = None

    def add(self, reading: DriftReading) -> None:
        """Counts the reading of one frame."""
        self.watched += 1
        self.strange += reading.strange
        self.alarms += reading.alarm
        self.last = reading

    def to_json(self) -> dict[str, int]:
        """The counts as plain data."""
        return {"watched": self.watched, "strange": self.strange, "alarms": self.alarms}

    def file_line(self) -> str:
        """What a file's drift comes to, or an empty text where no frame was compared."""
        last = self.last
        if last is None:
            return ""
        text = f"{self.strange} of {self.watched} frames look unlike the calibration set, by {last.kind}"
        if self.alarms:
            return f"{text}; DRIFTED on {self.alarms} frames, last by {last.strangest}: do not rely on what it says"
        if self.watched < last.window:
            return f"{text}; {last.window} frames decide"
        return f"{text}; no alarm"

    def stream_line(self) -> str:
        """The same for a stream, whose alarms were printed when they came."""
        if not self.watched:
            return ""
        alarm = f", DRIFTED on {self.alarms}" if self.alarms else ", no alarm"
        return f"{self.strange} of {self.watched} look unlike the calibration set{alarm}"


@dataclass(kw_only=True, slots=True)
class RunCounts:
    """Counts the results of a file or a stream; a sink among the others."""

    total_ms: list[float] = field(default_factory=list)
    hc_mm: list[float] = field(default_factory=list)
    hc_px: list[float] = field(default_factory=list)
    invalid: int = 0
    measured: int = 0
    at_border: int = 0
    unverified: int = 0
    winners: Counter[int] = field(default_factory=Counter)
    sureness: dict[int, float] = field(default_factory=dict)
    stopped: Counter[int] = field(default_factory=Counter)
    drift: DriftCount = field(default_factory=DriftCount)
    label: str = ""
    found: int = 0
    readings: Counter[str] = field(default_factory=Counter)
    passes: Counter[str] = field(default_factory=Counter)
    unwatched: Counter[str] = field(default_factory=Counter)

    def write_live(self, result: LiveResult) -> None:
        """Counts one result that has a prediction."""
        if result.prediction is not None:
            self.add(result.prediction)

    def add(self, prediction: Prediction) -> None:
        """Counts one prediction."""
        if prediction.drift is not None:
            self.drift.add(prediction.drift)
        self.total_ms.append(prediction.timings.total_ms)
        self.invalid += not prediction.valid
        self.unverified += not prediction.verified
        if prediction.scores is not None:
            best = int(prediction.scores.argmax())
            self.winners[best] += 1
            self.sureness[best] = self.sureness.get(best, 0.0) + float(prediction.scores[best])
        if prediction.exit_index is not None:
            self.stopped[prediction.exit_index] += 1
        self.readings[prediction.reading.value] += 1
        self.passes[prediction.second_pass.value] += 1
        self.unwatched[prediction.drift_status.value] += 1
        measured = prediction.measurement
        if measured is not None:
            self.measured += 1
            self.label = measured.label
            self.found += measured.found
            self.at_border += measured.touches_border
            if measured.found and measured.has_ellipse:
                self.hc_px.append(measured.hc_px)
            if measured.hc_mm is not None:
                self.hc_mm.append(measured.hc_mm)

    def lines(self, description: str, labels: Sequence[str], exits: Sequence[str] = ()) -> list[str]:
        """The summary for people.

        Args:
            description: artefact and engine.
            labels: of the model.
            exits: names of its early exits and of its end, if it has any.
        """
        lines = [f"{'engine':<14}{description}", f"{'frames':<14}{len(self.total_ms)}, {self.invalid} invalid"]
        if self.total_ms:
            p50, p90, p99 = np.percentile(wide(self.total_ms), (50, 90, 99))
            lines.append(f"{'frame to mask':<14}p50 {p50:.1f} ms, p90 {p90:.1f} ms, p99 {p99:.1f} ms")
        lines += self.reading_lines(labels)
        lines += self.check_lines(self.drift.file_line())
        if self.stopped:
            shown = (f"{name} {self.stopped[index]}" for index, name in enumerate(exits))
            lines.append(f"{'answered at':<14}{', '.join(shown)}")
        if self.unverified:
            lines.append(f"{'UNVERIFIED':<14}this artefact passed no gate: do not rely on what it says")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The summary as plain data."""
        times = np.percentile(wide(self.total_ms), (50, 90, 99)) if self.total_ms else ()
        return {
            "frames": len(self.total_ms),
            "invalid": self.invalid,
            "frame_to_mask_ms": {f"p{p}": float(v) for p, v in zip((50, 90, 99), times, strict=False)},
            "measured": self.measured,
            "found": self.found,
            "at_border": self.at_border,
            "readings": dict(self.readings),
            "second_pass": dict(self.passes),
            "drift": self.drift.to_json(),
            "drift_status": dict(self.unwatched),
            "labels": {str(index): count for index, count in self.winners.items()},
            "exits": {str(index): count for index, count in self.stopped.items()},
            "unverified": self.unverified,
            "hc_mm_median": float(np.median(wide(self.hc_mm))) if self.hc_mm else None,
            "hc_px_median": float(np.median(wide(self.hc_px))) if self.hc_px else None,
        }

    def reading_lines(self, labels: Sequence[str] = ()) -> list[str]:
        """What was found and how far it is to be trusted.

        The same lines for files and probes.

        Args:
            labels: of the model.
        """
        lines = [f"{'found':<14}{self._heads()}"] if self.measured else []
        lines += [f"{'reading':<14}{_counted(self.readings)}"] if self.readings else []
        if self.winners and len(labels) > 1:
            shown = (
                f"{labels[index]} {count} (mean probability {self.sureness[index] / count:.2f})"
                for index, count in self.winners.most_common()
            )
            lines.append(f"{'labels':<14}{', '.join(shown)}")
        return lines

    def check_lines(self, drift: str) -> list[str]:
        """What was looked at twice, and what became of the drift check.

        Args:
            drift: what the comparison came to, or an empty text.
        """
        lines = [f"{'second pass':<14}{_counted(self.passes)}"] if self.passes.keys() - {"never"} else []
        if drift or self.unwatched:
            lines.append(f"{'drift':<14}{drift or _counted(self.unwatched)}")
        return lines

    def _heads(self) -> str:
        text = f"{self.label or 'mask'}, {self.found} of {self.measured} frames, {self.at_border} at the border"
        if self.hc_mm:
            low, high = min(self.hc_mm), max(self.hc_mm)
            return f"{text}, HC median {np.median(wide(self.hc_mm)):.1f} mm ({low:.1f} to {high:.1f})"
        if not self.hc_px:
            return text
        return f"{text}, HC median {np.median(wide(self.hc_px)):.0f} pixels of the frame (no spacing)"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
