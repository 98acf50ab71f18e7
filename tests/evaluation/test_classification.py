"""A classifier's report: an oracle scores perfectly, each fault shows in its own number, patients make the interval."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tinyusfm_edge.data.marks import DEMO_MARK
from tinyusfm_edge.data.table import Sample
from tinyusfm_edge.evaluation.classification import ClassificationReport, score_classifier
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

LABELS = ("benign", "malignant", "normal")
SPEC = ModelSpec(name="oracle", task=Task.CLASSIFY, labels=LABELS, preprocess=PreprocessSpec(height=32, width=32))


def samples() -> list[Sample]:
    """24 images whose brightness tells their class; two a patient."""
    found = []
    for index in range(24):
        truth = index // 2 % 3
        pixels = np.full((40, 40), 50 * (truth + 1), np.uint8)
        found.append(
            Sample(
                id=f"{index}.png",
                group=f"p{index // 2}",
                frame=Frame(pixels=pixels),
                mask_HW=np.zeros((40, 40), np.uint8),
                hc_mm=None,
                sha256=f"{index:064x}",
                label=LABELS[truth],
            )
        )
    return found


def report(change: Callable[[int], int] = lambda k: k, sure: float = 9.0) -> ClassificationReport:
    def run(tensor: np.ndarray) -> np.ndarray:
        logits = np.zeros((1, 3), np.float32)
        logits[0, change(int(tensor.mean()) // 50 - 1)] = sure
        return logits

    return score_classifier(run, SPEC, samples(), "val")


def mean(found: ClassificationReport, name: str) -> float:
    value = found.metrics[name]
    assert value is not None
    return value.mean


def test_an_oracle_scores_perfectly() -> None:
    found = report()
    assert [mean(found, name) for name in ("accuracy", "balanced_accuracy", "auc", "f1")] == [1.0] * 4
    assert mean(found, "ece") < 1e-3
    assert found.confusion == ((8, 0, 0), (0, 8, 0), (0, 0, 8))
    accuracy = found.metrics["accuracy"]
    assert accuracy is not None
    assert (accuracy.num_values, accuracy.num_groups) == (24, 12)


def test_labels_of_a_student_for_demonstrations_are_those_of_the_table() -> None:
    marked = replace(SPEC, labels=tuple(label + DEMO_MARK for label in LABELS))
    sure: Callable[[np.ndarray], np.ndarray] = lambda tensor: np.eye(3, dtype=np.float32)[[1]] * 9  # noqa: E731
    found = score_classifier(sure, marked, samples(), "val")
    assert mean(found, "accuracy") == pytest.approx(1 / 3) and found.labels == marked.labels


def test_each_fault_shows_in_its_own_number() -> None:
    confused = report(lambda k: 0 if k == 1 else k)
    assert mean(confused, "accuracy") == pytest.approx(2 / 3)
    assert confused.confusion[1] == (8, 0, 0)
    shy = report(sure=0.1)
    assert mean(shy, "accuracy") == 1.0
    assert mean(shy, "ece") > 0.5, "right, and far less sure than right"
    assert ("true malignant, answered", "benign 8, malignant 0, normal 0") in confused.table()


def test_report_is_plain_data_without_file_names() -> None:
    text = json.dumps(report().to_json())
    assert "0.png" not in text


def test_what_cannot_be_scored_is_refused() -> None:
    run: Callable[[np.ndarray], np.ndarray] = lambda tensor: np.zeros((1, 3), np.float32)  # noqa: E731
    with pytest.raises(InputError, match="two or more classes"):
        score_classifier(run, replace(SPEC, task=Task.FEATURES), samples(), "val")
    with pytest.raises(InputError, match="not among the model's"):
        score_classifier(run, replace(SPEC, labels=LABELS[:2]), samples(), "val")
    with pytest.raises(InputError, match="no frames"):
        score_classifier(run, SPEC, [], "val")
