"""One image -> one crop with its two masks, from one seed.

Student and teacher both look at it.

The crop is a random part of the image, maybe flipped, with a mild gamma (methods.md 1.11); then a spatial mask and a
choice of frequency bands are drawn. The same seed gives the same view forever, which is what makes a bank of cached
teacher features possible. It does not know models.

Shapes: B batch, 1HW grey images 0..1, hw patch grid, K bands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyusfm_edge.training.pretrain.masking import MaskConfig, draw_bands, draw_spatial, mask_frequency, mask_spatial
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import IMAGENET_MEAN, IMAGENET_STD

VIEWS = ("spatial", "frequency", "clean")
"""Spatially masked, frequency masked, not masked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """How a crop is taken (our choice).

    Attributes:
        image_size: rows and columns of the crop, a multiple of 16.
        crop_area: smallest and largest share of the image's area.
        crop_aspect: largest ratio of the crop's sides.
        flip: probability of a left-right flip.
        gamma: largest exponent; its inverse is the smallest.
        mask: the masks.
    """

    image_size: int = 224
    crop_area: tuple[float, float] = (0.5, 1.0)
    crop_aspect: float = 4 / 3
    flip: float = 0.5
    gamma: float = 1.25
    mask: MaskConfig = MaskConfig()

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InputError: a size that is no multiple of 16, or a range that is none.
        """
        low, high = self.crop_area
        if self.image_size % 16 or not 32 <= self.image_size <= 1024:
            raise InputError(f"image_size {self.image_size} must be a multiple of 16 from 32 to 1024")
        if not 0 < low <= high <= 1 or self.crop_aspect < 1 or self.gamma < 1 or not 0 <= self.flip <= 1:
            raise InputError("crop_area must rise within (0, 1], crop_aspect and gamma be 1 or more, flip in [0, 1]")

    @property
    def stored_size(self) -> int:
        """Side at which images are kept.

        The smallest crop then needs no enlargement to speak of.
        """
        return 8 * math.ceil(self.image_size / math.sqrt(self.crop_area[0]) / 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """A batch of crops with their masks.

    Attributes:
        image_B1HW: brightness 0..1.
        mask_Bhw: bool, masked patches.
        bands_BK: bool, removed bands.
    """

    image_B1HW: Tensor
    mask_Bhw: Tensor
    bands_BK: Tensor


def draw_views(pixels: Sequence[np.ndarray], seeds: Sequence[int], config: ViewConfig) -> Views:
    """Draws one view an image.

    Args:
        pixels: uint8 squares of one size.
        seeds: one per image.
        config: ranges.

    Returns:
        The views, on the CPU.
    """
    thetas, gammas, masks, bands = [], [], [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        thetas.append(_draw_crop(config, generator))
        gammas.append(_draw_gamma(config, generator))
        masks.append(draw_spatial(config.mask, config.image_size, generator))
        bands.append(draw_bands(config.mask, generator))
    crops = _sampled(pixels, thetas, gammas, config.image_size)
    return Views(image_B1HW=crops, mask_Bhw=torch.stack(masks), bands_BK=torch.stack(bands))


def draw_crops(pixels: Sequence[np.ndarray], seeds: Sequence[int], config: ViewConfig) -> Tensor:
    """Draws one crop an image: the same as that of ``draw_views``, and no masks.

    Args:
        pixels: uint8 squares of one size.
        seeds: one per image.
        config: ranges.

    Returns:
        Brightness 0..1, B1HW, on the CPU.
    """
    thetas, gammas = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        thetas.append(_draw_crop(config, generator))
        gammas.append(_draw_gamma(config, generator))
    return _sampled(pixels, thetas, gammas, config.image_size)


def _draw_gamma(config: ViewConfig, generator: torch.Generator) -> Tensor:
    return torch.exp((2 * torch.rand((), generator=generator) - 1) * math.log(config.gamma))


def _sampled(pixels: Sequence[np.ndarray], thetas: list[Tensor], gammas: list[Tensor], side: int) -> Tensor:
    stacked = torch.from_numpy(np.stack(pixels))[:, None].float() / 255
    grid = F.affine_grid(torch.stack(thetas), [len(pixels), 1, side, side], align_corners=False)
    crops = F.grid_sample(stacked, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.clamp(0, 1) ** torch.stack(gammas).view(-1, 1, 1, 1)


def _draw_crop(config: ViewConfig, generator: torch.Generator) -> Tensor:
    """Affine 2x3 of a crop that lies inside the image."""
    area, aspect, x, y, flip = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    low, high = config.crop_area
    area = low + (high - low) * area
    ratio = math.exp((2 * aspect - 1) * math.log(config.crop_aspect))
    wide, tall = min(1.0, math.sqrt(area * ratio)), min(1.0, math.sqrt(area / ratio))
    sign = -1.0 if flip < config.flip else 1.0
    return torch.tensor([[sign * wide, 0, (1 - wide) * (2 * x - 1)], [0, tall, (1 - tall) * (2 * y - 1)]])


def masked(views: Views, kind: str, config: MaskConfig) -> Tensor:
    """The image of one view, B1HW 0..1.

    Args:
        views: crops and masks.
        kind: one of ``VIEWS``.
        config: mask sizes.

    Returns:
        Brightness 0..1.
    """
    if kind == "spatial":
        return mask_spatial(views.image_B1HW, views.mask_Bhw)
    if kind == "frequency":
        return mask_frequency(views.image_B1HW, config, views.bands_BK)
    return views.image_B1HW


def as_input(image_B1HW: Tensor) -> Tensor:
    """Brightness 0..1 -> three channels normalised as for ImageNet."""
    mean = torch.tensor(IMAGENET_MEAN, device=image_B1HW.device).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=image_B1HW.device).view(1, 3, 1, 1)
    return (image_B1HW - mean) / std


__all__ = ["VIEWS", "ViewConfig", "Views", "as_input", "draw_crops", "draw_views", "masked"]
