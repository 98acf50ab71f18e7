"""Mask to circumference: OpenCV and analytic ellipses are the oracles; symmetries must hold to the last bit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics import native
from tinyusfm_runtime.numerics.measure import (
    Measurement,
    binary_mask,
    dice,
    largest_component,
    measure_head,
    ramanujan_mm,
)
from tinyusfm_runtime.numerics.shape import fill_holes

EXAMPLES = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MASKS = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24), elements=st.integers(0, 1)
)


@pytest.fixture(params=["numpy", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip(f"compiled kernels: {native.reason()}")
    return str(request.param)


def ellipse(
    a: float, b: float, tilt: float, *, shape: tuple[int, int], centre: tuple[float, float], spacing=(1.0, 1.0)
) -> np.ndarray:
    """Pixels whose centres lie inside; a, b in mm, tilt of a to the columns in mm space, centre in pixels."""
    rows, cols = np.mgrid[: shape[0], : shape[1]].astype(float)
    dy, dx = (rows - centre[0]) * spacing[0], (cols - centre[1]) * spacing[1]
    u = (dx * math.cos(tilt) + dy * math.sin(tilt)) / a
    v = (-dx * math.sin(tilt) + dy * math.cos(tilt)) / b
    return (u * u + v * v <= 1.0).astype(np.uint8)


def perimeter(a: float, b: float) -> float:
    """By quadrature, not by Ramanujan."""
    t = np.linspace(0.0, 2.0 * math.pi, 4001)[:-1]
    return float(np.hypot(a * np.sin(t), b * np.cos(t)).mean() * 2.0 * math.pi)


def apart_deg(a: float, b: float) -> float:
    """Angle between two directions without a sense."""
    return min((a - b) % 180.0, (b - a) % 180.0)


class TestBinaryMask:
    @pytest.mark.parametrize("threshold", [0.001, 0.3, 0.5, 0.9])
    def test_one_channel_is_the_sigmoid_above_the_threshold(self, backend: str, threshold: float) -> None:
        logits = np.random.default_rng(0).normal(0, 4, (1, 1, 33, 47)).astype(np.float32)
        want = 1.0 / (1.0 + np.exp(-logits[0, 0].astype(np.float64))) > threshold
        got = binary_mask(logits, threshold)
        assert np.array_equal(got, want) and got.dtype == np.uint8

    def test_the_threshold_itself_does_not_count(self, backend: str) -> None:
        tiny = np.float32(1e-45)
        logits = np.array([0.0, -0.0, tiny, -tiny, np.inf, -np.inf, np.nan], np.float32).reshape(1, 1, 1, 7)
        assert binary_mask(logits, 0.5).tolist() == [[0, 0, 1, 0, 1, 0, 0]]

    def test_several_channels_go_to_the_largest_the_lowest_of_equals(self, backend: str) -> None:
        logits = np.random.default_rng(0).integers(-2, 3, (1, 4, 20, 30)).astype(np.float32)
        assert np.array_equal(binary_mask(logits, 0.5), np.argmax(logits[0], axis=0))

    def test_nan_never_wins(self) -> None:
        logits = np.array([[np.nan, -1.0, np.nan], [1.0, np.nan, np.nan]], np.float32).reshape(1, 2, 1, 3)
        assert binary_mask(logits, 0.5).tolist() == [[1, 0, 0]]

    def test_views_are_read_through_their_strides(self, backend: str) -> None:
        wide = np.random.default_rng(0).normal(0, 1, (1, 1, 20, 60)).astype(np.float32)
        view = wide[:, :, ::-1, ::3]
        assert np.array_equal(binary_mask(view, 0.5), view[0, 0] > 0)

    @pytest.mark.parametrize(
        "logits", [np.zeros((1, 1, 4, 4)), np.zeros((2, 1, 4, 4), np.float32), np.zeros((1, 4, 4), np.float32)]
    )
    def test_other_logits_are_refused(self, logits: np.ndarray) -> None:
        with pytest.raises(InputError, match="float32 1xKxHxW"):
            binary_mask(logits, 0.5)

    def test_an_impossible_threshold_is_refused(self) -> None:
        with pytest.raises(InputError, match="between 0 and 1"):
            binary_mask(np.zeros((1, 1, 4, 4), np.float32), 1.0)


def largest_by_cv2(mask: np.ndarray, connectivity: int = 8) -> np.ndarray:
    """OpenCV numbers blocks of two rows at once, so among equals the first pixel decides, not its label."""
    cv2 = pytest.importorskip("cv2")
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=connectivity)
    if count == 1:
        return np.zeros_like(mask)
    areas = stats[1:, cv2.CC_STAT_AREA]
    equals = [label for label in range(1, count) if areas[label - 1] == areas.max()]
    first = min(equals, key=lambda label: int(np.flatnonzero(labels == label)[0]))
    return (labels == first).astype(np.uint8)


class TestLargestComponent:
    @EXAMPLES
    @given(mask=MASKS)
    def test_small_masks_like_opencv(self, backend: str, mask: np.ndarray) -> None:
        assert np.array_equal(largest_component(mask), largest_by_cv2(mask))

    @pytest.mark.parametrize("density", [0.05, 0.2, 0.35, 0.41, 0.5, 0.8])
    def test_noise_like_opencv(self, backend: str, density: float) -> None:
        mask = (np.random.default_rng(7).uniform(size=(224, 200)) < density).astype(np.uint8)
        assert np.array_equal(largest_component(mask), largest_by_cv2(mask))

    def test_four_connected_would_be_seen(self, backend: str) -> None:
        mask = np.eye(9, dtype=np.uint8)
        assert np.array_equal(largest_component(mask), mask)
        assert not np.array_equal(largest_component(mask), largest_by_cv2(mask, connectivity=4))

    def test_among_equals_the_first_row_by_row(self, backend: str) -> None:
        mask = np.zeros((6, 12), np.uint8)
        mask[1, 8:10] = mask[2, 1:3] = mask[4, 5:7] = 1
        want = np.zeros_like(mask)
        want[1, 8:10] = 1
        assert np.array_equal(largest_component(mask), want)

    def test_arms_that_meet_late_are_one(self, backend: str) -> None:
        comb = np.zeros((20, 41), np.uint8)
        comb[:, ::2] = 1
        comb[-1] = 1
        assert np.array_equal(largest_component(comb), comb)
        rows = ("1111111", "0000001", "1111101", "1000101", "1011101", "1000001", "1111111")
        spiral = np.array([[int(code) for code in row] for row in rows], np.uint8)
        assert np.array_equal(largest_component(spiral), largest_by_cv2(spiral))

    def test_any_type_any_value_any_strides(self, backend: str) -> None:
        mask = (np.random.default_rng(3).uniform(size=(40, 60)) < 0.4).astype(np.uint8)
        want = largest_component(mask)
        assert np.array_equal(largest_component(mask * 255), want)
        assert np.array_equal(largest_component(mask.astype(bool)), want)
        assert np.array_equal(largest_component(mask * -0.5), want)
        assert np.array_equal(largest_component(np.asfortranarray(mask)), want)

    def test_empty_and_full(self, backend: str) -> None:
        assert not largest_component(np.zeros((5, 7), np.uint8)).any()
        assert largest_component(np.full((5, 7), 9, np.uint8)).all()
        with pytest.raises(InputError, match="rows and columns"):
            largest_component(np.zeros((1, 5, 7), np.uint8))


class TestMeasureHead:
    @EXAMPLES
    @given(mask=MASKS)
    def test_moments_like_opencv(self, backend: str, mask: np.ndarray) -> None:
        cv2 = pytest.importorskip("cv2")
        found = measure_head(mask, (1.0, 1.0))
        moments = cv2.moments(fill_holes(largest_component(mask)), binaryImage=True)
        assert found.area_px == moments["m00"]
        if not found.found:
            return
        assert found.centre_px == pytest.approx((moments["m01"] / moments["m00"], moments["m10"] / moments["m00"]))
        covariance = np.array([[moments["mu20"], moments["mu11"]], [moments["mu11"], moments["mu02"]]])
        minor, major = 4.0 * np.sqrt(np.maximum(np.linalg.eigvalsh(covariance / moments["m00"]), 0.0))
        assert found.axes_px == pytest.approx((major, minor), rel=1e-6, abs=1e-5)
        assert found.hc_px == pytest.approx(ramanujan_mm(major / 2, minor / 2), rel=1e-6, abs=1e-5)

    @pytest.mark.parametrize(("minor_px", "tolerance"), [(8, 0.015), (24, 0.0025), (64, 0.0006)])
    def test_circumference_of_drawn_ellipses(self, minor_px: int, tolerance: float) -> None:
        rng = np.random.default_rng(minor_px)
        errors = []
        for _ in range(40 if minor_px < 64 else 12):
            row_mm = float(rng.uniform(0.2, 0.4))
            spacing = (row_mm, row_mm * float(rng.uniform(0.6, 1.6)))
            b = minor_px * max(spacing)
            a, tilt = b / float(rng.uniform(0.7, 0.9)), float(rng.uniform(-1.5, 1.5))
            side = int(2 * a / min(spacing)) + 8
            centre = (side / 2 + float(rng.uniform(-0.5, 0.5)), side / 2 + float(rng.uniform(-0.5, 0.5)))
            mask = ellipse(a, b, tilt, shape=(side, side), centre=centre, spacing=spacing)
            found = measure_head(mask, spacing)
            assert found.hc_mm is not None and found.axes_mm is not None and not found.touches_border
            errors.append(found.hc_mm / perimeter(a, b) - 1.0)
            assert found.axes_mm == pytest.approx((2 * a, 2 * b), rel=3 * tolerance)
            assert found.centre_px == pytest.approx(centre, abs=0.15)
        assert np.abs(errors).max() < tolerance
        assert abs(np.mean(errors)) < tolerance / 3, "a bias: the twelfth of a pixel is back, or lost"

    def test_a_twelfth_of_a_pixel_would_be_seen_as_a_bias(self) -> None:
        rng = np.random.default_rng(8)
        plain, padded = [], []
        for _ in range(60):
            centre = (12 + float(rng.uniform(-0.5, 0.5)), 12 + float(rng.uniform(-0.5, 0.5)))
            found = measure_head(ellipse(9, 8, float(rng.uniform(0, 3)), shape=(25, 25), centre=centre), None)
            plain.append(found.hc_px / perimeter(9, 8) - 1.0)
            with_twelfth = [math.sqrt((axis / 4) ** 2 + 1 / 12) * 2 for axis in found.axes_px]
            padded.append(ramanujan_mm(with_twelfth[0], with_twelfth[1]) / perimeter(9, 8) - 1.0)
        assert abs(np.mean(plain)) < 0.001 < 0.0015 < abs(np.mean(padded))

    @pytest.mark.parametrize("tilt_deg", [-80.0, -30.0, 0.0, 20.0, 45.0, 90.0])
    def test_angle_and_axes_agree_with_a_fitted_outline(self, tilt_deg: float) -> None:
        cv2 = pytest.importorskip("cv2")
        mask = ellipse(70, 50, math.radians(tilt_deg), shape=(180, 180), centre=(90.3, 88.7))
        found = measure_head(mask, None)
        assert -90.0 < found.angle_deg <= 90.0
        assert apart_deg(found.angle_deg, tilt_deg) < 0.5
        outline = max(cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], key=len)
        (col, row), axes, angle = cv2.fitEllipse(outline)
        assert found.centre_px == pytest.approx((row, col), abs=0.2)
        assert found.axes_px == pytest.approx((max(axes), min(axes)), abs=1.2)  # an outline runs through border pixels
        assert apart_deg(angle - 90.0 * (axes[1] > axes[0]), found.angle_deg) < 0.6

    def test_only_the_largest_component_counts(self, backend: str) -> None:
        mask = ellipse(30, 22, 0.4, shape=(100, 120), centre=(50, 60))
        want = measure_head(mask, (0.3, 0.2))
        mask[2:6, 2:9] = 1
        mask[95, ::5] = 1
        assert measure_head(mask, (0.3, 0.2)) == want

    @pytest.mark.parametrize("centre", [(20, 60), (80, 60), (50, 28), (50, 92)])
    def test_a_mask_at_the_border_is_flagged(self, backend: str, centre: tuple[int, int]) -> None:
        assert measure_head(ellipse(30, 22, 0.0, shape=(101, 121), centre=centre), None).touches_border
        assert not measure_head(ellipse(28, 20, 0.0, shape=(103, 123), centre=(50, 60)), None).touches_border

    def test_an_empty_mask_is_not_found(self, backend: str) -> None:
        found = measure_head(np.zeros((9, 9), np.uint8), (0.1, 0.1))
        assert found == Measurement(found=False, has_ellipse=True)
        assert found.hc_mm is None and found.area_px == 0

    def test_without_spacing_there_are_no_millimetres(self) -> None:
        mask = ellipse(30, 22, 0.4, shape=(100, 120), centre=(50, 60))
        found, in_mm = measure_head(mask, None), measure_head(mask, (1.0, 1.0))
        assert found.hc_mm is None and found.axes_mm is None and found.hc_px > 0
        assert in_mm.hc_mm == in_mm.hc_px == found.hc_px

    def test_lines_and_points_do_not_break_it(self, backend: str) -> None:
        point, line = np.zeros((5, 9), np.uint8), np.zeros((5, 9), np.uint8)
        point[2, 3] = line[2, 1:8] = 1
        assert measure_head(point, (0.5, 0.5)).hc_mm == 0.0
        found = measure_head(line, None)
        assert found.axes_px == pytest.approx((4 * math.sqrt((7**2 - 1) / 12), 0.0)) and found.angle_deg == 0.0
        assert measure_head(line.T, None).angle_deg == 90.0


def lengths(found: Measurement) -> tuple[object, ...]:
    """What does not depend on where a mask lies or how it is turned."""
    return found.found, found.area_px, found.area_mm2, found.hc_mm, found.hc_px, found.axes_mm, found.axes_px


class TestSymmetry:
    @EXAMPLES
    @given(mask=MASKS, row_mm=st.floats(0.05, 2), col_mm=st.floats(0.05, 2))
    def test_flips_and_transposition(self, mask: np.ndarray, row_mm: float, col_mm: float) -> None:
        head = largest_component(mask)  # among equals a flip picks another one
        found = measure_head(head, (row_mm, col_mm))
        for other in (head[::-1], head[:, ::-1], head[::-1, ::-1]):
            same = measure_head(other, (row_mm, col_mm))
            assert lengths(same) == lengths(found)
        turned = measure_head(head.T, (col_mm, row_mm))
        assert lengths(turned) == lengths(found)
        assert turned.centre_px == found.centre_px[::-1]

    @EXAMPLES
    @given(mask=MASKS, down=st.integers(0, 900), right=st.integers(0, 900))
    def test_moving_changes_nothing_but_the_centre(self, mask: np.ndarray, down: int, right: int) -> None:
        moved = np.zeros((mask.shape[0] + down + 1, mask.shape[1] + right + 1), np.uint8)
        moved[down : down + mask.shape[0], right : right + mask.shape[1]] = mask
        here, there = measure_head(mask, (0.3, 0.2)), measure_head(moved, (0.3, 0.2))
        assert lengths(there) == lengths(here)

    @EXAMPLES
    @given(mask=MASKS, row_mm=st.floats(0.05, 2), col_mm=st.floats(0.05, 2), factor=st.floats(0.1, 10))
    def test_spacing_scales_lengths(self, mask: np.ndarray, row_mm: float, col_mm: float, factor: float) -> None:
        small = measure_head(mask, (row_mm, col_mm))
        large = measure_head(mask, (row_mm * factor, col_mm * factor))
        if small.hc_mm is None or large.hc_mm is None:
            assert not small.found
            return
        assert large.hc_mm == pytest.approx(small.hc_mm * factor, rel=1e-6, abs=1e-6)
        assert large.hc_px == small.hc_px

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(rows=st.integers(1, 4), cols=st.integers(1, 4))
    def test_anisotropic_pixels_give_the_same_head(self, rows: int, cols: int) -> None:
        """One head seen with finer rows or columns keeps its circumference; swapped spacings do not."""
        spacing = (0.8 / rows, 0.8 / cols)
        centre = (50.2 / 0.8 * rows, 50.6 / 0.8 * cols)
        mask = ellipse(40, 30, 0.5, shape=(126 * rows, 126 * cols), centre=centre, spacing=spacing)
        assert measure_head(mask, spacing).hc_mm == pytest.approx(perimeter(40, 30), rel=1e-3)
        if rows != cols:
            assert measure_head(mask, spacing[::-1]).hc_mm != pytest.approx(perimeter(40, 30), rel=1e-3)


class TestFormulas:
    @pytest.mark.parametrize(("a", "b"), [(1, 1), (10, 7), (10, 5), (10, 1), (5, 10)])
    def test_ramanujan_against_quadrature(self, a: float, b: float) -> None:
        assert ramanujan_mm(a, b) == pytest.approx(perimeter(a, b), rel=2e-5)

    def test_ramanujan_of_nothing(self) -> None:
        assert ramanujan_mm(0.0, 0.0) == 0.0

    def test_dice(self) -> None:
        a, b = np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)
        assert dice(a, b) == 1.0
        a[0, :3] = 1
        assert dice(a, b) == 0.0
        b[0, 1:] = 255
        assert dice(a, b) == dice(b, a) == pytest.approx(2 * 2 / 6)
        with pytest.raises(InputError, match="cannot be compared"):
            dice(a, b[:3])
