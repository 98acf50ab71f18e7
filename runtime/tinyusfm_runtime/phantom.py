"""Synthetic fetal-head frames with a known head circumference.

The phantom is a B-mode-like image made from first principles cheap enough for numpy: Rayleigh
speckle with a depth-dependent point spread, log compression, depth attenuation, a convex or
linear field of view, a skull whose echo is strongest where the beam meets it at a right angle,
a mid-line echo, an acoustic shadow and near-field clutter. It is good enough that a student
trained on patients and phantoms together segments it, so it can stand in for a patient where no
patient image may go: golden vectors, demos, self-tests.

It knows nothing of patients, probes or physics beyond that; it is not a simulator and its
frames are never evidence of clinical accuracy.

Shapes: HW = rows, columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.measure import ramanujan_mm


@dataclass(frozen=True, kw_only=True, slots=True)
class Phantom:
    """One synthetic frame and the truth about it.

    Attributes:
        frame: grey uint8 frame with spacing.
        mask_HW: uint8 0/1, the filled head ellipse.
        hc_mm: circumference of the ellipse, mm (Ramanujan's second formula).
        outside: share of the head that lies outside of the field of view and is not seen, 0..1.
    """

    frame: Frame
    mask_HW: np.ndarray
    hc_mm: float
    outside: float = 0.0


def make_phantom(seed: int, *, height: int = 270, width: int = 400) -> Phantom:
    """Draws the phantom of one seed.

    Args:
        seed: any non-negative integer; the same seed gives the same frame.
        height: rows of the frame, at least 64.
        width: columns of the frame, at least 64.

    Returns:
        The phantom, its mask and its circumference.
    """
    rng = np.random.default_rng([seed, 0x7E7A])
    spacing = float(rng.uniform(0.18, 0.42)) * 270 / height
    rows, cols = np.mgrid[0:height, 0:width].astype(np.float32)
    ellipse = _draw_ellipse(rng, height, width)
    radius, angle = _ellipse_coordinates(rows, cols, ellipse)
    mask = radius <= 1.0
    fov, depth = _field_of_view(rng, rows, cols)

    echo = _tissue(rng, height, width)
    inside = float(rng.uniform(0.05, 0.3)) * (0.4 + 1.2 * _smooth(rng, height, width, 14))
    echo = np.where(mask, inside, echo)
    echo += _skull(rng, radius, angle, ellipse) * fov
    echo += _midline(rng, rows, cols, ellipse, mask)
    echo *= _shadow(rng, rows, cols, ellipse, mask)
    echo *= np.exp(-float(rng.uniform(0.0, 1.6)) * depth)
    image = _log_compress(_speckle(rng, echo), float(rng.uniform(40, 64)), float(rng.uniform(-16, 3)))
    image *= fov
    pixels = np.clip(np.rint(image * 255.0), 0, 255).astype(np.uint8)
    a_mm, b_mm = ellipse[2] * spacing, ellipse[3] * spacing
    frame = Frame(pixels=pixels, spacing_mm=(spacing, spacing), seq=seed, phantom=True)
    unseen = float((mask & (fov < 0.5)).sum() / max(1, int(mask.sum())))
    return Phantom(frame=frame, mask_HW=mask.astype(np.uint8), hc_mm=ramanujan_mm(a_mm, b_mm), outside=unseen)


def whole_heads(first: int, count: int) -> list[Phantom]:
    """Phantoms whose head lies inside the field of view.

    Its circumference can then be known.

    Args:
        first: seed from which on is searched.
        count: how many.

    Returns:
        The first so many, in the order of their seeds.
    """
    found: list[Phantom] = []
    seed = first
    while len(found) < count:
        phantom = make_phantom(seed)
        if phantom.outside == 0.0:
            found.append(phantom)
        seed += 1
    return found


Ellipse = tuple[float, float, float, float, float]
"""Centre row, centre column, semi-axes a >= b in pixels, angle of a to the columns in radians."""


def _draw_ellipse(rng: np.random.Generator, height: int, width: int) -> Ellipse:
    a = float(rng.uniform(0.24, 0.47)) * min(height * 1.3, width)
    b = a * float(rng.uniform(0.70, 0.90))
    tilt = float(rng.uniform(-0.6, 0.6))
    half_h = math.hypot(a * math.sin(tilt), b * math.cos(tilt))
    half_w = math.hypot(a * math.cos(tilt), b * math.sin(tilt))
    shrink = min(1.0, 0.46 * height / half_h, 0.46 * width / half_w)
    a, b, half_h, half_w = a * shrink, b * shrink, half_h * shrink, half_w * shrink
    row = float(rng.uniform(half_h + 3, max(half_h + 4, height - half_h - 3)))
    col = float(rng.uniform(half_w + 3, max(half_w + 4, width - half_w - 3)))
    return row, 0.6 * col + 0.4 * width / 2, a, b, tilt


def _ellipse_coordinates(rows: np.ndarray, cols: np.ndarray, ellipse: Ellipse) -> tuple[np.ndarray, np.ndarray]:
    row, col, a, b, tilt = ellipse
    dx, dy = cols - col, rows - row
    u = (dx * math.cos(tilt) + dy * math.sin(tilt)) / a
    v = (-dx * math.sin(tilt) + dy * math.cos(tilt)) / b
    return np.hypot(u, v), np.arctan2(v * a, u * b) + tilt


def _field_of_view(rng: np.random.Generator, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the 0/1 field of view and the depth in 0..1."""
    height, width = rows.shape
    depth = rows / height
    if rng.uniform() < 0.25:
        return np.ones_like(rows), depth
    apex = -float(rng.uniform(0.1, 0.9)) * height
    half_angle = float(rng.uniform(0.45, 0.75))
    radius = np.hypot(rows - apex, cols - width / 2)
    theta = np.arctan2(cols - width / 2, rows - apex)
    near = -apex + float(rng.uniform(0.0, 0.04)) * height
    fov = (np.abs(theta) < half_angle) & (radius > near) & (radius < (height - apex) * 1.0)
    return fov.astype(np.float32), np.clip((radius - near) / height, 0, 1)


def _smooth(rng: np.random.Generator, height: int, width: int, scale_px: float) -> np.ndarray:
    """Smooth random field, 0..1: bilinear enlargement of coarse noise."""
    gh, gw = max(2, int(height / scale_px) + 2), max(2, int(width / scale_px) + 2)
    grid = rng.uniform(0, 1, (gh, gw)).astype(np.float32)
    y, x = np.linspace(0, gh - 1.001, height), np.linspace(0, gw - 1.001, width)
    y0, x0 = y.astype(int), x.astype(int)
    fy, fx = (y - y0).astype(np.float32)[:, None], (x - x0).astype(np.float32)[None, :]
    top = grid[y0][:, x0] * (1 - fx) + grid[y0][:, x0 + 1] * fx
    low = grid[y0 + 1][:, x0] * (1 - fx) + grid[y0 + 1][:, x0 + 1] * fx
    return top * (1 - fy) + low * fy


def _tissue(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    layers = _smooth(rng, height, 2, float(rng.uniform(14, 50)))[:, :1]
    blobs = _smooth(rng, height, width, float(rng.uniform(18, 60)))
    fine = _smooth(rng, height, width, 6)
    tissue = 0.25 + 0.5 * layers * blobs + 0.35 * blobs * fine
    # anechoic pockets: amniotic fluid around the head
    fluid = _smooth(rng, height, width, float(rng.uniform(40, 90)))
    return tissue * (0.05 + 0.95 / (1.0 + np.exp(40.0 * (fluid - float(rng.uniform(0.6, 1.0))))))


def _skull(rng: np.random.Generator, radius: np.ndarray, angle: np.ndarray, ellipse: Ellipse) -> np.ndarray:
    width = float(rng.uniform(1.6, 4.5)) / ellipse[3]
    line = np.exp(-(((radius - 1.0 + 0.5 * width) / width) ** 2))
    # specular: strongest where the surface normal is along the beam (vertical)
    power = float(rng.uniform(0.5, 2.5))
    specular = 0.12 + 0.88 * np.abs(np.sin(angle)) ** power
    gaps = _circular_noise(rng, angle)
    return float(rng.uniform(2.0, 7.0)) * line * specular * gaps


def _circular_noise(rng: np.random.Generator, angle: np.ndarray) -> np.ndarray:
    out = np.full_like(angle, 0.75)
    for k in range(1, 6):
        out += float(rng.normal(0, 0.16)) * np.cos(k * angle + float(rng.uniform(0, 6.28)))
    return np.clip(out, 0.05, 1.4)


def _midline(
    rng: np.random.Generator, rows: np.ndarray, cols: np.ndarray, ellipse: Ellipse, mask: np.ndarray
) -> np.ndarray:
    if rng.uniform() < 0.25:
        return np.zeros_like(rows)
    height, width = rows.shape
    row, col, _, b, tilt = ellipse
    across = -(cols - col) * math.sin(tilt) + (rows - row) * math.cos(tilt)
    line = np.exp(-((across / max(1.2, 0.02 * b)) ** 2)) * mask
    return float(rng.uniform(0.3, 1.6)) * line * (0.4 + 0.6 * _smooth(rng, height, width, 20))


def _shadow(
    rng: np.random.Generator, rows: np.ndarray, cols: np.ndarray, ellipse: Ellipse, mask: np.ndarray
) -> np.ndarray:
    """Shadow below the skull's flanks, where the beam grazes the bone."""
    row, col, a, _, tilt = ellipse
    half = max(4.0, a * abs(math.cos(tilt)))
    flank = np.exp(-(((np.abs(cols - col) / half - 0.95) / 0.12) ** 2))
    below = np.clip((rows - row) / (0.3 * rows.shape[0]), 0, 1)
    under = np.clip((rows - row - ellipse[3]) / 20.0, 0, 1) * ~mask * (np.abs(cols - col) < half)
    strength = float(rng.uniform(0.2, 0.9))
    return (1 - strength * flank * below) * (1 - float(rng.uniform(0.0, 0.6)) * under)


def _speckle(rng: np.random.Generator, echo: np.ndarray) -> np.ndarray:
    """Magnitude of band-limited complex noise (fully developed speckle).

    Its local power is the echo.
    """
    height, width = echo.shape
    fy = np.fft.fftfreq(height)[:, None]
    fx = np.fft.rfftfreq(width)[None, :]
    psf = np.exp(-((fy / float(rng.uniform(0.16, 0.32))) ** 2) - (fx / float(rng.uniform(0.08, 0.2))) ** 2)
    parts = []
    for _ in range(2):
        noise = rng.normal(0, 1, (height, width))
        field = np.fft.irfft2(np.fft.rfft2(noise) * psf, s=(height, width))
        parts.append(field / field.std())
    speckle = np.hypot(parts[0], parts[1]).astype(np.float32)
    mix = float(rng.uniform(0.45, 0.95))
    return echo * (mix * speckle + (1 - mix)) + 0.004 * speckle


def _log_compress(amplitude: np.ndarray, dynamic_range_db: float, gain_db: float) -> np.ndarray:
    decibel = 20.0 * np.log10(np.maximum(amplitude, 1e-6) / 3.0) + gain_db
    return np.clip(1.0 + decibel / dynamic_range_db, 0.0, 1.0).astype(np.float32)


__all__ = ["Ellipse", "Phantom", "make_phantom", "whole_heads"]
