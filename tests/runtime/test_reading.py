"""Readings: numpy and C agree to the byte, the ellipse follows the logits, and what is doubtful is said so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics import exact, native
from tinyusfm_runtime.numerics.ellipse import axes, covariance, fit_logits, moments_of
from tinyusfm_runtime.numerics.measure import LabelRequest, Measurement, binary_mask, measure_label, ramanujan_mm
from tinyusfm_runtime.numerics.postprocess import answer
from tinyusfm_runtime.numerics.preprocess import Placement, place, preprocess
from tinyusfm_runtime.numerics.second_pass import blend, crop_around
from tinyusfm_runtime.numerics.shape import contour, cut_by_sector, field_of_view, fill_holes, moments
from tinyusfm_runtime.passes import read_outputs
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.reading import (
    ReadingState,
    Reason,
    SecondPassState,
    judge_all,
    judge_measurement,
    judge_scores,
)
from tinyusfm_runtime.reading_rules import Anatomy, LabelThresholds, ReadingRates, ReadingRules
from tinyusfm_runtime.spec import AspectPolicy, ModelSpec, PostProcess, PreprocessSpec, SecondPass, Task

SIDE = 96
KERNELS = pytest.mark.skipif(not native.available(), reason="the compiled kernels are not built")


def whole(spacing_mm: tuple[float, float] | None = (0.5, 0.4)) -> Placement:
    """A frame of the input's size."""
    return Placement(crop=(0, 0, SIDE, SIDE), box=(0, 0, SIDE, SIDE), spacing_mm=spacing_mm, frame_size=(SIDE, SIDE))


def ellipse_logits(row: float, col: float, a: float, b: float, angle: float, slope: float = 0.5) -> np.ndarray:
    """Logits that fall from inside an ellipse to outside, 0 on its edge: float32 1x1xSIDExSIDE."""
    y, x = np.mgrid[:SIDE, :SIDE]
    u = (x - col) * math.cos(angle) + (y - row) * math.sin(angle)
    v = (y - row) * math.cos(angle) - (x - col) * math.sin(angle)
    radius = np.hypot(u / a, v / b)
    return (slope * (1 - radius) * min(a, b)).astype(np.float32)[None, None]


def numpy_only(call: Callable[[], Any]) -> Any:
    """The same call without the compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        return call()


@given(st.floats(-700, 700))
@settings(max_examples=300, deadline=None)
def test_exp_is_that_of_the_maths_library_to_a_few_bits(x: float) -> None:
    assert float(exact.exp(np.array([x]))[0]) == pytest.approx(math.exp(x), rel=1e-15)


@given(st.floats(1e-9, 1e9))
@settings(max_examples=300, deadline=None)
def test_log_is_that_of_the_maths_library_to_a_few_bits(x: float) -> None:
    assert exact.log(x) == pytest.approx(math.log(x), rel=1e-14, abs=1e-16)


@given(st.floats(-math.pi / 2 + 1e-9, math.pi / 2))
@settings(max_examples=300, deadline=None)
def test_directions_are_those_of_the_maths_library(angle: float) -> None:
    found = exact.direction_deg(abs(math.cos(angle)), math.sin(angle))
    assert found == pytest.approx(math.degrees(angle), abs=1e-12)
    assert -90 < found <= 90


@given(
    st.floats(30, 66),
    st.floats(30, 66),
    st.floats(14, 26),
    st.floats(0.6, 1.0),
    st.floats(-1.5, 1.5),
    st.floats(0.2, 2),
)
@settings(max_examples=40, deadline=None)
def test_the_ellipse_of_the_logits_is_the_one_they_were_made_of(
    row: float, col: float, a: float, aspect: float, angle: float, slope: float
) -> None:
    b = a * aspect
    logits = ellipse_logits(row, col, a, b, angle, slope)
    _, found = measure_label(binary_mask(logits, 0.5), logits, whole((1.0, 1.0)), LabelRequest(label="x", ellipse=True))
    assert found.hc_mm == pytest.approx(ramanujan_mm(a, b), rel=0.012)
    assert np.hypot(found.centre_px[0] - row, found.centre_px[1] - col) < 0.25
    assert found.agreement is not None and found.agreement > 0.97


def test_a_spur_and_a_hole_move_the_moments_but_hardly_the_ellipse() -> None:
    logits = ellipse_logits(48, 48, 26, 20, 0.3)
    clean = measure_label(binary_mask(logits, 0.5), logits, whole((1.0, 1.0)), LabelRequest(label="x", ellipse=True))[1]
    logits[0, 0, 46:50, 70:92] = 0.2  # a faint bright line beside the head
    logits[0, 0, 40:50, 40:52] = -0.5  # a hole
    mask = binary_mask(logits, 0.5)
    spur = measure_label(mask, logits, whole((1.0, 1.0)), LabelRequest(label="x", ellipse=True))[1]
    assert clean.hc_mm is not None and spur.hc_mm is not None
    plain = axes(covariance(moments(mask)))
    by_moments = abs(ramanujan_mm(plain[0], plain[1]) - clean.hc_mm)
    assert abs(spur.hc_mm - clean.hc_mm) < 0.25 * by_moments
    assert spur.agreement is not None and clean.agreement is not None and spur.agreement < clean.agreement


def test_the_fit_never_holds_less_than_its_start() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        margin = rng.normal(-1, 2, (40, 40))
        margin[10:30, 8:30] += 3
        start = covariance(moments((margin > 0).astype(np.uint8)))
        found = moments_of(fit_logits(margin, start))
        assert all(np.isfinite([found.col, found.row, found.xx, found.xy, found.yy]))


@KERNELS
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("seed", range(12))
def test_numpy_and_c_measure_the_same_bytes(seed: int, channels: int) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = int(rng.integers(5, 70)), int(rng.integers(5, 70))
    smooth = rng.normal(0, 3, (channels, rows, cols)).cumsum(1).cumsum(2) / 8
    logits = smooth.astype(np.float32)[None]
    top, left = int(rng.integers(0, 3)), int(rng.integers(0, 3))
    box = (top, left, rows - top - int(rng.integers(0, 2)), cols - left - int(rng.integers(0, 2)))
    crop = (int(rng.integers(0, 9)), 3, int(rng.integers(8, 300)), int(rng.integers(8, 300)))
    placement = Placement(crop=crop, box=box, spacing_mm=(0.31, 0.17) if seed % 3 else None, frame_size=(400, 400))
    codes = rng.integers(0, 4, (rows, cols)).astype(np.uint8)
    mask = binary_mask(logits, 0.55)
    asked = LabelRequest(label="x", index=1, threshold=0.55, min_area=0.01, ellipse=seed % 2 == 0)
    there = measure_label(mask, logits, placement, asked, codes)
    here = numpy_only(lambda: measure_label(mask, logits, placement, asked, codes))
    np.testing.assert_array_equal(there[0], here[0])
    assert repr(there[1]) == repr(here[1]), "every digit"


@KERNELS
@pytest.mark.parametrize("seed", range(8))
def test_numpy_and_c_have_the_same_shapes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = (rng.random((int(rng.integers(1, 40)), int(rng.integers(1, 40)))) < 0.5).astype(np.uint8)
    codes = rng.integers(0, 5, mask.shape).astype(np.uint8)
    for call in (lambda: fill_holes(mask), lambda: contour(mask), lambda: cut_by_sector(mask, codes)):
        np.testing.assert_array_equal(call(), numpy_only(call))


@KERNELS
@pytest.mark.parametrize("aspect", list(AspectPolicy))
def test_numpy_and_c_blend_the_same_bytes(aspect: AspectPolicy) -> None:
    rng = np.random.default_rng(1)
    spec = PreprocessSpec(height=48, width=64, aspect=aspect)
    frame = Frame(pixels=np.zeros((200, 300), np.uint8))
    first, second = place(frame, spec), place(frame, replace(spec, crop=(40, 30, 90, 140)))
    one, two = (rng.normal(0, 5, (2, 48, 64)).astype(np.float32) for _ in range(2))
    there = blend(one, two, first, second)
    np.testing.assert_array_equal(there, numpy_only(lambda: blend(one, two, first, second)))
    assert (there != one).any() and (there == one).any(), "inside the crop alone"


def test_holes_are_filled_but_bays_are_not() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[4:16, 4:16] = 1
    mask[8:11, 8:11] = 0
    mask[4:9, 13] = 0  # open to the outside
    filled = fill_holes(mask)
    assert filled[8:11, 8:11].all() and not filled[4:9, 13].any()


def test_a_contour_walks_round_once() -> None:
    mask = np.zeros((9, 9), np.uint8)
    mask[2:6, 3:8] = 1
    walked = contour(mask)
    assert walked[0].tolist() == [2, 3] and len(walked) == 2 * (4 + 5) - 4
    assert np.abs(np.diff(np.vstack([walked, walked[:1]]), axis=0)).max() == 1
    assert len(contour(np.ones((200, 200), np.uint8))) == 64 and not len(contour(np.zeros((4, 4), np.uint8)))


def phantom_spec(**changes: Any) -> ModelSpec:
    """A model of heads."""
    values: dict[str, Any] = {
        "name": "x", "task": Task.SEGMENT, "labels": ("head",), "postprocess": PostProcess.ELLIPSE_HC,
        "preprocess": PreprocessSpec(height=224, width=224),
    }  # fmt: skip
    return ModelSpec(**{**values, **changes})


def perfect(seed: int) -> tuple[Measurement, float, float]:
    """What a perfect mask of a phantom's visible head reads: measurement, visible share of the head, truth."""
    phantom, spec = make_phantom(seed), phantom_spec()
    tensor, placement = preprocess(phantom.frame, spec.preprocess)
    seen = phantom.mask_HW * (phantom.frame.pixels > 0).astype(np.uint8)
    view = field_of_view(phantom.frame.pixels)
    mask = preprocess(Frame(pixels=(phantom.mask_HW * view).astype(np.uint8) * 255), spec.preprocess)[0]
    logits = ((mask[0] > 127).astype(np.float32) * 8 - 4)[None]
    said = answer({"logits": logits}, spec, placement, codes_HW=tensor[0, 0])
    assert said.measurement is not None and seen is not None
    return said.measurement, float((phantom.mask_HW * view).sum() / phantom.mask_HW.sum()), phantom.hc_mm


def test_a_head_that_the_sector_cuts_is_flagged_like_one_that_the_frame_cuts() -> None:
    found = [perfect(seed) for seed in range(300, 360)]
    cut = [measured.touches_border for measured, share, _ in found if share < 0.97]
    inside = [measured.touches_border for measured, share, _ in found if share > 0.9995]
    assert len(cut) >= 8 and all(cut)
    assert len(inside) >= 30 and sum(inside) <= 1


def rules(**changes: Any) -> ReadingRules:
    """Thresholds of the label ``head``."""
    rates = ReadingRates(
        frames=40, groups=40, good=38, doubtful=2, none=0, wrong=1, good_but_wrong=0, doubtful_but_right=1,
        good_but_wrong_limit=0.09, wrong_means="more than 10 % off",
    )  # fmt: skip
    return ReadingRules(thresholds=(LabelThresholds(label="head", confidence=0.9, agreement=0.96),), rates=rates)


GOOD = Measurement(found=True, label="head", has_ellipse=True, confidence=0.95, agreement=0.98, hc_mm=180.0)
CASES: dict[str, tuple[dict[str, Any], ReadingState, tuple[Reason, ...]]] = {
    "good": ({}, ReadingState.GOOD, ()),
    "unsure": ({"confidence": 0.89}, ReadingState.DOUBTFUL, (Reason.CONFIDENCE,)),
    "ragged": ({"agreement": 0.9}, ReadingState.DOUBTFUL, (Reason.AGREEMENT,)),
    "at the border": ({"touches_border": True}, ReadingState.DOUBTFUL, (Reason.BORDER,)),
    "cut": ({"touches_border": True, "cut_by_sector": True}, ReadingState.DOUBTFUL, (Reason.SECTOR,)),
    "a giant": ({"hc_mm": 1954.0}, ReadingState.DOUBTFUL, (Reason.SIZE,)),
    "a dwarf": ({"hc_mm": 0.2}, ReadingState.DOUBTFUL, (Reason.SIZE,)),
    "nothing": ({"found": False}, ReadingState.NONE, ()),
    "not a number": ({"confidence": float("nan")}, ReadingState.DOUBTFUL, (Reason.CONFIDENCE,)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_speaks_against_a_reading(case: tuple[dict[str, Any], ReadingState, tuple[Reason, ...]]) -> None:
    changes, state, reasons = case
    spec = phantom_spec(reading=rules(), anatomy=Anatomy(name="head", size_mm=(20, 450)))
    judged = judge_measurement(replace(GOOD, **changes), spec, whole())
    assert (judged.state, judged.reasons) == (state, reasons)
    bare = judge_measurement(replace(GOOD, **changes), replace(spec, reading=None), whole())
    assert bare.state is ReadingState.UNCHECKED, "without thresholds nobody knows"


def test_strange_frames_and_impossible_spacings_are_doubtful() -> None:
    spec = phantom_spec(reading=rules(), anatomy=Anatomy(name="head", size_mm=(20, 450)))
    assert judge_measurement(GOOD, spec, whole(), strange=True).reasons == (Reason.DRIFT,)
    assert judge_measurement(GOOD, spec, whole((2.0, 2.0))).reasons == (Reason.SPACING,)
    assert judge_measurement(GOOD, spec, whole(None)).state is ReadingState.GOOD, (
        "without a spacing nothing is implausible"
    )


def test_a_classifier_is_judged_by_the_class_it_names() -> None:
    spec = ModelSpec(
        name="x", task=Task.CLASSIFY, labels=("a", "b"),
        reading=replace(rules(), thresholds=(LabelThresholds(label="a", confidence=0.8),)),
    )  # fmt: skip
    assert judge_scores(np.array([0.9, 0.1], np.float32), spec).state is ReadingState.GOOD
    assert judge_scores(np.array([0.7, 0.3], np.float32), spec).state is ReadingState.DOUBTFUL
    assert judge_scores(np.array([0.1, 0.9], np.float32), spec).state is ReadingState.UNCHECKED, "no threshold for b"


def test_one_doubtful_label_makes_the_answer_doubtful() -> None:
    spec = phantom_spec(reading=rules())
    good, bad = (judge_measurement(replace(GOOD, confidence=c), spec, whole()) for c in (0.95, 0.5))
    assert judge_all([good, bad]).state is ReadingState.DOUBTFUL and judge_all([good]).state is ReadingState.GOOD
    assert judge_all([]).state is ReadingState.UNCHECKED


def looked(second_pass: SecondPass, radius: float, *, allowed: bool = True, seen: bool = True) -> tuple[Any, int]:
    """Reads a disc of some radius on a frame of 192x192 through a network that sees brightness; counts its runs."""
    y, x = np.mgrid[:192, :192]
    disc = np.where(np.hypot(y - 90, x - 110) < radius, 200, 30).astype(np.uint8)
    frame = Frame(pixels=disc, spacing_mm=(1.0, 1.0))
    spec = phantom_spec(preprocess=PreprocessSpec(height=SIDE, width=SIDE), second_pass=second_pass)
    runs = []

    def run(tensor: np.ndarray) -> dict[str, np.ndarray]:
        runs.append(tensor.copy())
        return {"logits": (tensor.astype(np.float32) - 115) / 10}

    tensor, placement = preprocess(frame, spec.preprocess)
    passed = read_outputs(run(tensor), run, spec, frame if seen else None, tensor, placement, second_pass=allowed)
    return passed, len(runs)


def test_small_things_are_looked_at_twice_and_measured_as_well() -> None:
    small, runs = looked(SecondPass.SMALL, 20)
    assert (small.second_pass, runs) == (SecondPassState.DONE, 2) and small.second_ms > 0
    assert small.answer.measurement.hc_mm == pytest.approx(2 * math.pi * 20, rel=0.02)
    large, runs = looked(SecondPass.SMALL, 60)
    assert (large.second_pass, runs) == (SecondPassState.NOT_NEEDED, 1)
    assert looked(SecondPass.ALWAYS, 50)[0].second_pass is SecondPassState.DONE
    assert looked(SecondPass.NEVER, 20)[1] == 1 and looked(SecondPass.NEVER, 20)[0].second_pass is SecondPassState.NEVER
    assert looked(SecondPass.SMALL, 20, allowed=False)[0].second_pass is SecondPassState.OFF
    assert looked(SecondPass.SMALL, 20, seen=False)[1] == 1


@given(
    st.integers(0, 90), st.integers(0, 90), st.integers(1, 40), st.integers(1, 40), st.sampled_from(list(AspectPolicy))
)
@settings(max_examples=60, deadline=None)
def test_the_crop_lies_in_the_region_and_holds_the_mask(
    row: int, col: int, height: int, width: int, aspect: AspectPolicy
) -> None:
    frame = Frame(pixels=np.zeros((211, 333), np.uint8))
    spec = PreprocessSpec(height=SIDE, width=SIDE, aspect=aspect, crop=(5, 7, 190, 300))
    placement = place(frame, spec)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[row : row + height, col : col + width] = 1
    top, left, box_h, box_w = placement.box
    inside = np.zeros_like(mask)
    inside[top : top + box_h, left : left + box_w] = mask[top : top + box_h, left : left + box_w]
    region = crop_around(inside, placement)
    if region is None:
        return
    r, c, h, w = region
    assert r >= 5 and r + h <= 195 and c >= 7 and c + w <= 307 and h >= 8 and w >= 8
    place(frame, replace(spec, crop=region))


def test_the_same_frame_reads_the_same_whatever_came_before() -> None:
    one, two = looked(SecondPass.SMALL, 20)[0], looked(SecondPass.SMALL, 20)[0]
    assert repr(one.answer.measurements) == repr(two.answer.measurements)
