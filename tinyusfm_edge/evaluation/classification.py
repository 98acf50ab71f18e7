"""Accuracy of a classifier on a labelled split.

Several metrics, each with an interval over patients.

Frames go through the runtime's own preprocessing and its softmax, so the numbers are those of live frames. The model is
a callable from input tensor to logits: the PyTorch reference and an artefact in its engine are scored alike. It does
not know how the model was made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from tinyusfm_edge.data.marks import label_numbers
from tinyusfm_edge.data.table import Sample
from tinyusfm_edge.evaluation.bootstrap import Estimate, estimate_statistic
from tinyusfm_edge.evaluation.metrics import CLASS_METRICS
from tinyusfm_edge.models.checkpoint import LoadedStudent
from tinyusfm_export.verify.reference import reference_mode, run_reference
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.postprocess import probabilities
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import ModelSpec, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameScore:
    """What a classifier said about one frame.

    Attributes:
        sha256: hash of the image file, hex.
        group: patient.
        truth: index of the true class.
        probabilities: one per class, summing to 1.
    """

    sha256: str
    group: str
    truth: int
    probabilities: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationReport:
    """Scores of a split.

    Attributes:
        split: ``train``, ``val`` or ``test``.
        labels: names of the classes.
        metrics: accuracy, balanced accuracy, AUC, F1 and calibration error by name; None where undefined.
        confusion: rows are true classes, columns answers.
        images: what was said about each frame.
    """

    split: str
    labels: tuple[str, ...]
    metrics: dict[str, Estimate | None]
    confusion: tuple[tuple[int, ...], ...]
    images: tuple[FrameScore, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)

    def table(self) -> list[tuple[str, str]]:
        """Rows of (what, value with its 95 % interval)."""
        groups = len({image.group for image in self.images})
        names = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auc": "AUC", "f1": "F1"}
        rows = [("split", f"{self.split}: {len(self.images)} frames of {groups} patients")]
        for key, value in self.metrics.items():
            rows.append((names.get(key, "calibration error"), "undefined" if value is None else value.text(4)))
        for label, counts in zip(self.labels, self.confusion, strict=True):
            counted = ", ".join(f"{name} {count}" for name, count in zip(self.labels, counts, strict=True))
            rows.append((f"true {label}, answered", counted))
        return rows


def score_classifier(
    run: Callable[[np.ndarray], np.ndarray], spec: ModelSpec, samples: Sequence[Sample], split: str
) -> ClassificationReport:
    """Scores a classifier on labelled frames.

    Args:
        run: uint8 NCHW -> float32 logits NK.
        spec: a classifier of at least two classes.
        samples: labelled frames.
        split: name of the split, for the report.

    Raises:
        InputError: no classifier, a label the model does not know, or no samples.
    """
    if spec.task is not Task.CLASSIFY or len(spec.labels) < 2:
        raise InputError(f"model {spec.name!r} does not answer with two or more classes")
    known = label_numbers(spec.labels)
    unknown = sorted({sample.label for sample in samples} - set(known))
    if unknown:
        raise InputError(f"label {unknown[0]!r} is not among the model's: {', '.join(spec.labels)}")
    if not samples:
        raise InputError(f"split {split!r} has no frames to score")
    images = []
    for sample in samples:
        tensor, _ = preprocess(sample.frame, spec.preprocess)
        found = tuple(float(p) for p in probabilities(run(tensor)[0]))
        images.append(
            FrameScore(
                sha256=sample.sha256,
                group=sample.group,
                truth=known[sample.label],
                probabilities=found,
            )
        )
    return summarise_classes(images, spec.labels, split)


def summarise_classes(images: Sequence[FrameScore], labels: tuple[str, ...], split: str) -> ClassificationReport:
    """Makes a report of the frames' scores.

    Args:
        images: at least one.
        labels: names of the classes.
        split: name of the split.
    """
    scores_NK = np.array([image.probabilities for image in images])
    truth_N = np.array([image.truth for image in images])
    groups = [image.group for image in images]

    def over(metric: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray], float]:
        return lambda index: metric(scores_NK[index], truth_N[index])

    metrics = {name: estimate_statistic(over(metric), groups) for name, metric in CLASS_METRICS.items()}
    confusion = np.zeros((len(labels), len(labels)), int)
    np.add.at(confusion, (truth_N, scores_NK.argmax(1)), 1)
    return ClassificationReport(
        split=split,
        labels=labels,
        metrics=metrics,
        confusion=tuple(tuple(int(n) for n in row) for row in confusion),
        images=tuple(images),
    )


def score_class_student(student: LoadedStudent, samples: Sequence[Sample], split: str) -> ClassificationReport:
    """Scores a student in the PyTorch float32 reference.

    Args:
        student: a classifier.
        samples: labelled frames.
        split: name of the split, for the report.

    Raises:
        InputError: no classifier, a label the model does not know, or no samples.
    """
    with reference_mode(student.module):
        run = partial(run_reference, student.module, student.spec)
        return score_classifier(run, student.spec, samples, split)


__all__ = [
    "ClassificationReport",
    "FrameScore",
    "score_class_student",
    "score_classifier",
    "summarise_classes",
]
