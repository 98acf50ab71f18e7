"""Domain-separated masks.

Blocks of pixels in space, rings of frequencies in the Fourier plane.

Spatial: square cells, a share of them replaced by the image's mean (USFM's ``BlockwiseMaskGenerator``, SimMIM's
defaults). Frequency: the annulus between a protected centre and an outer radius is cut into bands, a share of which is
removed (USFM's ``Frequency_MASK``); re-implemented from the description in methods.md 2.3, vectorised. Cells and radii
are given for 224 pixels and scale with the image, so another size removes the same relative frequencies.

It does not know models, losses or where randomness comes from.

Shapes: B batch, 1HW grey images, 0..1; K bands; a mask is True where something is removed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tinyusfm_runtime.errors import InputError

PATCH = 16
"""Side of the student's patches, pixels."""
REFERENCE = 224
"""Image size for which the sizes below are stated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskConfig:
    """Sizes and shares of both masks.

    The frequency values are our choice, USFM's are not published.

    Attributes:
        cell: side of a spatial cell at 224 pixels (SimMIM's 32).
        spatial_ratio: share of cells that are masked, rounded up (SimMIM's 0.6).
        centre: radius that is never removed, at 224.
        first: radius where the first band ends, at 224.
        growth: a band is this share of its inner radius wide, rounded down at 224.
        widest: largest width of a band, at 224.
        frequency_ratio: share of bands that are removed, rounded down, one at least.
    """

    cell: int = 32
    spatial_ratio: float = 0.6
    centre: int = 8
    first: int = 12
    growth: float = 0.25
    widest: int = 16
    frequency_ratio: float = 0.3

    def __post_init__(self) -> None:
        """Checks that bands grow and shares are shares.

        Raises:
            InputError: sizes from which no bands follow, or a share outside (0, 1).
        """
        if not 0 < self.spatial_ratio < 1 or not 0 < self.frequency_ratio < 1:
            raise InputError("spatial_ratio and frequency_ratio must lie in (0, 1)")
        if self.cell < PATCH or self.centre < 0 or self.centre >= self.first or self.widest < 1:
            raise InputError("cell must be at least 16, centre below first, widest at least 1")
        if int(self.first * self.growth) < 1 or self.first > REFERENCE // 2:
            raise InputError("first * growth must be at least 1, first at most 112, or no bands follow")


def band_radii(config: MaskConfig, size: int) -> tuple[float, ...]:
    """Radii of the bands for an image size.

    Band k is ``radii[k] < rho <= radii[k + 1]``.

    At 224 with the defaults: 8, 12, 15, 18, 22, 27, 33, 41, 51, 63, 78, 94, 110.

    Args:
        config: sizes at 224.
        size: rows and columns of the image.

    Returns:
        Ascending radii in frequency steps.
    """
    radii = [config.centre, config.first]
    while True:
        following = radii[-1] + min(int(radii[-1] * config.growth), config.widest)
        if following > REFERENCE // 2:
            break
        radii.append(following)
    return tuple(radius * size / REFERENCE for radius in radii)


@lru_cache(maxsize=16)
def band_index(config: MaskConfig, size: int) -> Tensor:
    """Which band each frequency of ``rfft2`` belongs to.

    Args:
        config: sizes at 224.
        size: rows and columns of the image.

    Returns:
        int64 H x (W/2+1); -1 in the protected centre and beyond the last radius.
    """
    # signed frequencies of the rows (H, 1), those of the half spectrum's columns (1, W/2+1)
    rows = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)[:, None]
    cols = torch.fft.rfftfreq(size, 1 / size, dtype=torch.float64)[None]
    # (H, W/2+1): distance from frequency 0 in frequency steps
    rho = torch.sqrt(rows**2 + cols**2)
    radii = torch.tensor(band_radii(config, size), dtype=torch.float64)
    index = torch.bucketize(rho, radii) - 1  # radii[k] < rho <= radii[k+1] -> k
    return torch.where(index >= len(radii) - 1, torch.full_like(index, -1), index)


def spatial_cell(config: MaskConfig, size: int) -> int:
    """Side of a cell for an image size.

    Scaled from 224, a whole number of patches, one at least.
    """
    return max(1, round(config.cell * size / REFERENCE / PATCH)) * PATCH


def draw_spatial(config: MaskConfig, size: int, generator: torch.Generator) -> Tensor:
    """Draws a spatial mask on the student's patch grid.

    Args:
        config: sizes and shares.
        size: rows and columns of the image, a multiple of 16.
        generator: source of randomness.

    Returns:
        bool, size/16 x size/16; True is masked. Every cell is masked whole or not at all.
    """
    # in patches; a cell is masked whole, so that a neighbour does not give it away
    grid, cell = size // PATCH, spatial_cell(config, size) // PATCH
    cells = math.ceil(grid / cell)
    order = torch.randperm(cells * cells, generator=generator)
    mask = torch.zeros(cells * cells, dtype=torch.bool)
    mask[order[: math.ceil(config.spatial_ratio * cells * cells)]] = True
    # (cells, cells) -> (cells cell, cells cell), then cut to the grid
    whole = mask.view(cells, cells).repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    return whole[:grid, :grid].contiguous()


def draw_bands(config: MaskConfig, generator: torch.Generator) -> Tensor:
    """Draws which bands are removed.

    Args:
        config: sizes and shares.
        generator: source of randomness.

    Returns:
        bool K; the number of bands does not depend on the image's size.
    """
    count = len(band_radii(config, REFERENCE)) - 1
    removed = torch.zeros(count, dtype=torch.bool)
    removed[torch.randperm(count, generator=generator)[: max(1, int(config.frequency_ratio * count))]] = True
    return removed


def pixels_of(mask_Bhw: Tensor) -> Tensor:
    """A mask on the patch grid as a mask of pixels, B1HW bool."""
    # (B, h, w) -> (B, 1, 16 h, 16 w)
    return mask_Bhw.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]


def mask_spatial(image_B1HW: Tensor, mask_Bhw: Tensor) -> Tensor:
    """Replaces masked patches by the image's mean.

    Args:
        image_B1HW: brightness 0..1.
        mask_Bhw: bool on the patch grid.

    Returns:
        Images of the same shape.
    """
    mean = image_B1HW.mean((2, 3), keepdim=True)
    return torch.where(pixels_of(mask_Bhw), mean, image_B1HW)


def removed_frequencies(config: MaskConfig, size: int, bands_BK: Tensor) -> Tensor:
    """Bands as a mask of ``rfft2`` coefficients.

    Args:
        config: sizes at 224.
        size: rows and columns of the image.
        bands_BK: bool, True is removed.

    Returns:
        bool B x 1 x H x (W/2+1).
    """
    index = band_index(config, size).to(bands_BK.device)
    padded = torch.cat([bands_BK, torch.zeros_like(bands_BK[:, :1])], 1)  # the last entry serves index -1
    # (B, K + 1) looked up by (H, W/2+1): index -1 takes the last, never removed entry
    return padded[:, index][:, None]


def mask_frequency(image_B1HW: Tensor, config: MaskConfig, bands_BK: Tensor) -> Tensor:
    """Removes bands of frequencies.

    Args:
        image_B1HW: brightness 0..1, square.
        config: sizes at 224.
        bands_BK: bool, True is removed.

    Returns:
        Images 0..1: the magnitude of the inverse transform, clipped (USFM takes ``abs`` as well).
    """
    size = image_B1HW.shape[-1]
    # (B, 1, H, W/2+1)
    spectrum = torch.fft.rfft2(image_B1HW.float())
    spectrum = spectrum.masked_fill(removed_frequencies(config, size, bands_BK), 0)
    return torch.fft.irfft2(spectrum, s=(size, size)).abs().clamp(0, 1)


__all__ = [
    "PATCH",
    "REFERENCE",
    "MaskConfig",
    "band_index",
    "band_radii",
    "draw_bands",
    "draw_spatial",
    "mask_frequency",
    "mask_spatial",
    "pixels_of",
    "removed_frequencies",
    "spatial_cell",
]
