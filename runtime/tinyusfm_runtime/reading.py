"""Reading: is what was measured good, doubtful, or nothing at all?

Judged by what the model's spec holds: thresholds of confidence and agreement that were calibrated on labelled frames
(reading_rules.py), and plausible sizes and spacings. What else makes a reading doubtful: the mask reaches the edge of
the image or of the field of view, or the frame is strange to the drift statistic. Without thresholds every reading is
``unchecked``, since nobody knows how often it would be wrong; the reasons are reported all the same. Load has no say.

It does not know engines or sessions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from tinyusfm_runtime.spec import ModelSpec, PostProcess, Task

if TYPE_CHECKING:
    import numpy as np

    from tinyusfm_runtime.numerics.measure import Measurement
    from tinyusfm_runtime.numerics.preprocess import Placement


class ReadingState(str, Enum):
    """How far a reading may be trusted."""

    GOOD = "good"
    """Above the thresholds, and nothing speaks against it."""
    DOUBTFUL = "doubtful"
    """Something speaks against it; ``reasons`` says what."""
    NONE = "none"
    """Nothing was found."""
    UNCHECKED = "unchecked"
    """The model has no thresholds for it, or the answer is not valid."""


class Reason(str, Enum):
    """What speaks against a reading."""

    CONFIDENCE = "confidence"
    """The mean probability inside the mask, or the top probability, lies below the threshold."""
    AGREEMENT = "agreement"
    """Mask and ellipse agree less than the threshold."""
    BORDER = "border"
    """The mask reaches the edge of the image."""
    SECTOR = "sector"
    """The edge of the field of view cuts the mask."""
    SIZE = "size"
    """The anatomy is never so small or so large."""
    SPACING = "spacing"
    """No frame of this anatomy has pixels so small or so large."""
    DRIFT = "drift"
    """The frame does not look like those the model was calibrated on."""


class SecondPassState(str, Enum):
    """What became of the second pass."""

    NEVER = "never"
    """The model has none."""
    NOT_NEEDED = "not needed"
    """The first mask is missing, large enough, or as large as the image."""
    DONE = "done"
    """The reading is that of both passes."""
    OFF = "off"
    """It was switched off, or there is no frame to look at again."""


class DriftStatus(str, Enum):
    """Whether a frame was compared with the calibration frames."""

    CHECKED = "checked"
    """It was; the result says how strange it is."""
    NOT_CHECKED = "not checked"
    """The bundle has no statistic, or the check was switched off."""
    NOT_APPLIED = "not applied"
    """The frame is a phantom, which is strange to any statistic of patients."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A reading's state and what speaks against it.

    Attributes:
        state: good, doubtful, none or unchecked.
        reasons: in the order of ``Reason``; none of a good reading.
    """

    state: ReadingState = ReadingState.UNCHECKED
    reasons: tuple[Reason, ...] = ()


def judge_measurement(measured: Measurement, spec: ModelSpec, placement: Placement, *, strange: bool = False) -> Judged:
    """Judges one label's measurement.

    Args:
        measured: of one label.
        spec: the model.
        placement: where the frame lies in the input; gives the frame's spacing.
        strange: whether the drift statistic calls the frame strange.
    """
    rules = None if spec.reading is None else spec.reading.of(measured.label)
    if not measured.found:
        return Judged(ReadingState.UNCHECKED if rules is None else ReadingState.NONE)
    against: list[Reason] = []
    if rules is not None:
        if not (measured.confidence or 0.0) >= rules.confidence:
            against.append(Reason.CONFIDENCE)
        if rules.agreement is not None and not (measured.agreement or 0.0) >= rules.agreement:
            against.append(Reason.AGREEMENT)
    if measured.touches_border:
        against.append(Reason.SECTOR if measured.cut_by_sector else Reason.BORDER)
    against += _implausible(measured, spec, frame_spacing_mm(placement))
    if strange:
        against.append(Reason.DRIFT)
    return _judged(rules is not None, against)


def judge_scores(scores_K: np.ndarray, spec: ModelSpec, *, strange: bool = False) -> Judged:
    """Judges a classifier's answer.

    Its top probability by the threshold of the class that has it.

    Args:
        scores_K: probabilities; of a single label the one for it.
        spec: the model.
        strange: whether the drift statistic calls the frame strange.
    """
    best = int(scores_K.argmax())
    label = spec.labels[best] if best < len(spec.labels) else ""
    rules = None if spec.reading is None else spec.reading.of(label)
    against = [Reason.CONFIDENCE] if rules is not None and not top_probability(scores_K) >= rules.confidence else []
    return _judged(rules is not None, [*against, *([Reason.DRIFT] if strange else [])])


def judge_answer(
    measurements: Sequence[Measurement],
    scores: np.ndarray | None,
    spec: ModelSpec,
    placement: Placement,
    *,
    strange: bool = False,
) -> Judged:
    """Judges a whole answer, a mask's labels or a classifier's scores.

    Args:
        measurements: of a mask's labels.
        scores: probabilities of a classifier, or None.
        spec: the model.
        placement: where the frame lies in the input.
        strange: whether the drift statistic calls the frame strange.
    """
    if scores is not None and spec.task is Task.CLASSIFY:
        return judge_scores(scores, spec, strange=strange)
    return judge_all([judge_measurement(one, spec, placement, strange=strange) for one in measurements])


def judge_all(judged: Sequence[Judged]) -> Judged:
    """The answer's own state out of those of its labels.

    Doubtful where one is, none where all are.
    """
    states = [one.state for one in judged]
    reasons = tuple(reason for reason in Reason if any(reason in one.reasons for one in judged))
    for state in (ReadingState.DOUBTFUL, ReadingState.UNCHECKED, ReadingState.GOOD, ReadingState.NONE):
        if state in states:
            return Judged(state, reasons)
    return Judged()


def top_probability(scores_K: np.ndarray) -> float:
    """Probability of a classifier's answer.

    The largest, of a single label that of yes or of no.
    """
    top = float(scores_K.max())
    return max(top, 1.0 - top) if scores_K.size == 1 else top


def frame_spacing_mm(placement: Placement) -> tuple[float, float] | None:
    """(row, column) spacing of the frame's own pixels, or None."""
    if placement.spacing_mm is None:
        return None
    _, _, height, width = placement.crop
    _, _, box_h, box_w = placement.box
    return placement.spacing_mm[0] * box_h / height, placement.spacing_mm[1] * box_w / width


def _judged(has_rules: bool, against: Sequence[Reason]) -> Judged:
    if not has_rules:
        return Judged(ReadingState.UNCHECKED, tuple(against))
    return Judged(ReadingState.DOUBTFUL if against else ReadingState.GOOD, tuple(against))


def _implausible(measured: Measurement, spec: ModelSpec, spacing_mm: tuple[float, float] | None) -> list[Reason]:
    """A size that the anatomy never has, and a spacing that its frames never have."""
    if spec.anatomy is None or spacing_mm is None:
        return []
    found = []
    low, high = spec.anatomy.size_mm
    size_mm = measured.hc_mm
    if spec.postprocess is not PostProcess.ELLIPSE_HC:
        size_mm = max(measured.box_px[2] * spacing_mm[0], measured.box_px[3] * spacing_mm[1])
    if size_mm is None or not low <= size_mm <= high:
        found.append(Reason.SIZE)
    low, high = spec.anatomy.spacing_mm
    if not all(low <= side <= high for side in spacing_mm):
        found.append(Reason.SPACING)
    return found


def is_judged(spec: ModelSpec) -> bool:
    """Whether a model's readings can be anything but unchecked."""
    return spec.reading is not None and spec.task is not Task.FEATURES


__all__ = [
    "DriftStatus",
    "Judged",
    "ReadingState",
    "Reason",
    "SecondPassState",
    "frame_spacing_mm",
    "is_judged",
    "judge_all",
    "judge_answer",
    "judge_measurement",
    "judge_scores",
    "top_probability",
]
