"""What happens to an image at the bedside.

Shadows, missing echoes, Doppler boxes, bars, and whole cart screens.

One image at a time, everything from one generator. Shadows, missing echoes and Doppler leave the mask where it is:
the head is there, though it is not seen. Bars and screens move image and mask together. Ranges are ours; that of
tinyusfm_edge/evaluation/stress.py are fixed and drawn by other code. It does not know models.

Shapes: HW images and masks, float 0..1.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _axes(image_HW: Tensor) -> tuple[Tensor, Tensor]:
    height, width = image_HW.shape
    return torch.arange(height).float()[:, None], torch.arange(width).float()[None]


def acoustic_shadows(image_HW: Tensor, mask_HW: Tensor, generator: torch.Generator) -> Tensor:
    """One to four dark stripes along the beam, from some depth down.

    Usually they go through the head.

    Args:
        image_HW: the image.
        mask_HW: where the head is; stripes stand anywhere in an empty one.
        generator: source of randomness.
    """
    height, width = image_HW.shape
    rows, cols = _axes(image_HW)
    columns = torch.nonzero(mask_HW.amax(0) > 0.5).flatten()
    apex = -_between(0.1, 1.5, generator) * height
    straight = float(torch.rand((), generator=generator)) < 0.5
    thin = float(torch.rand((), generator=generator)) < 0.5
    count = 1 + int(torch.randint(4 if thin else 2, (), generator=generator))
    for _ in range(count):
        centre = _between(0, width, generator)
        if len(columns) and float(torch.rand((), generator=generator)) < 0.8:
            centre = float(columns[int(torch.randint(len(columns), (), generator=generator))])
        half = width * (_between(0.01, 0.04, generator) if thin else _between(0.04, 0.14, generator))
        start = _between(-0.1, 0.45, generator) * height
        depth = _between(0.6, 0.97, generator)
        # along a beam from the apex the distance from the middle grows with the depth
        spread = torch.ones_like(rows) if straight else (rows - apex) / (height / 2 - apex)
        middle = width / 2 + (centre - width / 2) * spread
        profile = torch.sigmoid((half * spread - (cols - middle).abs()) / (0.15 * half + 0.5))
        below = torch.sigmoid((rows - start) / (0.02 * height))
        image_HW = image_HW * (1 - depth * profile * below)
    return image_HW


def missing_sides(image_HW: Tensor, mask_HW: Tensor, generator: torch.Generator) -> Tensor:
    """The skull's lateral ends lose their echo, as where the beam runs along the bone.

    Args:
        image_HW: the image.
        mask_HW: where the head is; an empty one changes nothing.
        generator: source of randomness.
    """
    inside = mask_HW > 0.5
    if not bool(inside.any()):
        return image_HW
    rows, cols = _axes(image_HW)
    weight = inside.float() / inside.sum()
    row, col = float((weight * rows).sum()), float((weight * cols).sum())
    size = 2 * round(_between(0.02, 0.05, generator) * min(image_HW.shape)) + 1
    near = mask_HW[None, None]
    ring = F.max_pool2d(near, size, 1, size // 2) + F.max_pool2d(-near, size, 1, size // 2)
    sideways = torch.cos(torch.atan2(rows - row, cols - col))
    power, side = _between(2, 8, generator), int(torch.randint(3, (), generator=generator))
    part = (sideways.clamp(min=0), (-sideways).clamp(min=0), sideways.abs())[side] ** power
    soft = F.avg_pool2d(ring, 3, 1, 1)[0, 0]
    return image_HW * (1 - _between(0.5, 1.0, generator) * soft * part)


def doppler_box(image_HW: Tensor, generator: torch.Generator) -> Tensor:
    """A box with the grey of coloured flow in it, and its frame."""
    height, width = image_HW.shape
    tall, wide = _between(0.2, 0.5, generator), _between(0.2, 0.5, generator)
    top, left = int(_between(0, 1 - tall, generator) * height), int(_between(0, 1 - wide, generator) * width)
    bottom, right = min(height, top + int(tall * height)), min(width, left + int(wide * width))
    image = image_HW.clone()
    coarse = torch.rand(1, 1, 7, 7, generator=generator)
    flow = F.interpolate(coarse, size=(bottom - top, right - left), mode="bicubic", align_corners=False)[0, 0]
    fills = flow > _between(0.5, 0.8, generator)
    colour = 0.3 + 0.4 * F.interpolate(coarse.flip(3), size=flow.shape, mode="bilinear", align_corners=False)[0, 0]
    image[top:bottom, left:right] = torch.where(fills, colour, image[top:bottom, left:right])
    line = _between(0.5, 1.0, generator)
    image[top, left:right] = image[bottom - 1, left:right] = line
    image[top:bottom, left] = image[top:bottom, right - 1] = line
    return image


def _resized(image_HW: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(
        image_HW[None, None], size=(height, width), mode="bilinear", align_corners=False, antialias=True
    )[0, 0].clamp(0, 1)


def padded(image_HW: Tensor, mask_HW: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Black bars at two sides, or at all four, as of another aspect ratio or a window."""
    height, width = image_HW.shape
    share, both = _between(0.6, 0.97, generator), float(torch.rand((), generator=generator)) < 0.3
    along = float(torch.rand((), generator=generator)) < 0.5
    tall = round(height * (share if along or both else 1.0))
    wide = round(width * (1.0 if along and not both else share))
    top, left = (height - tall) // 2, (width - wide) // 2
    canvas, place = torch.zeros_like(image_HW), torch.zeros_like(mask_HW)
    canvas[top : top + tall, left : left + wide] = _resized(image_HW, tall, wide)
    place[top : top + tall, left : left + wide] = _resized(mask_HW, tall, wide)
    return canvas, place


def cart_screen(image_HW: Tensor, mask_HW: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The image as a window on a cart's screen.

    Panels, lines of writing, a grey bar, marks of depth.

    Args:
        image_HW: the image.
        mask_HW: its mask.
        generator: source of randomness.

    Returns:
        Screen and mask of the same size.
    """
    height, width = image_HW.shape
    # a screen is wider than the image it holds, and both are stretched to one size here
    tall, wide = round(height * _between(0.6, 0.92, generator)), round(width * _between(0.45, 0.85, generator))
    top, left = int(_between(0, height - tall, generator)), int(_between(0, width - wide, generator))
    canvas = torch.full_like(image_HW, _between(0.0, 0.15, generator))
    bright = _between(0.3, 0.9, generator)
    for _ in range(int(torch.randint(2, 9, (), generator=generator))):
        _writing(canvas, bright, generator)
    if float(torch.rand((), generator=generator)) < 0.5:
        rows, cols = int(0.3 * height), max(2, width // 60)
        at = int(_between(0, width - cols, generator))
        canvas[height // 10 : height // 10 + rows, at : at + cols] = torch.linspace(1, 0, rows)[:, None]
    place = torch.zeros_like(mask_HW)
    canvas[top : top + tall, left : left + wide] = _resized(image_HW, tall, wide)
    place[top : top + tall, left : left + wide] = _resized(mask_HW, tall, wide)
    if float(torch.rand((), generator=generator)) < 0.5:
        step = max(4, tall // int(torch.randint(5, 14, (), generator=generator)))
        edge = min(width - 1, left + wide)
        canvas[top : top + tall : step, max(0, edge - 2) : edge] = bright
    return canvas, place


def _writing(canvas_HW: Tensor, bright: float, generator: torch.Generator) -> None:
    """A block that looks like a line of letters from afar, in place."""
    height, width = canvas_HW.shape
    tall = max(2, int(_between(0.01, 0.03, generator) * height))
    wide = max(4, int(_between(0.05, 0.3, generator) * width))
    top, left = int(_between(0, height - tall, generator)), int(_between(0, max(1, width - wide), generator))
    letters = (torch.rand(tall, math.ceil(wide / 2), generator=generator) < 0.5).repeat_interleave(2, 1)[:, :wide]
    block = canvas_HW[top : top + tall, left : left + wide]
    block[letters[:, : block.shape[1]]] = bright


__all__ = ["acoustic_shadows", "cart_screen", "doppler_box", "missing_sides", "padded"]
