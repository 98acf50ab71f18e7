"""Parity: how far an artefact's answers lie from the float32 reference's.

Frame by frame and as statistics.

A ``Comparison`` is measured and says nothing about good or bad; gate.py judges it and makes a ``ParityReport``. Both
sides go through the runtime's own post-processing. numpy only: it does not know torch, engines or bundles.

Statistics of a segmentation (S frames; *counted* frames are those whose reference mask covers at least
``min_coverage``, *small* ones the rest):

* ``dice_mean``, ``dice_worst``: over counted frames, of the masks; over several labels their mean.
* ``differing_pixels_worst``: largest share of differing pixels on a small frame.
* ``hc_p95_mm``, ``hc_max_mm``: |HC - reference HC| over counted frames with a spacing; a head that one side does not
  find counts as 0 mm. ``hc_p95_share``: the same as a share of the reference HC, over counted frames without spacing.
* ``same_reading``: share of frames with the same reading (good, doubtful, none), where the model has thresholds.
* ``border_flips``: counted frames where one mask touches the border and the other does not.

Of a classification: ``top1``, ``drift_mean``, ``drift_worst`` (a frame's drift is its largest change of a probability).
With early exits ``top1`` compares the answers that were given, each side stopping by its own rule; the drift is the
largest over all exits, each against the reference's same exit, so that a frame on the edge of a threshold is not
counted as a change of a classifier; ``same_exit`` is the share of frames that stop where the reference stops, and
``full_top1``, ``full_drift_worst`` are those of the answers at the end, as if no exit were taken.
Of features: ``cosine_mean``, ``cosine_worst``. Of all: ``logit_max_abs``, ``logit_mean_abs``,
``logit_share`` (the mean change of a frame's logits as a share of their mean absolute value), ``broken`` (frames with
NaN, infinity or another shape). Percentiles are the next larger sample, never interpolated.

Shapes: NKHW logits, HW masks; 1EK logits of E exits, the classifier at the end last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.early_exit import stop_at
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.measure import dice
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.postprocess import Answer, answer, probabilities
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.passes import Run, read_outputs
from tinyusfm_runtime.reading import ReadingState, judge_answer
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec, PostProcess, Task

PARITY_VERSION = 1
"""Version of the JSON that ``ParityReport.to_json`` writes."""

MIN_COVERAGE = 0.01
"""Share of the image a reference mask must cover for Dice and HC to mean something."""

_Value = float | int | bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """One side's answer to one frame.

    Attributes:
        logits: float32, the output itself; 1EK where the model has early exits.
        answer: what the runtime makes of it.
        mask_HW: uint8 labels of a segmentation, the mask a user sees; None for other tasks or a broken output.
        exit_index: which exit answered, counted from 0, where there are early exits; else None.
        reading: how far a user may trust it.
    """

    logits: np.ndarray
    answer: Answer
    mask_HW: np.ndarray | None
    exit_index: int | None = None
    reading: ReadingState = ReadingState.UNCHECKED


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameParity:
    """One frame's comparison.

    Attributes:
        id: name of the frame.
        counted: True if Dice, HC and the like are judged on it.
        values: name -> number; names as in the module's docstring, without the statistic's suffix.
    """

    id: str
    counted: bool
    values: Mapping[str, _Value]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Measured differences of one artefact.

    Attributes:
        task: what the model answers.
        post: what is made of its logits.
        engine: what ran the artefact, in the engine's own words.
        reference: what it was compared with, in words.
        frames: one entry per frame.
        statistics: name -> number, see the module's docstring; names without a frame to measure on are absent.
        provenance: which frames these were: kind, count, hashes (see gate_frames.py).
    """

    task: Task
    post: PostProcess
    engine: str
    reference: str
    frames: tuple[FrameParity, ...]
    statistics: Mapping[str, float]
    provenance: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateLine:
    """One demand of a gate and what was measured.

    Attributes:
        name: key of the gate.
        text: what is demanded, in words.
        value: measured, or None where there was nothing to measure.
        limit: the threshold.
        passed: whether it holds.
    """

    name: str
    text: str
    value: float | None
    limit: float
    passed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityReport:
    """A judged comparison; true where every demand holds.

    Attributes:
        comparison: what was measured.
        limits: the gate's thresholds, as data.
        lines: the demands that apply to this task.
        notes: what a reader must know, such as demands that had no frame to be judged on.
    """

    comparison: Comparison
    limits: Mapping[str, Any]
    lines: tuple[GateLine, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lines) and all(line.passed for line in self.lines)

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not hold, one phrase each."""
        return tuple(line.text for line in self.lines if not line.passed)

    def summary(self) -> dict[str, Any]:
        """Plain data without the frames' own numbers, for a manifest."""
        return {
            "version": PARITY_VERSION,
            "passed": bool(self),
            "task": self.comparison.task.value,
            "engine": self.comparison.engine,
            "reference": self.comparison.reference,
            "frames": dict(self.comparison.provenance),
            "statistics": dict(self.comparison.statistics),
            "limits": dict(self.limits),
            "failures": list(self.failures),
            "notes": list(self.notes),
        }

    def to_json(self) -> dict[str, Any]:
        """Plain data with one row per frame, ready for ``json.dumps``."""
        rows = [{"id": row.id, "counted": row.counted, **row.values} for row in self.comparison.frames]
        return {**self.summary(), "rows": rows}

    def table(self) -> list[tuple[str, str, str, str]]:
        """Rows (demand, measured, limit, verdict) for people."""
        return [
            (
                line.name,
                "nothing measured" if line.value is None else f"{line.value:.4g}",
                f"{line.limit:.4g}",
                "passed" if line.passed else "MISSED",
            )
            for line in self.lines
        ]


def read_output(
    outputs: Mapping[str, np.ndarray],
    spec: ModelSpec,
    placement: Placement,
    *,
    tensor: np.ndarray | None = None,
    frame: Frame | None = None,
    run: Run | None = None,
) -> Output:
    """Post-processes an output as the runtime does.

    Args:
        outputs: ``logits`` and auxiliary outputs, as an engine or the reference gave them.
        spec: the model.
        placement: where the frame lies in the input.
        tensor: the input; None leaves the field of view out.
        frame: the frame, to look at again where the spec says so; None leaves a second pass out.
        run: runs the model once more.

    Raises:
        EngineError: logits are missing, or of another shape or type than the model's.
    """
    if tensor is None or frame is None or run is None:
        found = answer(outputs, spec, placement, codes_HW=None if tensor is None else tensor[0, 0])
        logits = outputs[LOGITS_NAME]
    else:
        passed = read_outputs(outputs, run, spec, frame, tensor, placement)
        found, logits = passed.answer, passed.logits
    state = judge_answer(found.measurements, found.scores, spec, placement).state
    return Output(logits=logits, answer=found, mask_HW=found.mask_HW, reading=state)


def read_exits(
    logits_1EK: np.ndarray, spec: ModelSpec, placement: Placement, *, exit_index: int | None = None
) -> Output:
    """The answer of a model with early exits, of which all are known.

    Args:
        logits_1EK: float32 logits of every exit.
        spec: the model, whose policy decides where nothing else is said.
        placement: where the frame lies in the input.
        exit_index: the exit that an engine really stopped at, or None.

    Raises:
        EngineError: logits of another shape or type than the model's.
    """
    assert spec.exits is not None
    last = logits_1EK.shape[1] - 1
    finite = bool(np.isfinite(logits_1EK).all())
    if exit_index is None:
        exit_index = stop_at(spec.exits, np.stack([probabilities(row) for row in logits_1EK[0]])) if finite else last
    # one exit that is not finite breaks the whole chain's answer, also where it stopped before
    taken = logits_1EK[:, exit_index] if finite else np.full_like(logits_1EK[:, last], np.nan)
    found = answer({LOGITS_NAME: np.ascontiguousarray(taken)}, spec, placement)
    state = judge_answer(found.measurements, found.scores, spec, placement).state
    return Output(logits=logits_1EK, answer=found, mask_HW=None, exit_index=exit_index, reading=state)


def compare_frame(
    name: str, reference: Output, found: Output, spec: ModelSpec, *, min_coverage: float = MIN_COVERAGE
) -> FrameParity:
    """Compares one frame's answers.

    Args:
        name: name of the frame.
        reference: the float32 reference's answer.
        found: the artefact's.
        spec: the model.
        min_coverage: share of the image from which a reference mask counts.
    """
    counted = True
    values: dict[str, _Value] = {}
    if spec.task is Task.SEGMENT and reference.mask_HW is not None:
        coverage = float(np.count_nonzero(reference.mask_HW)) / reference.mask_HW.size
        values["coverage"], counted = coverage, coverage >= min_coverage
    broken = not (found.answer.valid and reference.answer.valid and found.logits.shape == reference.logits.shape)
    values["broken"] = broken
    if broken:
        return FrameParity(id=name, counted=counted, values=values)
    if spec.reading is not None:
        values["same_reading"] = found.reading is reference.reading
    distance = np.abs(found.logits.astype(np.float64) - reference.logits)
    values["logit_max_abs"], values["logit_mean_abs"] = float(distance.max()), float(distance.mean())
    values["logit_share"] = float(distance.mean() / max(float(np.abs(reference.logits).mean()), 1e-6))
    if spec.task is Task.SEGMENT:
        values.update(_compare_masks(reference, found))
    elif spec.task is Task.CLASSIFY:
        values.update(_compare_scores(reference, found))
        if found.exit_index is not None:
            values.update(_compare_exits(reference, found))
    else:
        values["cosine"] = cosine(reference.logits, found.logits)
    return FrameParity(id=name, counted=counted, values=values)


def _compare_masks(reference: Output, found: Output) -> dict[str, _Value]:
    assert reference.mask_HW is not None and found.mask_HW is not None
    values: dict[str, _Value] = {
        "dice": label_dice(reference.mask_HW, found.mask_HW),
        "differing_pixels": float(np.mean(reference.mask_HW != found.mask_HW)),
    }
    before, after = reference.answer.measurement, found.answer.measurement
    if before is None or after is None:
        return values
    values["border_reference"], values["border"] = before.touches_border, after.touches_border
    if before.hc_mm is not None or after.hc_mm is not None:
        values["hc_reference_mm"], values["hc_mm"] = before.hc_mm or 0.0, after.hc_mm or 0.0
        values["hc_diff_mm"] = abs((after.hc_mm or 0.0) - (before.hc_mm or 0.0))
    elif before.found:
        # without a spacing: the circumferences in input pixels, as a share of the reference's
        # (a mask too small for an ellipse has none: the whole, where the engine alone has one)
        found_px = after.hc_px if after.found else 0.0
        values["hc_diff_share"] = abs(found_px - before.hc_px) / (before.hc_px or found_px or 1.0)
    return values


def _compare_scores(reference: Output, found: Output) -> dict[str, _Value]:
    before, after = reference.answer.scores, found.answer.scores
    assert before is not None and after is not None
    # one score is the probability of the only label
    same = (before >= 0.5) == (after >= 0.5) if before.size == 1 else before.argmax() == after.argmax()
    return {"top1": bool(np.all(same)), "drift": float(np.abs(before - after).max())}


def _compare_exits(reference: Output, found: Output) -> dict[str, _Value]:
    before_EK, after_EK = (np.stack([probabilities(row) for row in side.logits[0]]) for side in (reference, found))
    drift_E = np.abs(before_EK - after_EK).max(1)
    return {
        "exit_reference": reference.exit_index,
        "exit": found.exit_index,
        "same_exit": reference.exit_index == found.exit_index,
        "drift": float(drift_E.max()),
        "full_top1": bool(before_EK[-1].argmax() == after_EK[-1].argmax()),
        "full_drift": float(drift_E[-1]),
    }


def summarise(
    frames: Sequence[FrameParity], spec: ModelSpec, *, engine: str, reference: str, provenance: Mapping[str, Any]
) -> Comparison:
    """Statistics over frames; see the module's docstring for their names.

    Args:
        frames: one entry per frame.
        spec: the model.
        engine: what ran the artefact, in words.
        reference: what it was compared with, in words.
        provenance: which frames these were.
    """
    counted = [frame for frame in frames if frame.counted]
    small = [frame for frame in frames if not frame.counted]
    statistics: dict[str, float] = {
        "frames": len(frames),
        "counted": len(counted),
        "broken": sum(bool(frame.values["broken"]) for frame in frames),
    }
    _note(statistics, {"logit_max_abs": max}, _column(frames, "logit_max_abs"))
    _note(statistics, {"logit_mean_abs": _mean}, _column(frames, "logit_mean_abs"))
    _note(statistics, {"logit_share": _mean}, _column(frames, "logit_share"))
    if spec.task is Task.SEGMENT:
        _note(statistics, {"dice_mean": _mean, "dice_worst": min}, _column(counted, "dice"))
        _note(statistics, {"differing_pixels_worst": max}, _column(small, "differing_pixels"))
    if spec.task is Task.SEGMENT and spec.postprocess is PostProcess.ELLIPSE_HC:
        in_mm, shares = _column(counted, "hc_diff_mm"), _column(counted, "hc_diff_share")
        _note(statistics, {"hc_mean_mm": _mean, "hc_p95_mm": p95, "hc_max_mm": max, "hc_frames": len}, in_mm)
        _note(statistics, {"hc_p95_share": p95, "hc_share_frames": len}, shares)
        statistics["border_flips"] = sum(f.values.get("border") != f.values.get("border_reference") for f in counted)
    _note(statistics, {"same_reading": _mean}, _column(frames, "same_reading"))
    _note(statistics, {"top1": _mean}, _column(frames, "top1"))
    _note(statistics, {"drift_mean": _mean, "drift_worst": max}, _column(frames, "drift"))
    _note(statistics, {"same_exit": _mean}, _column(frames, "same_exit"))
    _note(statistics, {"full_top1": _mean}, _column(frames, "full_top1"))
    _note(statistics, {"full_drift_worst": max}, _column(frames, "full_drift"))
    _note(statistics, {"cosine_mean": _mean, "cosine_worst": min}, _column(frames, "cosine"))
    return Comparison(
        task=spec.task,
        post=spec.postprocess,
        engine=engine,
        reference=reference,
        frames=tuple(frames),
        statistics=statistics,
        provenance=provenance,
    )


def label_dice(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    """Mean Dice over the labels above 0 that either map holds; 1 if neither holds any.

    Args:
        a_HW: uint8 label map.
        b_HW: uint8 label map.
    """
    labels = sorted((set(np.unique(wide(a_HW)).tolist()) | set(np.unique(wide(b_HW)).tolist())) - {0})
    if not labels:
        return 1.0
    return float(np.mean([dice((a_HW == k).astype(np.uint8), (b_HW == k).astype(np.uint8)) for k in labels]))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two arrays taken as vectors; two zero vectors agree, one disagrees."""
    x, y = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    if norm == 0.0:
        return 1.0 if not x.any() and not y.any() else 0.0
    return float(np.clip(x @ y / norm, -1.0, 1.0))


def p95(samples: Sequence[float]) -> float:
    """95th percentile, the next larger sample where it falls between two."""
    return float(np.percentile(np.asarray(samples, np.float64), 95, method="higher"))


def _mean(samples: Sequence[float]) -> float:
    return float(np.mean(np.asarray(samples, np.float64)))


def _column(frames: Sequence[FrameParity], key: str) -> list[float]:
    found = (frame.values.get(key) for frame in frames)
    return [float(value) for value in found if value is not None]


def _note(statistics: dict[str, float], functions: Mapping[str, Any], samples: list[float]) -> None:
    if samples:
        statistics.update({name: float(function(samples)) for name, function in functions.items()})


__all__ = [
    "MIN_COVERAGE",
    "PARITY_VERSION",
    "Comparison",
    "FrameParity",
    "GateLine",
    "Output",
    "ParityReport",
    "compare_frame",
    "cosine",
    "label_dice",
    "p95",
    "read_exits",
    "read_output",
    "summarise",
]
