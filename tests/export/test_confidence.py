"""Confidence: calibration error, threshold and flicker are what their definitions say, and changes show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyusfm_export.verify.confidence import (
    confidence_drift,
    expected_calibration_error,
    flicker_excess,
    probabilities,
    threshold_shift,
)
from tinyusfm_export.verify.parity import Output, read_output
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

SIDE = 32
MASKS = ModelSpec(
    name="m",
    task=Task.SEGMENT,
    labels=("head",),
    postprocess=PostProcess.MASK,
    preprocess=PreprocessSpec(height=SIDE, width=SIDE),
)
CLASSES = ModelSpec(
    name="c", task=Task.CLASSIFY, labels=("a", "b", "c"), preprocess=PreprocessSpec(height=SIDE, width=SIDE)
)
PLACE = Placement(crop=(0, 0, SIDE, SIDE), box=(0, 0, SIDE, SIDE), spacing_mm=None, frame_size=(SIDE, SIDE))


def mask_output(shift: int = 0, gain: float = 1.0) -> Output:
    rows, cols = np.mgrid[:SIDE, :SIDE]
    logits = (8.0 - np.hypot(rows - 16, cols - 16 - shift)) * gain
    return read_output({"logits": logits.astype(np.float32)[None, None]}, MASKS, PLACE)


def class_output(*logits: float) -> Output:
    return read_output({"logits": np.array([logits], np.float32)}, CLASSES, PLACE)


def test_equal_answers_have_moved_nowhere() -> None:
    side = [mask_output(i) for i in range(4)]
    found = confidence_drift(MASKS, [f"clip#{i}" for i in range(4)], side, side, [side[0].mask_HW] * 4)
    assert found["probability_change"] == found["confidence_shift"] == found["flicker_excess"] == 0.0
    assert abs(found["threshold_shift"]) < 0.02 and found["ece_reference"] == found["ece_artefact"]


def test_a_surer_model_shows_though_its_masks_are_equal() -> None:
    before, after = [mask_output()], [mask_output(gain=4.0)]
    assert before[0].mask_HW is not None and after[0].mask_HW is not None
    assert (before[0].mask_HW == after[0].mask_HW).all()
    found = confidence_drift(MASKS, ["a"], before, after)
    assert found["probability_change"] > 0.01 and found["confidence_shift"] > 0.01
    assert "ece_reference" not in found and "flicker_excess" not in found


def test_the_threshold_that_marks_as_many_pixels() -> None:
    before = [probabilities(mask_output().logits)]
    lifted = read_output({"logits": mask_output().logits + 1.0}, MASKS, PLACE)
    shift = threshold_shift(before, [probabilities(lifted.logits)], 0.5)
    assert shift == pytest.approx(1 / (1 + np.exp(-1.0)) - 0.5, abs=0.02)


def test_a_shaking_artefact_flickers_more_than_the_reference() -> None:
    ids = [f"clip#{i}" for i in range(6)]
    steady, shaking = [mask_output() for _ in ids], [mask_output(3 * (i % 2)) for i in range(6)]
    excess = flicker_excess(ids, steady, shaking, MASKS)
    assert excess is not None and excess > 0.1
    assert flicker_excess(["a", "b"], steady[:2], shaking[:2], MASKS) is None
    assert flicker_excess(["a#1", "b#2"], steady[:2], shaking[:2], MASKS) is None, "two clips are not one"


def test_classes_are_calibrated_against_the_truth() -> None:
    sure, right = [class_output(9, 0, 0), class_output(9, 0, 0)], [0, 1]
    found = confidence_drift(CLASSES, ["a", "b"], [class_output(0.1, 0, 0)] * 2, sure, right)
    assert found["ece_artefact"] == pytest.approx(0.5, abs=0.01)
    assert found["ece_reference"] < 0.25


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_calibration_error_is_a_share(pairs: list[tuple[float, bool]]) -> None:
    sure, right = np.array([p for p, _ in pairs]), np.array([r for _, r in pairs])
    assert 0.0 <= expected_calibration_error(sure, right) <= 1.0
    # confidence 1 where all is right is perfect, where all is wrong as bad as can be
    ones = np.ones(len(pairs))
    assert expected_calibration_error(ones, ones > 0) == 0.0
    assert expected_calibration_error(ones, ones < 0) == 1.0
