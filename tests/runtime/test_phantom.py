"""The phantom: the same seed draws the same image forever, and its truth is true."""

from __future__ import annotations

import numpy as np
import pytest

from tinyusfm_runtime.errors import FrameError
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.numerics.measure import measure_head
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.phantom import Phantom, make_phantom


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(seed) for seed in range(24)]


def test_the_same_seed_gives_the_same_frame(phantoms: list[Phantom]) -> None:
    again = make_phantom(5)
    assert np.array_equal(again.frame.pixels, phantoms[5].frame.pixels)
    assert np.array_equal(again.mask_HW, phantoms[5].mask_HW)
    assert (again.hc_mm, again.frame.spacing_mm) == (phantoms[5].hc_mm, phantoms[5].frame.spacing_mm)
    assert not np.array_equal(phantoms[5].frame.pixels, phantoms[6].frame.pixels)


@pytest.mark.parametrize(
    ("seed", "hc_mm", "area_px", "mean", "deviation"),
    [
        (0, 195.61418533596424, 32950, 144.0737, 23.5378),
        (1, 141.54713957856063, 36005, 31.3243, 34.2158),
        (2, 181.09623860812138, 53521, 88.4029, 49.2616),
    ],
)
def test_what_a_seed_draws_is_pinned(
    phantoms: list[Phantom], seed: int, hc_mm: float, area_px: int, mean: float, deviation: float
) -> None:
    """Students were trained on these images; statistics, since numpy's exp differs by machine in the last bit."""
    phantom = phantoms[seed]
    assert phantom.hc_mm == pytest.approx(hc_mm, rel=1e-12)
    assert abs(int(phantom.mask_HW.sum()) - area_px) <= 2
    assert (phantom.frame.pixels.mean(), phantom.frame.pixels.std()) == pytest.approx((mean, deviation), abs=0.05)


def test_the_circumference_is_that_of_the_mask(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        found = measure_head(phantom.mask_HW, phantom.frame.spacing_mm)
        assert found.hc_mm == pytest.approx(phantom.hc_mm, rel=0.0015)
        assert not found.touches_border and found.area_px == int(phantom.mask_HW.sum())


def test_a_wrong_spacing_would_be_seen(phantoms: list[Phantom]) -> None:
    row_mm, col_mm = phantoms[0].frame.spacing_mm or (0.0, 0.0)
    found = measure_head(phantoms[0].mask_HW, (row_mm, 1.02 * col_mm))
    assert found.hc_mm != pytest.approx(phantoms[0].hc_mm, rel=0.0015)


def test_frames_are_fit_for_use(phantoms: list[Phantom]) -> None:
    for seed, phantom in enumerate(phantoms):
        frame = phantom.frame
        assert frame.pixels.dtype == np.uint8 and frame.pixels.shape == phantom.mask_HW.shape == (270, 400)
        assert frame.pixel_format is PixelFormat.GREY and frame.seq == seed
        assert frame.spacing_mm is not None and 0.1 < frame.spacing_mm[0] == frame.spacing_mm[1] < 0.5
        assert phantom.mask_HW.dtype == np.uint8 and set(np.unique(wide(phantom.mask_HW))) == {0, 1}
        assert 0.05 < phantom.mask_HW.mean() < 0.8 and 60 < phantom.hc_mm < 450
        assert frame.pixels.std() > 8, "a flat image teaches nothing"
    brain = np.median(wide([p.frame.pixels[p.mask_HW == 1].mean() for p in phantoms]))
    skull = np.median(wide([p.frame.pixels[ring(p.mask_HW)].mean() for p in phantoms]))
    assert skull > brain + 10, "the skull must stand out from the brain"


def ring(mask_HW: np.ndarray) -> np.ndarray:
    """Pixels inside the mask within three of its border."""
    inner = mask_HW.astype(bool)
    for _ in range(3):
        inner = inner & np.roll(inner, 1, 0) & np.roll(inner, -1, 0) & np.roll(inner, 1, 1) & np.roll(inner, -1, 1)
    return mask_HW.astype(bool) & ~inner


@pytest.mark.parametrize("size", [(64, 64), (135, 200), (600, 800)])
def test_other_sizes(size: tuple[int, int]) -> None:
    phantom = make_phantom(3, height=size[0], width=size[1])
    assert phantom.frame.pixels.shape == size
    assert measure_head(phantom.mask_HW, phantom.frame.spacing_mm).hc_mm == pytest.approx(phantom.hc_mm, rel=0.015)


def test_a_frame_checks_its_pixels() -> None:
    with pytest.raises(FrameError, match="uint8"):
        Frame(pixels=np.zeros((20, 20), np.float32))
    with pytest.raises(FrameError, match="cannot have shape"):
        Frame(pixels=np.zeros((20, 20, 3), np.uint8))
