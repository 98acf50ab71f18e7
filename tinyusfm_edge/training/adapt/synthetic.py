"""A cheap transfer set, without a generative model (methods.md 5).

Labelled images are bent, shaded and speckled again.

An image and its mask are warped together (affine and a smooth displacement), then the image gets what changes
between examinations: attenuation with depth, shadows behind bone or gas, speckle, and the amplitude of another
image's low frequencies ("style", Fourier domain adaptation, Yang & Soatto 2020). Everything follows from a seed.
Synthetic images carry no label of their own: only the distillation terms see them. It does not know models.

Shapes: HW images 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Ranges of the generator (our choice).

    Attributes:
        rotate_deg: largest rotation.
        scale: smallest and largest enlargement.
        bend: largest displacement, as a share of the side.
        cells: control points per side of the displacement.
        attenuation: largest loss of brightness from the first to the last row, 0..1.
        shadow: probability of a shadow.
        shadow_depth: largest loss inside a shadow, 0..1.
        speckle: largest standard deviation of the multiplicative noise.
        style: largest share of another image's low-frequency amplitude, 0..1.
        style_band: half width of the low band, as a share of the side.
    """

    rotate_deg: float = 40.0
    scale: tuple[float, float] = (0.75, 1.3)
    bend: float = 0.06
    cells: int = 4
    attenuation: float = 0.5
    shadow: float = 0.5
    shadow_depth: float = 0.7
    speckle: float = 0.35
    style: float = 0.8
    style_band: float = 0.05


def synthesise(
    image_HW: np.ndarray, mask_HW: np.ndarray, style_HW: np.ndarray, seed: int, config: SyntheticConfig | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One synthetic image and its mask.

    Args:
        image_HW: uint8.
        mask_HW: uint8 0/1 of the same size.
        style_HW: uint8, another image of the same size.
        seed: of everything.
        config: ranges.

    Returns:
        uint8 image and uint8 0/1 mask.
    """
    ranges = config or SyntheticConfig()
    rng = np.random.default_rng(seed)
    image, mask = _warp(image_HW.astype(np.float32) / 255.0, mask_HW.astype(np.float32), ranges, rng)
    image = swap_style(image, style_HW.astype(np.float32) / 255.0, rng.uniform(0, ranges.style), ranges.style_band)
    image = _shade(image, ranges, rng)
    image = image * _speckle(image.shape, rng.uniform(0, ranges.speckle), rng)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8), (mask >= 0.5).astype(np.uint8)


def _warp(
    image_HW: np.ndarray, mask_HW: np.ndarray, ranges: SyntheticConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    height, width = image_HW.shape
    angle, scale = rng.uniform(-ranges.rotate_deg, ranges.rotate_deg), rng.uniform(*ranges.scale)
    # (2, 3): where each output pixel comes from
    affine = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1 / scale).astype(np.float32)
    cols, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    # (2, cells, cells) displacements, enlarged to a smooth field (H, W) for x and for y
    shift = rng.uniform(-1, 1, (2, ranges.cells, ranges.cells)).astype(np.float32) * ranges.bend * min(height, width)
    bend = [cv2.resize(part, (width, height), interpolation=cv2.INTER_CUBIC) for part in shift]
    # (H, W) each: column and row in the source
    map_x = affine[0, 0] * cols + affine[0, 1] * rows + affine[0, 2] + bend[0]
    map_y = affine[1, 0] * cols + affine[1, 1] * rows + affine[1, 2] + bend[1]
    moved = [cv2.remap(part, map_x, map_y, cv2.INTER_LINEAR, borderValue=0.0) for part in (image_HW, mask_HW)]
    return moved[0], moved[1]


def swap_style(image_HW: np.ndarray, style_HW: np.ndarray, share: float, band: float) -> np.ndarray:
    """Gives an image the low-frequency amplitude of another, its own phase kept.

    Args:
        image_HW: 0..1.
        style_HW: of the same size.
        share: of the other's amplitude, 0..1; 0 changes nothing.
        band: half width of the band about frequency 0, as a share of the side.

    Returns:
        float32 HW, possibly a little outside 0..1.
    """
    spectrum, other = (np.fft.fftshift(np.fft.fft2(x)) for x in (image_HW, style_HW))
    amplitude, phase = np.abs(spectrum), np.angle(spectrum)
    height, width = image_HW.shape
    half = max(1, int(band * min(height, width)))
    # symmetric about frequency 0, so that the image stays real
    low = np.s_[height // 2 - half : height // 2 + half + 1, width // 2 - half : width // 2 + half + 1]
    amplitude[low] = (1 - share) * amplitude[low] + share * np.abs(other[low])
    return np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * phase))).real.astype(np.float32)


def _shade(image_HW: np.ndarray, ranges: SyntheticConfig, rng: np.random.Generator) -> np.ndarray:
    height, width = image_HW.shape
    depth = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    image = image_HW * (1 - rng.uniform(0, ranges.attenuation) * depth)
    if rng.uniform() < ranges.shadow:
        centre, spread, start = rng.uniform(0, width), rng.uniform(0.03, 0.12) * width, rng.uniform(0.1, 0.6)
        profile = np.exp(-(((np.arange(width, dtype=np.float32) - centre) / spread) ** 2))[None, :]
        image = image * (1 - rng.uniform(0, ranges.shadow_depth) * profile * (depth > start))
    return image


def _speckle(shape: tuple[int, ...], strength: float, rng: np.random.Generator) -> np.ndarray:
    # Rayleigh amplitude, blurred along the beam's width, with mean 1
    raw = rng.rayleigh(1.0, shape).astype(np.float32)
    grain: np.ndarray = cv2.GaussianBlur(raw, (0, 0), sigmaX=1.2, sigmaY=0.6)
    return 1 + strength * (grain / grain.mean() - 1) / max(float(grain.std() / grain.mean()), 1e-6)


__all__ = ["SyntheticConfig", "swap_style", "synthesise"]
