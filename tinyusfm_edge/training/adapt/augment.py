"""Augmentation of grey images and their masks, in torch, on whole batches.

Geometry: flips, rotation, scale, aspect, shift. Brightness: gamma, contrast, gain, a depth ramp, noise, blur, dropped
blocks. What happens at the bedside (bedside.py) comes by probabilities, none by default. It does not know the model;
every range is a named field.

Shapes: B batch, 1HW images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyusfm_edge.training.adapt.bedside import acoustic_shadows, cart_screen, doppler_box, missing_sides, padded
from tinyusfm_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Ranges of the augmentation.

    Our choice; the official recipe flips, rotates by 30 degrees, scales 1-1.3.

    Attributes:
        geometry: probability that a sample is moved at all, 0..1.
        rotate_deg: largest rotation.
        scale: smallest and largest enlargement.
        aspect: largest ratio between column and row enlargement.
        shift: largest shift as a fraction of the side.
        gamma: smallest and largest exponent.
        contrast: smallest and largest factor about the mean.
        gain: largest added brightness, 0..1.
        ramp: largest relative change of brightness from the top row to the bottom row, 0..2.
        noise: largest standard deviation of added noise, 0..1.
        blur: largest share of a 3x3 mean, 0..1; half of the samples get none.
        erase: probability of one dropped block.
        shadow: probability of acoustic shadows.
        sides: probability that the head's lateral ends lose their echo.
        doppler: probability of a Doppler box.
        bars: probability of black bars.
        screen: probability that the image is a window on a cart's screen.
    """

    geometry: float = 0.85
    rotate_deg: float = 30.0
    scale: tuple[float, float] = (0.75, 1.35)
    aspect: float = 1.25
    shift: float = 0.12
    gamma: tuple[float, float] = (0.6, 1.7)
    contrast: tuple[float, float] = (0.6, 1.5)
    gain: float = 0.12
    ramp: float = 0.8
    noise: float = 0.05
    blur: float = 1.0
    erase: float = 0.3
    shadow: float = 0.0
    sides: float = 0.0
    doppler: float = 0.0
    bars: float = 0.0
    screen: float = 0.0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InputError: a probability outside 0..1, a rotation beyond 180 degrees, or a scale that is none.
        """
        chances = (self.geometry, self.erase, self.shadow, self.sides, self.doppler, self.bars, self.screen)
        if not all(0 <= chance <= 1 for chance in chances) or not 0 <= self.rotate_deg <= 180:
            raise InputError("augmentation: probabilities lie in [0, 1], rotate_deg in [0, 180]")
        if not 0 < self.scale[0] <= self.scale[1] or self.aspect < 1:
            raise InputError("augmentation: scale rises from above 0, aspect is 1 or more")

    def halved(self) -> AugmentConfig:
        """Every range at half its width, for the last steps of a training."""

        def root(pair: tuple[float, float]) -> tuple[float, float]:
            return pair[0] ** 0.5, pair[1] ** 0.5

        return AugmentConfig(
            geometry=self.geometry / 2,
            rotate_deg=self.rotate_deg / 2,
            scale=root(self.scale),
            aspect=self.aspect**0.5,
            shift=self.shift / 2,
            gamma=root(self.gamma),
            contrast=root(self.contrast),
            gain=self.gain / 2,
            ramp=self.ramp / 2,
            noise=self.noise / 2,
            blur=self.blur / 2,
            erase=self.erase / 2,
            shadow=self.shadow / 2,
            sides=self.sides / 2,
            doppler=self.doppler / 2,
            bars=self.bars / 2,
            screen=self.screen / 2,
        )


def augment(
    image_B1HW: Tensor, mask_B1HW: Tensor, config: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Applies one random augmentation per sample.

    Args:
        image_B1HW: brightness, float 0..1.
        mask_B1HW: float 0..1.
        config: ranges.
        generator: the source of randomness; the same state gives the same batch.

    Returns:
        Images and masks, float 0..1; masks stay soft at moved borders.
    """
    image_B1HW, mask_B1HW = _move(image_B1HW, mask_B1HW, config, generator)
    if config.shadow or config.sides or config.doppler:
        pairs = zip(image_B1HW, mask_B1HW, strict=True)
        image_B1HW = torch.stack([_hide(image, mask, config, generator) for image, mask in pairs])
    image_B1HW = _recolour(image_B1HW, config, generator)
    if not config.bars and not config.screen:
        return image_B1HW, mask_B1HW
    framed = [_frame(image, mask, config, generator) for image, mask in zip(image_B1HW, mask_B1HW, strict=True)]
    return torch.stack([image for image, _ in framed]), torch.stack([mask for _, mask in framed])


def _chance(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability


def _hide(image_1HW: Tensor, mask_1HW: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Echoes that are lost or covered; the mask stays."""
    image, mask = image_1HW[0], mask_1HW[0]
    if _chance(config.sides, generator):
        image = missing_sides(image, mask, generator)
    if _chance(config.shadow, generator):
        image = acoustic_shadows(image, mask, generator)
    if _chance(config.doppler, generator):
        image = doppler_box(image, generator)
    return image[None]


def _frame(
    image_1HW: Tensor, mask_1HW: Tensor, config: AugmentConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What stands round an image, which moves it."""
    if _chance(config.screen, generator):
        image, mask = cart_screen(image_1HW[0], mask_1HW[0], generator)
    elif _chance(config.bars, generator):
        image, mask = padded(image_1HW[0], mask_1HW[0], generator)
    else:
        return image_1HW, mask_1HW
    return image[None], mask[None]


def _uniform(batch: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, generator=generator) * (high - low) + low


def _move(image: Tensor, mask: Tensor, config: AugmentConfig, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    batch = image.shape[0]
    # all (B,), one draw per sample; scale and aspect are even on a logarithmic scale
    angle = _uniform(batch, -1, 1, generator) * math.radians(config.rotate_deg)
    scale = torch.exp(_uniform(batch, math.log(config.scale[0]), math.log(config.scale[1]), generator))
    aspect = torch.exp(_uniform(batch, -1, 1, generator) * math.log(config.aspect) / 2)
    # (2, B) of -1 or 1: mirrored across, mirrored down
    flip = 1.0 - 2.0 * (torch.rand(2, batch, generator=generator) < 0.5).float()
    shift = _uniform(batch * 2, -2, 2, generator).reshape(2, batch) * config.shift
    cos, sin = torch.cos(angle), torch.sin(angle)
    # a rotation of an image that was mirrored and stretched first: whatever the angle, nothing collapses
    across, down = flip[0] / (scale * aspect), flip[1] * aspect / scale
    # (B, 2, 3): output coordinates in -1..1 to input coordinates
    theta = torch.stack(
        [
            torch.stack([cos * across, -sin * down, shift[0]], 1),
            torch.stack([sin * across, cos * down, shift[1]], 1),
        ],
        1,
    )
    keep = torch.rand(batch, generator=generator) >= config.geometry
    identity = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    theta = torch.where(keep[:, None, None], identity, theta)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    # image and mask in one call, so that they stay together: (B, 2, H, W)
    both = F.grid_sample(torch.cat([image, mask], 1), grid, mode="bilinear", align_corners=False)
    return both[:, :1], both[:, 1:]


def _recolour(image: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    batch, _, height, width = image.shape
    view = (batch, 1, 1, 1)
    gamma = torch.exp(_uniform(batch, math.log(config.gamma[0]), math.log(config.gamma[1]), generator)).view(view)
    image = image.clamp(0, 1) ** gamma
    # about the image's own mean, so that it gets no brighter by it
    contrast = _uniform(batch, *config.contrast, generator).view(view)
    mean = image.mean((1, 2, 3), keepdim=True)
    image = (image - mean) * contrast + mean + _uniform(batch, -1, 1, generator).view(view) * config.gain * mean
    # (1, 1, H, 1): brightness that changes with depth, as a wrong gain curve does
    ramp = torch.linspace(-0.5, 0.5, height).view(1, 1, height, 1)
    image = image * (1 + ramp * _uniform(batch, -1, 1, generator).view(view) * config.ramp)
    sigma = _uniform(batch, 0, config.noise, generator).view(view)
    image = image + torch.randn(image.shape, generator=generator) * sigma
    blurred = F.avg_pool2d(image, 3, 1, 1, count_include_pad=False)
    # half of the samples get none
    mix = _uniform(batch, -1, 1, generator).clamp(0, 1).view(view) * config.blur
    image = image * (1 - mix) + blurred * mix
    return _erase(image, config.erase, generator).clamp(0, 1)


def _erase(image: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    batch, _, height, width = image.shape
    # (1, H, 1) and (1, 1, W) against (B, 1, 1): a hole per sample, (B, H, W)
    rows, cols = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    top = (torch.rand(batch, generator=generator) * height).view(-1, 1, 1)
    left = (torch.rand(batch, generator=generator) * width).view(-1, 1, 1)
    tall = (_uniform(batch, 0.05, 0.3, generator) * height).view(-1, 1, 1)
    wide = (_uniform(batch, 0.05, 0.3, generator) * width).view(-1, 1, 1)
    hole = (rows >= top) & (rows < top + tall) & (cols >= left) & (cols < left + wide)
    hole &= (torch.rand(batch, generator=generator) < probability).view(-1, 1, 1)
    return image.masked_fill(hole[:, None], 0.0)


__all__ = ["AugmentConfig", "augment"]
