"""Accuracy of a mask model on a labelled split.

Dice, IoU, border distance and circumference error, with intervals over patients.

Frames and masks go through the runtime's own preprocessing, passes and post-processing, so the numbers are those of
live frames, second pass included where the spec asks for one. Masks are compared in the model's input geometry, where
the runtime measures. The model is a callable from input tensor to logits: the PyTorch reference and an artefact in its
engine are scored alike.

Circumference errors are against the *stated* circumference; the label mask's own ellipse is scored beside it, since the
masks of HC18 overstate it. It does not know how the model was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from tinyusfm_edge.data.table import Sample, resize_mask
from tinyusfm_edge.evaluation.bootstrap import Estimate, estimate_mean
from tinyusfm_edge.evaluation.heads import shape_dice
from tinyusfm_edge.evaluation.metrics import hausdorff95, overlap
from tinyusfm_edge.models.checkpoint import LoadedStudent
from tinyusfm_export.verify.reference import reference_mode, run_reference
from tinyusfm_export.verify.thresholds import WRONG_SHARE
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.measure import binary_mask, largest_component, measure_head
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import Placement, preprocess
from tinyusfm_runtime.passes import judged_of, read_outputs
from tinyusfm_runtime.reading import ReadingState, Reason, SecondPassState, judge_all
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec, Task

Runner = Callable[[np.ndarray], np.ndarray]
"""uint8 NCHW input tensor -> float32 logits NKHW."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One labelled frame and the model's answer.

    Attributes:
        sample: the frame, its mask and its circumference.
        tensor: the model's input of the first pass, uint8 NCHW.
        logits: float32 1xKxHxW of the first pass.
        mask_HW: label mask in the input's geometry, uint8 0/1.
        placement: where the frame lies in the input.
    """

    sample: Sample
    tensor: np.ndarray
    logits: np.ndarray
    mask_HW: np.ndarray
    placement: Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageScore:
    """Scores of one frame.

    Attributes:
        sha256: hash of the image file, hex.
        group: patient.
        dice: 0..1.
        iou: 0..1.
        hd95_px: 95 % border distance in input pixels, or None where a mask is empty.
        hd95_mm: the same in mm, or None without a spacing.
        hc_mm: measured circumference, or None (nothing found, or no spacing).
        hc_error_mm: measured minus stated, or None.
        label_error_mm: circumference of the label mask's own ellipse minus stated, or None.
        touches_border: the measured mask touches the border of the image.
        found: there is a mask at all.
        empty_truth: the label mask is empty.
        ellipse_dice: overlap of the reported ellipse (or mask) with the head's own ellipse at the original image's
            size, or None where the table names no ellipse.
        second_pass: what became of the second pass.
        reading: whether to trust it, without a drift statistic; unchecked where the spec has no
            thresholds.
        reasons: what speaks against it.
    """

    sha256: str
    group: str
    dice: float
    iou: float
    hd95_px: float | None
    hd95_mm: float | None
    hc_mm: float | None
    hc_error_mm: float | None
    label_error_mm: float | None
    touches_border: bool
    found: bool
    empty_truth: bool
    ellipse_dice: float | None = None
    second_pass: SecondPassState = SecondPassState.NEVER
    reading: ReadingState = ReadingState.UNCHECKED
    reasons: tuple[Reason, ...] = ()

    def is_off(self) -> bool:
        """The circumference is wrong by more than a tenth."""
        if self.hc_error_mm is None or self.hc_mm is None:
            return False
        return abs(self.hc_error_mm) > WRONG_SHARE * (self.hc_mm - self.hc_error_mm)


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationReport:
    """Scores of a split.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        threshold: probability cut of the mask.
        dice: mean over frames; a frame without a mask counts as it scores.
        iou: the same of intersection over union.
        worst_dice: of a single frame.
        dice_non_empty: Dice over frames whose label mask is not empty, or None.
        hd95_px: mean 95 % border distance in input pixels where both masks exist.
        hd95_mm: the same in mm where the frame has a spacing.
        both_empty: frames where neither label nor answer has a mask; they score Dice 1 (paper: 0).
        paper: scored with the official repository's quirks.
        hc_mae_mm: mean absolute circumference error where both values exist.
        hc_bias_mm: mean signed error, measured minus stated.
        hc_p95_mm: 95th percentile of the absolute error, or None.
        label_bias_mm: mean signed error of the label masks' own ellipses.
        border: fraction of frames whose mask touches the border.
        not_found: frames without any mask.
        images: scores of each frame.
        ellipse_dice: mean overlap of the reported shapes with the heads' own ellipses, or None without those.
        looked_twice: frames that had a second pass, or None where the model never has one.
    """

    split: str
    threshold: float
    dice: Estimate
    iou: Estimate
    worst_dice: float
    dice_non_empty: Estimate | None
    hd95_px: Estimate | None
    hd95_mm: Estimate | None
    both_empty: int
    paper: bool
    hc_mae_mm: Estimate | None
    hc_bias_mm: Estimate | None
    hc_p95_mm: float | None
    label_bias_mm: Estimate | None
    border: float
    not_found: int
    images: tuple[ImageScore, ...]
    ellipse_dice: Estimate | None = None
    looked_twice: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)

    def table(self) -> list[tuple[str, str]]:
        """Rows of (what, value with its 95 % interval)."""
        rows = [
            ("split", f"{self.split}: {self.dice.num_values} frames of {self.dice.num_groups} patients"),
            ("Dice", f"{self.dice.text(4)}, worst {self.worst_dice:.4f}"),
            ("IoU", self.iou.text(4)),
        ]
        if self.ellipse_dice:
            rows.insert(1, ("Dice of the reported shape", f"{self.ellipse_dice.text(4)}, against the head's ellipse"))
        if self.paper:
            rows.insert(1, ("scored", "with the official repository's quirks"))
        if self.dice_non_empty and self.dice_non_empty.num_values < self.dice.num_values:
            rows.append(("Dice where the label is not empty", self.dice_non_empty.text(4)))
            rows.append(("both masks empty", str(self.both_empty)))
        if self.hd95_px:
            rows.append(("HD95, input pixels", self.hd95_px.text(2)))
        if self.hd95_mm:
            rows.append(("HD95, mm", self.hd95_mm.text(2)))
        if self.hc_mae_mm and self.hc_bias_mm:
            rows += [
                ("HC absolute error, mm", f"{self.hc_mae_mm.text(2)}, p95 {self.hc_p95_mm:.2f}"),
                ("HC error, mm", self.hc_bias_mm.text(2, sign=True)),
            ]
        if self.label_bias_mm:
            rows.append(("HC error of the label masks, mm", self.label_bias_mm.text(2, sign=True)))
        if self.looked_twice is not None:
            rows.append(("looked at twice", f"{self.looked_twice} of {self.dice.num_values} frames"))
        if not self.paper and any(image.reading is not ReadingState.UNCHECKED for image in self.images):
            rows.append(("readings", self._readings()))
        return [*rows, ("mask touches the border", f"{self.border:.1%}"), ("no mask found", str(self.not_found))]

    def _readings(self) -> str:
        """How many of each state, and what the doubt was worth."""
        counts = {state: [one for one in self.images if one.reading is state] for state in ReadingState}
        doubted = [one for one in counts[ReadingState.DOUBTFUL] if one.hc_error_mm is not None]
        silent = sum(one.is_off() for one in counts[ReadingState.GOOD])
        text = ", ".join(f"{len(found)} {state.value}" for state, found in counts.items() if found)
        if doubted:
            right = sum(not one.is_off() for one in doubted)
            text += f" ({right} of {len(doubted)} doubtful circumferences are within a tenth)"
        return text + (f"; good, but not within a tenth: {silent}" if silent else "")


def run_cases(run: Runner, spec: ModelSpec, samples: Iterable[Sample]) -> Iterator[Case]:
    """Runs the model on every sample.

    Args:
        run: uint8 NCHW -> logits.
        spec: a segmentation model.
        samples: labelled frames.

    Raises:
        InputError: not a binary segmentation model.
    """
    if spec.task is not Task.SEGMENT or len(spec.labels) != 1:
        raise InputError(f"model {spec.name!r} does not answer with one mask: only binary segmentation is scored here")
    for sample in samples:
        tensor, placement = preprocess(sample.frame, spec.preprocess)
        mask = resize_mask(sample.mask_HW, sample.frame, spec.preprocess)
        yield Case(sample=sample, tensor=tensor, logits=run(tensor), mask_HW=mask, placement=placement)


def score_case(case: Case, run: Runner, spec: ModelSpec, threshold: float, *, paper: bool = False) -> ImageScore:
    """Scores one frame as the runtime would answer it.

    Args:
        case: the frame and the model's logits.
        run: runs the model once more, where the spec asks for a second pass.
        spec: the model's spec.
        threshold: probability cut, 0..1.
        paper: score the bare thresholded mask with the official repository's quirks (methods.md 1.7), in one pass.
    """
    passed = read_outputs(
        {LOGITS_NAME: case.logits}, lambda tensor: {LOGITS_NAME: run(tensor)}, replace(spec, threshold=threshold),
        case.sample.frame, case.tensor, case.placement, second_pass=not paper,
    )  # fmt: skip
    found = passed.answer
    mask = np.zeros_like(case.mask_HW) if found.mask_HW is None else found.mask_HW
    head = found.measurement
    judged = judge_all(judged_of(passed, spec, case.placement, strange=False))
    row, col, height, width = case.placement.box
    label_HW = largest_component(case.mask_HW)[row : row + height, col : col + width]
    label = measure_head(label_HW, case.placement.spacing_mm)
    stated = case.sample.hc_mm
    compared = binary_mask(case.logits, threshold) if paper and found.valid else mask
    dice, iou = overlap(compared, case.mask_HW, paper=paper)
    spacing = case.placement.spacing_mm
    return ImageScore(
        sha256=case.sample.sha256,
        group=case.sample.group,
        dice=dice,
        iou=iou,
        hd95_px=hausdorff95(compared, case.mask_HW, paper=paper),
        hd95_mm=None if spacing is None or paper else hausdorff95(compared, case.mask_HW, spacing),
        hc_mm=head.hc_mm if head else None,
        hc_error_mm=_difference(head.hc_mm, stated) if head else None,
        label_error_mm=_difference(label.hc_mm, stated),
        touches_border=head is not None and head.touches_border,
        found=bool(mask.any()),
        empty_truth=not case.mask_HW.any(),
        ellipse_dice=None if paper else shape_dice(case.sample, head, mask, case.placement),
        second_pass=passed.second_pass,
        reading=judged.state,
        reasons=judged.reasons,
    )


def _difference(value: float | None, stated: float | None) -> float | None:
    return None if value is None or stated is None else value - stated


def summarise(images: Sequence[ImageScore], split: str, threshold: float, *, paper: bool = False) -> SegmentationReport:
    """Makes a report of the frames' scores.

    Args:
        images: at least one.
        split: name of the split.
        threshold: probability cut they were made with.
        paper: they were scored with the official repository's quirks.

    Raises:
        InputError: no images.
    """
    overlaps, iou = _estimate(images, lambda image: image.dice), _estimate(images, lambda image: image.iou)
    if overlaps is None or iou is None:
        raise InputError(f"split {split!r} has no frames to score")
    passes = [image.second_pass for image in images]
    errors = [image.hc_error_mm for image in images if image.hc_error_mm is not None]
    return SegmentationReport(
        split=split,
        threshold=threshold,
        dice=overlaps,
        iou=iou,
        worst_dice=min(image.dice for image in images),
        dice_non_empty=_estimate(images, lambda image: None if image.empty_truth else image.dice),
        hd95_px=_estimate(images, lambda image: image.hd95_px),
        hd95_mm=_estimate(images, lambda image: image.hd95_mm),
        both_empty=sum(image.empty_truth and not image.found for image in images),
        paper=paper,
        hc_mae_mm=_estimate(images, lambda image: None if image.hc_error_mm is None else abs(image.hc_error_mm)),
        hc_bias_mm=_estimate(images, lambda image: image.hc_error_mm),
        hc_p95_mm=float(np.percentile(wide(np.abs(errors)), 95)) if errors else None,
        label_bias_mm=_estimate(images, lambda image: image.label_error_mm),
        border=float(np.mean([image.touches_border for image in images])),
        not_found=sum(not image.found for image in images),
        images=tuple(images),
        ellipse_dice=_estimate(images, lambda image: image.ellipse_dice),
        looked_twice=None if {*passes} == {SecondPassState.NEVER} else passes.count(SecondPassState.DONE),
    )


def _estimate(images: Sequence[ImageScore], value: Callable[[ImageScore], float | None]) -> Estimate | None:
    known = [(found, image.group) for image in images if (found := value(image)) is not None]
    return estimate_mean([found for found, _ in known], [group for _, group in known])


def evaluate_split(run: Runner, spec: ModelSpec, samples: Sequence[Sample], split: str) -> SegmentationReport:
    """Scores a model on labelled frames at the spec's threshold.

    Args:
        run: uint8 NCHW -> logits.
        spec: a binary segmentation model.
        samples: labelled frames.
        split: name of the split, for the report.

    Raises:
        InputError: not a binary segmentation model, or no samples.
    """
    images = [score_case(case, run, spec, spec.threshold) for case in run_cases(run, spec, samples)]
    return summarise(images, split, spec.threshold)


def sweep_thresholds(
    run: Runner,
    spec: ModelSpec,
    samples: Sequence[Sample],
    split: str,
    thresholds: Sequence[float],
    *,
    paper: bool = False,
) -> list[SegmentationReport]:
    """Scores the same logits at several thresholds.

    A second pass is made for each of them, where the spec asks for one.

    Args:
        run: uint8 NCHW -> logits.
        spec: a binary segmentation model.
        samples: labelled frames; never those of the test split.
        split: name of the split.
        thresholds: probability cuts, each in (0, 1).
        paper: score with the official repository's quirks.

    Returns:
        One report a threshold.
    """
    scores: list[list[ImageScore]] = [[] for _ in thresholds]
    for case in run_cases(run, spec, samples):
        for found, threshold in zip(scores, thresholds, strict=True):
            found.append(score_case(case, run, spec, threshold, paper=paper))
    return [
        summarise(found, split, threshold, paper=paper) for found, threshold in zip(scores, thresholds, strict=True)
    ]


def score_student(
    student: LoadedStudent,
    samples: Sequence[Sample],
    split: str,
    thresholds: Sequence[float] = (),
    *,
    paper: bool = False,
) -> list[SegmentationReport]:
    """Scores a student in the PyTorch float32 reference.

    Args:
        student: a binary segmentation student.
        samples: labelled frames.
        split: name of the split, for the report.
        thresholds: probability cuts; none is the spec's own.
        paper: score with the official repository's quirks.

    Returns:
        One report a threshold.

    Raises:
        InputError: not a binary segmentation model, or no samples.
    """
    with reference_mode(student.module):
        run = partial(run_reference, student.module, student.spec)
        cuts = list(thresholds) or [student.spec.threshold]
        return sweep_thresholds(run, student.spec, samples, split, cuts, paper=paper)


def parse_thresholds(text: str) -> list[float]:
    """Numbers with commas between.

    Raises:
        InputError: not numbers, or not between 0 and 1.
    """
    try:
        found = [float(part) for part in text.split(",") if part]
    except ValueError as error:
        raise InputError(f"thresholds {text!r}: give numbers with commas between, such as 0.4,0.5") from error
    if not all(0.0 < value < 1.0 for value in found):
        raise InputError(f"thresholds {text!r}: each must lie between 0 and 1")
    return found


__all__ = [
    "Case",
    "ImageScore",
    "Runner",
    "SegmentationReport",
    "evaluate_split",
    "parse_thresholds",
    "run_cases",
    "score_case",
    "score_student",
    "summarise",
    "sweep_thresholds",
]
