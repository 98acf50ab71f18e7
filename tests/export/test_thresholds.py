"""Thresholds of readings: what they promise on the frames they were set on, and when there are none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tinyusfm_export.verify.expected import Expected
from tinyusfm_export.verify.parity import Output, read_output
from tinyusfm_export.verify.thresholds import LEAST_FRAMES, MOST_WRONG, calibrate_reading, rejudged, upper_limit
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.reading import ReadingState
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

SIDE = 64
SPEC = ModelSpec(
    name="head",
    task=Task.SEGMENT,
    labels=("head",),
    preprocess=PreprocessSpec(height=SIDE, width=SIDE),
    postprocess=PostProcess.ELLIPSE_HC,
)
PLACE = Placement(crop=(0, 0, SIDE, SIDE), box=(0, 0, SIDE, SIDE), spacing_mm=(1.0, 1.0), frame_size=(SIDE, SIDE))


def disc(radius: float, sure: float = 1.0) -> np.ndarray:
    """Logits of a disc, 1x1xSIDExSIDE."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return ((radius - np.hypot(y - 32, x - 31)) * sure).astype(np.float32)[None, None]


def labelled(count: int, wrong: int = 0, *, unsure: bool = True) -> tuple[Expected, list[Output]]:
    """Frames with a disc of radius 16 to 20; wrong answers are a third larger, and unsure of it or not."""
    outputs, truths = [], []
    for i in range(count):
        radius = 16 + 4 * (i % 7) / 7
        bad = i < wrong
        said = disc(radius * (1.34 if bad else 1.0), sure=0.05 if bad and unsure else 0.8 + 0.01 * (i % 13))
        outputs.append(read_output({"logits": said}, SPEC, PLACE))
        truths.append((disc(radius)[0, 0] > 0).astype(np.uint8))
    tensor = np.full((1, 1, SIDE, SIDE), 90, np.uint8)
    expected = Expected(
        ids=tuple(map(str, range(count))),
        inputs=((tensor, PLACE),) * count,
        outputs=tuple(outputs),
        reference="",
        provenance={"kind": "data"},
        truths=tuple(truths),
    )
    return expected, outputs


def test_right_frames_are_good_and_unsure_wrong_ones_are_not() -> None:
    expected, outputs = labelled(100, wrong=4)
    rules, why = calibrate_reading(SPEC, expected, [f"p{i // 2}" for i in range(100)])
    assert rules is not None and not why
    rates = rules.rates
    assert (rates.frames, rates.groups, rates.wrong, rates.good_but_wrong) == (100, 50, 4, 0)
    assert rates.doubtful_but_right <= 10 and rates.good + rates.doubtful + rates.none == 100
    assert "10% off" in rates.wrong_means and 0 < rates.good_but_wrong_limit < 0.05
    judged = rejudged(outputs, ModelSpec(**{**_fields(SPEC), "reading": rules}), [PLACE] * 100)
    states = [output.reading for output in judged]
    assert states[:4] == [ReadingState.DOUBTFUL] * 4 and states.count(ReadingState.GOOD) == rates.good
    assert {output.reading for output in outputs} == {ReadingState.UNCHECKED}, "without thresholds"


def test_wrong_answers_that_are_sure_of_themselves_leave_readings_unchecked() -> None:
    expected, _ = labelled(60, wrong=30, unsure=False)
    rules, why = calibrate_reading(SPEC, expected)
    assert rules is None and "unchecked" in why


def test_each_label_of_a_mask_has_a_threshold_of_its_own() -> None:
    spec = replace(SPEC, labels=("background", "left", "right"), postprocess=PostProcess.MASK)
    outputs, truths = [], []
    y, x = np.mgrid[:SIDE, :SIDE]
    for i in range(60):
        # the left one is answered surely, the right one less so, and on two frames too large and unsurely
        left, right = 8 - np.hypot(y - 30, x - 16), 9 - np.hypot(y - 30, x - 46)
        seen = 0.05 * (right + 7) if i < 2 else (0.3 + 0.002 * i) * right
        logits = np.stack([np.zeros((SIDE, SIDE)), 0.9 * left, seen])
        outputs.append(read_output({"logits": logits[None].astype(np.float32)}, spec, PLACE))
        truths.append(np.where(left > 0, 1, np.where(right > 0, 2, 0)).astype(np.uint8))
    tensor = np.full((1, 1, SIDE, SIDE), 90, np.uint8)
    expected = Expected(
        ids=tuple(map(str, range(60))), inputs=((tensor, PLACE),) * 60, outputs=tuple(outputs), reference="",
        provenance={"kind": "data"}, truths=tuple(truths),
    )  # fmt: skip
    rules, why = calibrate_reading(spec, expected)
    assert rules is not None, why
    by_label = {one.label: one for one in rules.thresholds}
    assert set(by_label) == {"left", "right"} and by_label["left"].confidence > by_label["right"].confidence > 0.5
    assert by_label["left"].agreement is None
    assert (rules.rates.frames, rules.rates.wrong, rules.rates.good_but_wrong) == (60, 2, 0)
    swapped = replace(expected, truths=tuple(np.where(t > 0, 3 - t, 0).astype(np.uint8) for t in truths))
    assert calibrate_reading(spec, swapped)[0] is None, "labels that are exchanged are never right"


def test_few_frames_and_frames_without_labels_promise_nothing() -> None:
    rules, why = calibrate_reading(SPEC, labelled(LEAST_FRAMES - 1)[0])
    assert rules is None and str(LEAST_FRAMES) in why
    expected, _ = labelled(40)
    bare = Expected(**{f: getattr(expected, f) for f in ("ids", "inputs", "outputs", "reference", "provenance")})
    assert calibrate_reading(SPEC, bare)[0] is None


@pytest.mark.parametrize(
    ("count", "total", "limit"), [(0, 100, 0.0362), (1, 100, 0.0545), (5, 50, 0.2181), (7, 7, 1.0)]
)
def test_the_limit_of_a_rate_is_the_exact_one(count: int, total: int, limit: float) -> None:
    """Values of R's binom.test."""
    assert upper_limit(count, total) == pytest.approx(limit, abs=2e-4)
    assert 0 < MOST_WRONG < 0.05


def _fields(spec: ModelSpec) -> dict[str, object]:
    return {name: getattr(spec, name) for name in ("name", "task", "labels", "preprocess", "postprocess")}
