"""Logits become masks, measurements or scores by the model's own post-processing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import SIDE, tiny_spec
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.postprocess import answer, probabilities
from tinyusfm_runtime.numerics.preprocess import place
from tinyusfm_runtime.spec import AspectPolicy, ModelSpec, PostProcess, PreprocessSpec, Task


def task_answer(spec: ModelSpec, logits: np.ndarray) -> Any:
    """What a model of some task says."""
    frame = Frame(pixels=np.zeros((SIDE, SIDE), np.uint8))
    return answer({"logits": logits}, spec, place(frame, spec.preprocess))


def test_classifier_gives_probabilities() -> None:
    spec = tiny_spec(task=Task.CLASSIFY, labels=("a", "b", "c"), postprocess=PostProcess.NONE)
    said = task_answer(spec, np.array([[1000.0, 0.0, -1000.0]], np.float32))
    np.testing.assert_allclose(said.scores, [1, 0, 0])
    assert said.scores.dtype == np.float32 and said.mask_HW is None
    single = tiny_spec(task=Task.CLASSIFY, labels=("a",), postprocess=PostProcess.NONE)
    np.testing.assert_allclose(task_answer(single, np.array([[0.0]], np.float32)).scores, [0.5])
    assert probabilities(np.array([-1000.0], np.float32))[0] == 0.0
    with pytest.raises(EngineError):
        task_answer(spec, np.zeros((1, 4), np.float32))


def test_features_come_back_as_they_are() -> None:
    spec = tiny_spec(task=Task.FEATURES, postprocess=PostProcess.NONE)
    logits = np.random.default_rng(0).normal(size=(1, 7, 2)).astype(np.float32)
    said = task_answer(spec, logits)
    np.testing.assert_array_equal(said.scores, logits[0])
    logits[:] = 0
    assert said.scores.any(), "an own copy"


def test_labels_of_many_classes_and_the_head_among_them() -> None:
    labels = ("background", "head", "femur")
    logits = np.zeros((1, 3, SIDE, SIDE), np.float32)
    logits[0, 1, 10:30, 10:30] = 2
    logits[0, 2, 40:63, 40:63] = 2
    plain = task_answer(tiny_spec(labels=labels, postprocess=PostProcess.MASK), logits)
    assert set(np.unique(wide(plain.mask_HW))) == {0, 1, 2}
    assert [(one.label, one.found, one.area_px) for one in plain.measurements] == [
        ("head", True, 400),
        ("femur", True, 529),
    ]
    assert plain.measurements[1].box_px == (40, 40, 23, 23) and plain.measurements[1].centroid_px == (51, 51)
    assert all(one.confidence == pytest.approx(np.exp(2) / (np.exp(2) + 2)) for one in plain.measurements)
    head = task_answer(tiny_spec(labels=labels), logits)
    assert head.mask_HW.sum() == 400 and head.measurement.area_px == 400


def test_black_bars_belong_to_nobody() -> None:
    spec = tiny_spec(preprocess=PreprocessSpec(height=SIDE, width=SIDE, aspect=AspectPolicy.LETTERBOX))
    placement = place(Frame(pixels=np.zeros((64, 128), np.uint8), spacing_mm=(0.5, 0.5)), spec.preprocess)
    said = answer({"logits": np.full((1, 1, SIDE, SIDE), 5, np.float32)}, spec, placement)
    mask, measurement = said.mask_HW, said.measurement
    assert mask is not None and measurement is not None
    top, left, height, width = placement.box
    assert (top, left, height, width) == (16, 0, 32, 64)
    assert mask.sum() == height * width == mask[top : top + height].sum()
    assert measurement.touches_border, "the border is the frame's, not the bars'"
    assert measurement.centroid_px == (31.5, 63.5), "pixels of the frame"
    assert measurement.area_px == 64 * 128 and measurement.area_mm2 == 64 * 128 / 4
