"""Masks keep their laws: bands partition the annulus, the centre is safe, images stay real, finite and in range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_edge.training.pretrain.masking import (
    MaskConfig,
    band_index,
    band_radii,
    draw_bands,
    draw_spatial,
    mask_frequency,
    mask_spatial,
    pixels_of,
    removed_frequencies,
    spatial_cell,
)
from tinyusfm_runtime.errors import InputError

CONFIG = MaskConfig()
SIZES = st.sampled_from([32, 48, 96, 112, 160, 224])
SEEDS = st.integers(0, 2**40)


def rho(size: int) -> torch.Tensor:
    """Distance of every ``rfft2`` frequency from zero, computed one by one."""
    rows = [r if r < size / 2 else r - size for r in range(size)]
    return torch.tensor([[math.hypot(r, c) for c in range(size // 2 + 1)] for r in rows], dtype=torch.float64)


def test_radii_at_224_are_the_stated_ones() -> None:
    assert band_radii(CONFIG, 224) == (8, 12, 15, 18, 22, 27, 33, 41, 51, 63, 78, 94, 110)
    assert band_radii(CONFIG, 112) == tuple(r / 2 for r in band_radii(CONFIG, 224))


@given(SIZES)
@settings(max_examples=12, deadline=None)
def test_bands_partition_the_annulus(size: int) -> None:
    radii, index, distance = band_radii(CONFIG, size), band_index(CONFIG, size), rho(size)
    inside = (distance > radii[0]) & (distance <= radii[-1])
    assert torch.equal(index >= 0, inside), "each frequency of the annulus in one band, none outside"
    for band in range(len(radii) - 1):
        here = distance[index == band]
        assert len(here) > 0, "no band is empty at any size"
        assert radii[band] < float(here.min())
        assert float(here.max()) <= radii[band + 1]


@given(SIZES, SEEDS)
@settings(max_examples=25, deadline=None)
def test_frequency_masking_keeps_the_centre_and_gives_real_finite_images(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 1, size, size, generator=generator)
    bands = torch.stack([draw_bands(CONFIG, generator) for _ in range(2)])
    assert bands.sum(1).tolist() == [3, 3]
    removed = removed_frequencies(CONFIG, size, bands)
    centre = rho(size) <= band_radii(CONFIG, size)[0]
    assert not removed[:, 0][:, centre].any()
    found = mask_frequency(image, CONFIG, bands)
    assert found.shape == image.shape
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found).all())
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_removed_bands_are_gone_and_the_others_stay() -> None:
    generator = torch.Generator().manual_seed(2)
    image = 0.5 + 0.02 * torch.randn(1, 1, 112, 112, generator=generator)  # far from 0 and 1: nothing is clipped
    bands = draw_bands(CONFIG, generator)[None]
    before, after = torch.fft.rfft2(image), torch.fft.rfft2(mask_frequency(image, CONFIG, bands))
    removed = removed_frequencies(CONFIG, 112, bands)
    assert float(after[removed].abs().max()) < 1e-3
    torch.testing.assert_close(after[~removed], before[~removed], atol=1e-3, rtol=1e-3)


def test_the_same_relative_frequencies_go_at_every_size() -> None:
    bands = torch.zeros(1, 12, dtype=torch.bool)
    bands[0, 5] = True
    for size in (112, 224):
        place = rho(size)[removed_frequencies(CONFIG, size, bands)[0, 0]] / size
        assert float(place.min()) > 27 / 224
        assert float(place.max()) <= 33 / 224


def test_one_full_transform_agrees_with_the_half_one() -> None:
    """Against the description word by word: shifted full transform, bands by radius around N/2."""
    image = torch.rand(1, 1, 48, 48, generator=torch.Generator().manual_seed(1))
    bands = torch.zeros(1, 12, dtype=torch.bool)
    bands[0, [1, 4, 7]] = True
    radii = band_radii(CONFIG, 48)
    axis = torch.arange(48, dtype=torch.float64) - 24
    distance = torch.hypot(axis[:, None], axis[None])
    keep = torch.ones(48, 48)
    for band in (1, 4, 7):
        keep[(distance > radii[band]) & (distance <= radii[band + 1])] = 0
    spectrum = torch.fft.fftshift(torch.fft.fft2(image), (-2, -1)) * keep
    expected = torch.fft.ifft2(torch.fft.ifftshift(spectrum, (-2, -1))).abs().clamp(0, 1)
    torch.testing.assert_close(mask_frequency(image, CONFIG, bands), expected, atol=1e-5, rtol=1e-5)


@given(SIZES, SEEDS)
@settings(max_examples=25, deadline=None)
def test_spatial_masks_hide_whole_cells_and_the_stated_share(size: int, seed: int) -> None:
    mask = draw_spatial(CONFIG, size, torch.Generator().manual_seed(seed))
    grid, cell = size // 16, spatial_cell(CONFIG, size) // 16
    assert mask.shape == (grid, grid)
    cells = math.ceil(grid / cell)
    hidden = 0
    for row in range(cells):
        for col in range(cells):
            part = mask[row * cell : (row + 1) * cell, col * cell : (col + 1) * cell]
            assert bool(part.all()) or not bool(part.any())
            hidden += bool(part.all())
    assert hidden == math.ceil(0.6 * cells * cells)


def test_a_cell_is_32_pixels_at_224_and_16_at_112() -> None:
    assert [spatial_cell(CONFIG, size) for size in (224, 112, 448)] == [32, 16, 64]


def test_masked_pixels_become_the_mean_and_the_others_stay() -> None:
    image = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(4))
    mask = torch.stack([draw_spatial(CONFIG, 64, torch.Generator().manual_seed(s)) for s in (1, 2)])
    found, hidden = mask_spatial(image, mask), pixels_of(mask)
    assert torch.equal(found[~hidden], image[~hidden])
    for one in range(2):
        torch.testing.assert_close(found[one][hidden[one]], image[one].mean().expand(int(hidden[one].sum())))


@pytest.mark.parametrize(
    "wrong", [{"first": 3, "centre": 2}, {"centre": 12}, {"spatial_ratio": 1.0}, {"cell": 8}, {"frequency_ratio": 0.0}]
)
def test_sizes_from_which_no_bands_follow_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError):
        MaskConfig(**wrong)  # type: ignore[arg-type]
