"""Dice, IoU and head circumference error of a segmentation model on a labelled split, with intervals over patients.

``python -m tinyusfm_edge.evaluation.segmentation --student fetal-head --data DIR --split val`` prints a table and
writes JSON. Frames and masks go through the runtime's own preprocessing and post-processing, so the numbers are those
of live frames. Masks are compared in the model's input geometry, where the runtime measures. The model is a callable
from input tensor to logits: the PyTorch reference and an artefact in its engine are scored alike.

Circumference errors are against the *stated* circumference; the label mask's own ellipse is scored beside it, since the
masks of HC18 overstate it. It does not know how the model was made.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_edge.evaluation.bootstrap import Estimate, estimate_mean
from tinyusfm_edge.models.checkpoint import LoadedStudent, load_student_file, write_atomically
from tinyusfm_edge.training.data import Sample, read_table, resize_mask
from tinyusfm_export.reference import reference_mode, run_reference
from tinyusfm_runtime.answer import answer
from tinyusfm_runtime.engine import LOGITS_NAME
from tinyusfm_runtime.errors import EdgeError, InputError
from tinyusfm_runtime.measure import dice, largest_component, measure_head
from tinyusfm_runtime.preprocess import Placement, preprocess
from tinyusfm_runtime.spec import ModelSpec, Task

Runner = Callable[[np.ndarray], np.ndarray]
"""uint8 NCHW input tensor -> float32 logits NKHW."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One labelled frame and the model's answer.

    Attributes:
        sample: the frame, its mask and its circumference.
        logits: float32 1xKxHxW.
        mask_HW: label mask in the input's geometry, uint8 0/1.
        placement: where the frame lies in the input.
    """

    sample: Sample
    logits: np.ndarray
    mask_HW: np.ndarray
    placement: Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageScore:
    """Scores of one frame.

    Attributes:
        sha256: hash of the picture file, hex.
        group: patient.
        dice: 0..1.
        iou: 0..1.
        hc_mm: measured circumference, or None (nothing found, or no spacing).
        hc_error_mm: measured minus stated, or None.
        label_error_mm: circumference of the label mask's own ellipse minus stated, or None.
        touches_border: the measured mask touches the border of the picture.
        found: there is a mask at all.
    """

    sha256: str
    group: str
    dice: float
    iou: float
    hc_mm: float | None
    hc_error_mm: float | None
    label_error_mm: float | None
    touches_border: bool
    found: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationReport:
    """Scores of a split.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        threshold: probability cut of the mask.
        dice: mean over frames; a frame without a mask counts as it scores.
        iou: the same of intersection over union.
        worst_dice: of a single frame.
        hc_mae_mm: mean absolute circumference error where both values exist.
        hc_bias_mm: mean signed error, measured minus stated.
        hc_p95_mm: 95th percentile of the absolute error, or None.
        label_bias_mm: mean signed error of the label masks' own ellipses.
        border: fraction of frames whose mask touches the border.
        not_found: frames without any mask.
        images: scores of each frame.
    """

    split: str
    threshold: float
    dice: Estimate
    iou: Estimate
    worst_dice: float
    hc_mae_mm: Estimate | None
    hc_bias_mm: Estimate | None
    hc_p95_mm: float | None
    label_bias_mm: Estimate | None
    border: float
    not_found: int
    images: tuple[ImageScore, ...]

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
        if self.hc_mae_mm and self.hc_bias_mm:
            rows += [
                ("HC absolute error, mm", f"{self.hc_mae_mm.text(2)}, p95 {self.hc_p95_mm:.2f}"),
                ("HC error, mm", self.hc_bias_mm.text(2, sign=True)),
            ]
        if self.label_bias_mm:
            rows.append(("HC error of the label masks, mm", self.label_bias_mm.text(2, sign=True)))
        return [*rows, ("mask touches the border", f"{self.border:.1%}"), ("no mask found", str(self.not_found))]


def run_cases(run: Runner, spec: ModelSpec, samples: Sequence[Sample]) -> Iterator[Case]:
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
        yield Case(sample=sample, logits=run(tensor), mask_HW=mask, placement=placement)


def score_case(case: Case, spec: ModelSpec, threshold: float) -> ImageScore:
    """Scores one frame as the runtime would answer it.

    Args:
        case: the frame and the model's logits.
        spec: the model's spec.
        threshold: probability cut, 0..1.
    """
    found = answer({LOGITS_NAME: case.logits}, replace(spec, threshold=threshold), case.placement)
    mask = np.zeros_like(case.mask_HW) if found.mask_HW is None else found.mask_HW
    head = found.measurement
    row, col, height, width = case.placement.box
    label_HW = largest_component(case.mask_HW)[row : row + height, col : col + width]
    label = measure_head(label_HW, case.placement.spacing_mm)
    stated = case.sample.hc_mm
    both = int(np.count_nonzero(mask & case.mask_HW))
    either = int(np.count_nonzero(mask | case.mask_HW))
    return ImageScore(
        sha256=case.sample.sha256,
        group=case.sample.group,
        dice=dice(mask, case.mask_HW),
        iou=both / either if either else 1.0,
        hc_mm=head.hc_mm if head else None,
        hc_error_mm=_difference(head.hc_mm, stated) if head else None,
        label_error_mm=_difference(label.hc_mm, stated),
        touches_border=head is not None and head.touches_border,
        found=bool(mask.any()),
    )


def _difference(value: float | None, stated: float | None) -> float | None:
    return None if value is None or stated is None else value - stated


def summarise(images: Sequence[ImageScore], split: str, threshold: float) -> SegmentationReport:
    """Makes a report of the frames' scores.

    Args:
        images: at least one.
        split: name of the split.
        threshold: probability cut they were made with.

    Raises:
        InputError: no images.
    """
    groups = [image.group for image in images]
    overlap = estimate_mean([image.dice for image in images], groups)
    iou = estimate_mean([image.iou for image in images], groups)
    if overlap is None or iou is None:
        raise InputError(f"split {split!r} has no frames to score")
    measured = [(image.hc_error_mm, image.group) for image in images if image.hc_error_mm is not None]
    errors, error_groups = [e for e, _ in measured], [g for _, g in measured]
    labels = [(image.label_error_mm, image.group) for image in images if image.label_error_mm is not None]
    return SegmentationReport(
        split=split,
        threshold=threshold,
        dice=overlap,
        iou=iou,
        worst_dice=min(image.dice for image in images),
        hc_mae_mm=estimate_mean([abs(e) for e in errors], error_groups),
        hc_bias_mm=estimate_mean(errors, error_groups),
        hc_p95_mm=float(np.percentile(np.abs(errors), 95)) if errors else None,
        label_bias_mm=estimate_mean([e for e, _ in labels], [g for _, g in labels]),
        border=float(np.mean([image.touches_border for image in images])),
        not_found=sum(not image.found for image in images),
        images=tuple(images),
    )


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
    images = [score_case(case, spec, spec.threshold) for case in run_cases(run, spec, samples)]
    return summarise(images, split, spec.threshold)


def sweep_thresholds(
    run: Runner, spec: ModelSpec, samples: Sequence[Sample], split: str, thresholds: Sequence[float]
) -> list[SegmentationReport]:
    """Scores the same logits at several thresholds.

    Args:
        run: uint8 NCHW -> logits.
        spec: a binary segmentation model.
        samples: labelled frames; never those of the test split.
        split: name of the split.
        thresholds: probability cuts, each in (0, 1).

    Returns:
        One report a threshold.
    """
    scores: list[list[ImageScore]] = [[] for _ in thresholds]
    for case in run_cases(run, spec, samples):
        for found, threshold in zip(scores, thresholds, strict=True):
            found.append(score_case(case, spec, threshold))
    return [summarise(found, split, threshold) for found, threshold in zip(scores, thresholds, strict=True)]


def score_student(
    student: LoadedStudent, samples: Sequence[Sample], split: str, thresholds: Sequence[float] = ()
) -> list[SegmentationReport]:
    """Scores a student in the PyTorch float32 reference.

    Args:
        student: a binary segmentation student.
        samples: labelled frames.
        split: name of the split, for the report.
        thresholds: probability cuts; none is the spec's own.

    Returns:
        One report a threshold.

    Raises:
        InputError: not a binary segmentation model, or no samples.
    """
    with reference_mode(student.module):
        run = partial(run_reference, student.module, student.spec)
        return sweep_thresholds(run, student.spec, samples, split, list(thresholds) or [student.spec.threshold])


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    from tinyusfm_edge import students

    parser = argparse.ArgumentParser(description="accuracy of a segmentation student on a labelled split")
    parser.add_argument("--student", required=True, help="name of a shipped student, or a student file")
    parser.add_argument("--data", type=Path, required=True, help="folder with split.csv")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--final", action="store_true", help="needed for the test split, which is looked at once")
    parser.add_argument("--thresholds", default="", help="comma-separated cuts to compare, such as 0.4,0.5,0.6")
    parser.add_argument("--limit", type=int, default=None, help="at most this many frames")
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    try:
        if options.split == "test" and (not options.final or options.thresholds):
            raise InputError("the test split is for the final report: give --final, and no --thresholds")
        cuts = parse_thresholds(options.thresholds)
        known = options.student in students.names()
        student = students.load(options.student) if known else load_student_file(options.student)
        samples = read_table(options.data, options.split, limit=options.limit)
        reports = score_student(student, samples, options.split, cuts)
        for report in reports:
            print(f"{student.name} {student.weights_sha256[:12]} threshold {report.threshold:g}")
            print("\n".join(f"  {name:34s}{value}" for name, value in report.table()))
        if options.out is not None:
            text = json.dumps({"weights_sha256": student.weights_sha256, "reports": [r.to_json() for r in reports]})
            write_atomically(options.out, text.encode())
    except EdgeError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


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


if __name__ == "__main__":
    raise SystemExit(main())

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
