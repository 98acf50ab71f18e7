"""Parity: distances between two answers, and that the broken ones show."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from tinyusfm_export.verify.gate import Gate, judge
from tinyusfm_export.verify.parity import (
    Comparison,
    FrameParity,
    Output,
    compare_frame,
    cosine,
    label_dice,
    p95,
    read_output,
)
from tinyusfm_export.verify.parity import summarise as summarise_frames
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import ModelSpec, PostProcess, PreprocessSpec, Task

SIDE = 64
HEAD = ModelSpec(
    name="head",
    task=Task.SEGMENT,
    labels=("background", "head"),
    preprocess=PreprocessSpec(height=SIDE, width=SIDE),
    postprocess=PostProcess.ELLIPSE_HC,
)
SCORES = ModelSpec(name="scores", task=Task.CLASSIFY, labels=("a", "b", "c"))
FEATURES = ModelSpec(name="features", task=Task.FEATURES, labels=())
MM = (0.5, 0.5)


def disc(radius: float, *, row: float = 32, col: float = 32, gain: float = 1.0) -> np.ndarray:
    """Logits of a head: positive inside a circle, about one per pixel of distance."""
    rows, cols = np.mgrid[0:SIDE, 0:SIDE]
    return (gain * (radius - np.hypot(rows - row, cols - col)))[None, None].astype(np.float32)


def seen(
    logits: np.ndarray,
    spec: ModelSpec = HEAD,
    spacing: tuple[float, float] | None = MM,
    size: tuple[int, int] = (SIDE, SIDE),
) -> Output:
    frame = Frame(pixels=np.zeros(size, np.uint8), spacing_mm=spacing)
    return read_output({"logits": logits}, spec, preprocess(frame, spec.preprocess)[1])


def compared(reference: Output, found: Output, spec: ModelSpec = HEAD) -> FrameParity:
    return compare_frame("f", reference, found, spec)


def summary(frames: list[FrameParity], spec: ModelSpec = HEAD) -> Comparison:
    return summarise_frames(frames, spec, engine="e", reference="r", provenance={"count": len(frames)})


def test_equal_answers_agree_in_every_number() -> None:
    values = compared(seen(disc(20)), seen(disc(20))).values
    assert values["dice"] == 1.0
    assert values["hc_diff_mm"] == 0.0
    assert values["differing_pixels"] == 0.0
    assert values["logit_max_abs"] == 0.0


def test_a_larger_head_shows_in_dice_pixels_and_millimetres() -> None:
    values = compared(seen(disc(20)), seen(disc(21))).values
    assert values["dice"] == pytest.approx(2 * 400 / (400 + 441), abs=0.01)
    # one pixel of radius is 2 pi pixels of 0.5 mm
    assert values["hc_diff_mm"] == pytest.approx(2 * np.pi * 0.5, abs=0.25)
    assert values["differing_pixels"] == pytest.approx(np.pi * 41 / SIDE**2, abs=0.01)


def test_circumference_uses_the_frames_own_spacing_after_resizing() -> None:
    before, after = seen(disc(20), size=(128, 64)), seen(disc(21), size=(128, 64))
    # 128 rows became 64: a row of the input is 1 mm, a column 0.5 mm
    half = 2 * np.pi * np.sqrt((1.0**2 + 0.5**2) / 2)
    assert compared(before, after).values["hc_diff_mm"] == pytest.approx(half, rel=0.12)


def test_without_spacing_the_difference_is_a_share_and_no_millimetre() -> None:
    values = compared(seen(disc(20), spacing=None), seen(disc(21), spacing=None)).values
    assert "hc_diff_mm" not in values
    assert values["hc_diff_share"] == pytest.approx(1 / 20, rel=0.1)


def test_a_head_that_is_gone_counts_with_its_whole_circumference() -> None:
    for spacing, key, want in ((MM, "hc_diff_mm", 2 * np.pi * 20 * 0.5), (None, "hc_diff_share", 1.0)):
        values = compared(seen(disc(20), spacing=spacing), seen(disc(-5), spacing=spacing)).values
        assert values[key] == pytest.approx(want, rel=0.05)
        assert values["dice"] == 0.0


def test_only_frames_with_a_large_enough_reference_count() -> None:
    small = compared(seen(disc(3)), seen(disc(3)))
    large = compared(seen(disc(20)), seen(disc(20)))
    assert small.values["coverage"] < 0.01 < large.values["coverage"]
    assert (small.counted, large.counted) == (False, True)
    numbers = summary([small, large]).statistics
    assert numbers["counted"] == 1
    assert numbers["hc_frames"] == 1


def test_what_an_artefact_invents_on_an_empty_frame_shows_in_differing_pixels() -> None:
    numbers = summary([compared(seen(disc(-5)), seen(disc(10)))]).statistics
    assert numbers["differing_pixels_worst"] == pytest.approx(np.pi * 100 / SIDE**2, abs=0.01)
    assert "dice_mean" not in numbers


def test_a_flipped_border_flag_is_counted() -> None:
    at_border, inside = disc(20, row=19), disc(20, row=25)
    assert summary([compared(seen(at_border), seen(inside))]).statistics["border_flips"] == 1
    assert summary([compared(seen(inside), seen(inside))]).statistics["border_flips"] == 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_single_value_that_is_no_number_breaks_the_frame(poison: float) -> None:
    bad = disc(20)
    bad[0, 0, 5, 5] = poison
    frame = compared(seen(disc(20)), seen(bad))
    assert frame.values["broken"] is True
    assert summary([frame]).statistics["broken"] == 1
    assert not judge(summary([frame] * 40), Gate())


def test_logits_of_another_shape_are_refused() -> None:
    with pytest.raises(EngineError, match="shape"):
        seen(disc(20)[:, :, :32])


def test_several_labels_are_averaged_over_those_that_occur() -> None:
    a, b = np.zeros((8, 8), np.uint8), np.zeros((8, 8), np.uint8)
    a[:4], b[:4] = 1, 1
    assert label_dice(a, b) == 1.0
    b[6:] = 2
    assert label_dice(a, b) == 0.5
    assert label_dice(np.zeros_like(a), np.zeros_like(a)) == 1.0


def test_classification_counts_top1_and_the_largest_drift() -> None:
    before = seen(np.array([[2.0, 0.0, 0.0]], np.float32), SCORES)
    same = compared(before, seen(np.array([[2.2, 0.0, 0.0]], np.float32), SCORES), SCORES)
    other = compared(before, seen(np.array([[0.0, 2.0, 0.0]], np.float32), SCORES), SCORES)
    numbers = summary([same, other], SCORES).statistics
    assert numbers["top1"] == 0.5
    assert numbers["drift_worst"] == pytest.approx(0.787 - 0.1065, abs=0.01)
    assert same.values["drift"] < 0.04


def test_one_score_is_a_probability_with_its_label_above_a_half() -> None:
    before = seen(np.array([[0.1]], np.float32), SCORES)
    flipped = compared(before, seen(np.array([[-0.1]], np.float32), SCORES), SCORES)
    assert flipped.values["top1"] is False
    assert flipped.values["drift"] == pytest.approx(0.05, abs=0.001)


def test_features_are_compared_by_cosine() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(1, 8, 4, 4)).astype(np.float32)
    assert compared(seen(a, FEATURES), seen(3 * a, FEATURES), FEATURES).values["cosine"] == pytest.approx(1.0)
    assert compared(seen(a, FEATURES), seen(-a, FEATURES), FEATURES).values["cosine"] == pytest.approx(-1.0)
    assert cosine(np.zeros(3), np.zeros(3)) == 1.0
    assert cosine(np.zeros(3), np.ones(3)) == 0.0


def test_the_95th_percentile_is_a_sample_and_never_below() -> None:
    assert p95(list(range(1, 41))) == 39.0
    assert p95([0.0] * 37 + [9.0] * 3) == 9.0
    assert p95([5.0]) == 5.0


@pytest.mark.parametrize("task", [HEAD, SCORES, FEATURES])
def test_the_report_is_plain_json_without_pixels(task: ModelSpec) -> None:
    make: dict[str, Callable[[], np.ndarray]] = {
        "head": lambda: disc(20),
        "scores": lambda: np.ones((1, 3), np.float32),
        "features": lambda: np.ones((1, 4, 2, 2), np.float32),
    }
    frames = [compared(seen(make[task.name](), task), seen(make[task.name](), task), task)] * 32
    report = judge(summary(frames, task), Gate())
    assert report
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["passed"] is True
    assert len(json.loads(text)["rows"]) == 32
    assert "rows" not in report.summary()
    assert len(report.table()) == len(report.lines)
