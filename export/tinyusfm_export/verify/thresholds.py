"""Thresholds above which a reading is good, calibrated on labelled frames.

They are never written without what they did on those frames.

Of the frames that the float32 reference reads right, at most a twentieth may fall below the threshold of confidence,
and at most a twentieth below that of agreement; so a threshold is the 5 % quantile of right frames, rounded down to a
ten-thousandth. Where more than 1 % of all frames are then called good and are wrong, the quantile rises in steps of 5
% up to a half; where that does not help either there are no thresholds, and readings stay ``unchecked``.

A mask of several labels has a threshold for each; a frame of it is right where all its labels are. Wrong is, of an
ellipse, a circumference more than 10 % off that of the label's own ellipse; of another mask, a Dice below 0.8; of a
classifier, another class; and whatever is found where there is nothing, or not found where there is something. Counts
are of frames; the limit of the rate is the upper end of the exact 95 % interval (Clopper and Pearson 1934).

numpy only. It does not know where truth comes from.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from tinyusfm_export.verify.confidence import Truth
from tinyusfm_export.verify.expected import Expected
from tinyusfm_export.verify.parity import Output
from tinyusfm_runtime.numerics.measure import dice, measure_head
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.reading import ReadingState, judge_answer, top_probability
from tinyusfm_runtime.reading_rules import LabelThresholds, ReadingRates, ReadingRules
from tinyusfm_runtime.spec import ModelSpec, PostProcess, Task

LEAST_FRAMES: Final = 32
"""Labelled frames below which nothing is calibrated."""
QUANTILES: Final = tuple(step / 100 for step in range(5, 55, 5))
MOST_WRONG: Final = 0.01
"""Share of all frames that may be called good and be wrong."""
WRONG_SHARE: Final = 0.10
"""Of the circumference."""
WRONG_DICE: Final = 0.8
_SURE: Final = 0.95


@dataclass(frozen=True, slots=True)
class LabelledPart:
    """What is right of one label of a frame.

    Attributes:
        label: that is judged.
        right: whether its answer is right.
        found: whether there is anything to judge.
        confidence: of the answer, 0..1.
        agreement: of mask and ellipse, 0..1.
    """

    label: str
    right: bool
    found: bool
    confidence: float
    agreement: float = 0.0


@dataclass(frozen=True, slots=True)
class Labelled:
    """One labelled frame.

    Attributes:
        output: the reference's answer.
        placement: where the frame lies in the input.
        parts: one for each label of a mask, or the answer of a classifier.
    """

    output: Output
    placement: Placement
    parts: tuple[LabelledPart, ...]

    @property
    def right(self) -> bool:
        """Whether all of it is."""
        return all(part.right for part in self.parts)


def calibrate_reading(spec: ModelSpec, frames: Expected, groups: Sequence[str] = ()) -> tuple[ReadingRules | None, str]:
    """Finds thresholds.

    Args:
        spec: the model; its own thresholds are not looked at.
        frames: labelled frames with the reference's answers.
        groups: patient of each frame, or nothing.

    Returns:
        The rules, or None with the reason in words.
    """
    if spec.task is Task.FEATURES or not frames.truths:
        return None, "readings stay unchecked: there are no labels to calibrate thresholds on"
    known = [i for i, truth in enumerate(frames.truths) if truth is not None]
    rows = [_labelled(spec, frames.outputs[i], frames.inputs[i][1], frames.truths[i]) for i in known]
    if len(rows) < LEAST_FRAMES:
        return None, f"readings stay unchecked: {len(rows)} labelled frames, at least {LEAST_FRAMES} are needed"
    hashes = [str(frames.provenance.get("pixels_sha256", [""] * len(frames.truths))[i]) for i in known]
    patients = len({groups[i] for i in known if groups[i]}) if groups else 0
    for quantile in QUANTILES:
        thresholds = _thresholds(spec, rows, quantile)
        if not thresholds:
            break
        rates = _rates(spec, thresholds, rows, patients, hashes)
        if rates.good_but_wrong <= MOST_WRONG * rates.frames:
            return ReadingRules(thresholds=thresholds, rates=rates), ""
    return None, "readings stay unchecked: no threshold keeps wrong readings from being called good"


def rejudged(outputs: Sequence[Output], spec: ModelSpec, placements: Sequence[Placement]) -> tuple[Output, ...]:
    """Answers with their readings judged again by a spec's thresholds."""
    return tuple(
        replace(output, reading=_state(output, spec, placement))
        for output, placement in zip(outputs, placements, strict=True)
    )


def upper_limit(count: int, total: int, sure: float = _SURE) -> float:
    """Upper end of the exact interval of a rate (Clopper and Pearson 1934).

    By bisection on the binomial tail.

    Args:
        count: of events.
        total: of trials, at least 1.
        sure: of both sides together, 0..1.
    """
    if count >= total:
        return 1.0
    low, high = count / total, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tail = sum(math.comb(total, k) * middle**k * (1 - middle) ** (total - k) for k in range(count + 1))
        low, high = (middle, high) if tail > (1 - sure) / 2 else (low, middle)
    return high


def _labelled(spec: ModelSpec, output: Output, placement: Placement, truth: Truth) -> Labelled:
    answered = output.answer
    if spec.task is Task.CLASSIFY:
        assert answered.scores is not None
        best = int(answered.scores.argmax()) if answered.scores.size > 1 else int(answered.scores[0] >= 0.5)
        label = spec.labels[min(best, len(spec.labels) - 1)]
        part = LabelledPart(label, best == truth, found=True, confidence=top_probability(answered.scores))
        return Labelled(output, placement, (part,))
    labels_HW = np.asarray(truth)
    parts = []
    read = spec.read_labels[:1] if spec.postprocess is PostProcess.ELLIPSE_HC else spec.read_labels
    for index, label in enumerate(read):
        measured = answered.measurements[index] if index < len(answered.measurements) else None
        truth_HW = labels_HW == index + 1 if len(spec.read_labels) > 1 else labels_HW > 0
        found = measured is not None and measured.found
        there = bool(truth_HW.any())
        right = _is_right(spec, output, placement, truth_HW, index) if found and there else found == there
        confidence = 0.0 if measured is None else measured.confidence or 0.0
        agreement = 0.0 if measured is None else measured.agreement or 0.0
        parts.append(LabelledPart(label, right, found, confidence, agreement))
    return Labelled(output, placement, tuple(parts))


def _is_right(spec: ModelSpec, output: Output, placement: Placement, truth_HW: np.ndarray, index: int) -> bool:
    assert output.mask_HW is not None
    found_HW = output.mask_HW == index + 1 if len(spec.read_labels) > 1 else output.mask_HW > 0
    if spec.postprocess is not PostProcess.ELLIPSE_HC:
        return dice(found_HW, truth_HW) >= WRONG_DICE
    top, left, height, width = placement.box
    label_HW = truth_HW[top : top + height, left : left + width].astype(np.uint8)
    label = measure_head(label_HW, placement.spacing_mm or (1.0, 1.0))
    measured = output.answer.measurements[index]
    if placement.spacing_mm is None or measured.hc_mm is None or label.hc_mm is None:
        return dice(found_HW, truth_HW) >= WRONG_DICE
    return abs(measured.hc_mm - label.hc_mm) <= WRONG_SHARE * label.hc_mm


def _thresholds(spec: ModelSpec, rows: Sequence[Labelled], quantile: float) -> tuple[LabelThresholds, ...]:
    """One for each label that was found and right on any frame."""
    labels = spec.labels if spec.task is Task.CLASSIFY else spec.read_labels
    made = []
    for label in labels:
        right = [part for row in rows for part in row.parts if part.label == label and part.right and part.found]
        if not right:
            continue
        confidence = _quantile([part.confidence for part in right], quantile)
        ellipse = spec.postprocess is PostProcess.ELLIPSE_HC
        agreement = _quantile([part.agreement for part in right], quantile) if ellipse else None
        made.append(LabelThresholds(label=label, confidence=confidence, agreement=agreement))
    return tuple(made)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return math.floor(1e4 * ordered[int(share * len(ordered))]) / 1e4


def _rates(
    spec: ModelSpec,
    thresholds: tuple[LabelThresholds, ...],
    rows: Sequence[Labelled],
    patients: int,
    hashes: Sequence[str],
) -> ReadingRates:
    trial = replace(spec, reading=ReadingRules(thresholds=thresholds, rates=_nothing(len(rows))))
    states = [_state(row.output, trial, row.placement) for row in rows]
    good = [row for row, state in zip(rows, states, strict=True) if state is ReadingState.GOOD]
    doubtful = [row for row, state in zip(rows, states, strict=True) if state is ReadingState.DOUBTFUL]
    wrong = sum(not row.right for row in good)
    return ReadingRates(
        frames=len(rows),
        groups=patients,
        good=len(good),
        doubtful=len(doubtful),
        none=len(rows) - len(good) - len(doubtful),
        wrong=sum(not row.right for row in rows),
        good_but_wrong=wrong,
        doubtful_but_right=sum(row.right for row in doubtful),
        good_but_wrong_limit=upper_limit(wrong, len(rows)),
        wrong_means=_words(spec),
        frames_sha256=hashlib.sha256("".join(hashes).encode("ascii")).hexdigest(),
    )


def _nothing(frames: int) -> ReadingRates:
    return ReadingRates(
        frames=frames, groups=0, good=0, doubtful=0, none=frames, wrong=0, good_but_wrong=0, doubtful_but_right=0,
        good_but_wrong_limit=1.0, wrong_means="",
    )  # fmt: skip


def _state(output: Output, spec: ModelSpec, placement: Placement) -> ReadingState:
    return judge_answer(output.answer.measurements, output.answer.scores, spec, placement).state


def _words(spec: ModelSpec) -> str:
    if spec.task is Task.CLASSIFY:
        return "another class than the label's"
    if spec.postprocess is PostProcess.ELLIPSE_HC:
        return f"circumference more than {WRONG_SHARE:.0%} off the label's ellipse, or found where there is nothing"
    return f"Dice below {WRONG_DICE}, or found where there is nothing"


__all__ = [
    "LEAST_FRAMES",
    "MOST_WRONG",
    "QUANTILES",
    "WRONG_DICE",
    "WRONG_SHARE",
    "Labelled",
    "LabelledPart",
    "calibrate_reading",
    "rejudged",
    "upper_limit",
]
