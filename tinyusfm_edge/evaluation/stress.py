"""Stress: validation frames as they come at the bedside.

And what a mask model reads off them.

Each transformation is fixed and seeded by the frame, so two models see the same pixels. It acts on the frame and on the
head's ellipse before any preprocessing. Circumferences count only where the frame does not cut the head; a *silent*
failure is off by more than a tenth and nothing speaks against it: the frame is read as the runtime reads it, with the
model's second pass and thresholds, but without a drift statistic. Acoustic shadows, missing depth, whole screens and
turned displays are common; none of it is a claim about a device. Training's augmentation is other code with random
ranges.

Shapes: HW frames, grey uint8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np

from tinyusfm_edge.data.ellipses import Ellipse
from tinyusfm_edge.data.table import Sample
from tinyusfm_edge.evaluation.segmentation import Runner, run_cases, score_case
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.spec import ModelSpec

Change = Callable[[Sample, np.random.Generator], Sample]


def _affine(sample: Sample, matrix: np.ndarray, size_hw: tuple[int, int]) -> Sample:
    """Frame, mask and ellipse moved by a 2x3 matrix from old to new (x, y) pixels."""
    rows, cols = size_hw
    moved = [
        cv2.warpAffine(image, matrix, (cols, rows), flags=flag)
        for image, flag in ((sample.frame.pixels, cv2.INTER_AREA), (sample.mask_HW, cv2.INTER_NEAREST))
    ]
    ellipse = sample.ellipse
    if ellipse is not None:
        centre = matrix[:, :2] @ np.array(ellipse.centre_xy) + matrix[:, 2]
        (a, b), (c, d) = (matrix[:, :2] @ np.array(ellipse.shape)).tolist()
        ellipse = Ellipse(centre_xy=(float(centre[0]), float(centre[1])), shape=((a, b), (c, d)))
    frame = Frame(pixels=moved[0], spacing_mm=_spacing(sample, matrix))
    return replace(sample, frame=frame, mask_HW=moved[1], ellipse=ellipse, original_hw=size_hw)


def _spacing(sample: Sample, matrix: np.ndarray) -> tuple[float, float] | None:
    """(row, column) spacing after a matrix.

    The matrix turns by quarters or keeps both spacings equal.
    """
    if sample.frame.spacing_mm is None:
        return None
    row, col = sample.frame.spacing_mm
    across, down = float(np.hypot(*matrix[:, 0])), float(np.hypot(*matrix[:, 1]))
    turned = abs(matrix[0, 1]) > abs(matrix[0, 0])
    return (col / across, row / down) if turned else (row / down, col / across)


def _about_middle(sample: Sample, linear: np.ndarray, size_hw: tuple[int, int] | None = None) -> Sample:
    rows, cols = sample.frame.pixels.shape[:2]
    size = size_hw or (rows, cols)
    old, new = np.array([(cols - 1) / 2, (rows - 1) / 2]), np.array([(size[1] - 1) / 2, (size[0] - 1) / 2])
    return _affine(sample, np.hstack([linear, (new - linear @ old)[:, None]]), size)


def zoom(factor: float, sample: Sample, _rng: np.random.Generator) -> Sample:
    """Another depth: the image about its middle, the rest black."""
    return _about_middle(sample, np.diag([factor, factor]).astype(float))


def turn(degrees: float, sample: Sample, _rng: np.random.Generator) -> Sample:
    """A turned display; by 90 degrees the frame's sides change places."""
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    rows, cols = sample.frame.pixels.shape[:2]
    size = (cols, rows) if degrees == 90 else (rows, cols)
    return _about_middle(sample, np.array([[cos, -sin], [sin, cos]]), size)


def mirror(x: float, y: float, sample: Sample, _rng: np.random.Generator) -> Sample:
    """Mirrored."""
    return _about_middle(sample, np.diag([x, y]))


def shift(share: float, sample: Sample, _rng: np.random.Generator) -> Sample:
    """Moved to the right by a share of the width."""
    rows, cols = sample.frame.pixels.shape[:2]
    return _affine(sample, np.array([[1.0, 0.0, share * cols], [0.0, 1.0, 0.0]]), (rows, cols))


def bars(aspect: float, sample: Sample, _rng: np.random.Generator) -> Sample:
    """Black bars that bring the frame to an aspect ratio."""
    rows, cols = sample.frame.pixels.shape[:2]
    size = (rows, round(rows * aspect)) if aspect > cols / rows else (round(cols / aspect), cols)
    return _about_middle(sample, np.eye(2), size)


def screen(sample: Sample, rng: np.random.Generator) -> Sample:
    """The image as a window on a cart's screen of 1280x720.

    With panels, writing and a grey bar.
    """
    rows, cols = sample.frame.pixels.shape[:2]
    factor = min(560 / rows, 860 / cols)
    matrix = np.array([[factor, 0.0, 260.0], [0.0, factor, 90.0]])
    found = _affine(sample, matrix, (720, 1280))
    pixels = found.frame.pixels.copy()
    window = np.zeros((720, 1280), bool)
    window[90 : 90 + round(factor * rows), 260 : 260 + round(factor * cols)] = True
    panel = np.full((720, 1280), 24, np.uint8)
    panel[:60], panel[:, :200], panel[700:] = 60, 40, 60
    for line in range(9):
        text = "".join(chr(int(code)) for code in rng.integers(48, 90, 12))
        cv2.putText(panel, text, (12, 110 + 52 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 190, 1)
        cv2.putText(panel, text[:6], (1150, 110 + 52 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.6, 190, 1)
    panel[120:420, 1240:1256] = np.linspace(255, 0, 300)[:, None].astype(np.uint8)
    pixels[~window] = panel[~window]
    return replace(found, frame=replace(found.frame, pixels=pixels))


def _with_pixels(sample: Sample, values: np.ndarray) -> Sample:
    pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return replace(sample, frame=replace(sample.frame, pixels=pixels))


def stripes(count: int, width: float, depth: float, sample: Sample, rng: np.random.Generator) -> Sample:
    """Acoustic shadows: dark vertical stripes through the head.

    They start at a third of its height.
    """
    rows, cols = sample.frame.pixels.shape[:2]
    inside = np.nonzero(sample.mask_HW.any(0))[0]
    low, high = (int(inside[0]), int(inside[-1])) if len(inside) else (0, cols - 1)
    top = int(np.nonzero(sample.mask_HW.any(1))[0][0]) if len(inside) else 0
    x, y = np.arange(cols), np.arange(rows)[:, None]
    kept = np.ones((rows, cols))
    for _ in range(count):
        centre, half = rng.uniform(low, high), width * cols / 2
        edge = 1 / (1 + np.exp((np.abs(x - centre) - half) / (0.12 * half)))
        below = 1 / (1 + np.exp(-(y - top) / 3))
        kept *= 1 - depth * edge * below
    return _with_pixels(sample, sample.frame.pixels * kept)


def speckle(strength: float, sample: Sample, rng: np.random.Generator) -> Sample:
    """Multiplicative grain, a little blurred."""
    grain = cv2.GaussianBlur(rng.normal(0, 1, sample.frame.pixels.shape), (0, 0), 1.0)
    return _with_pixels(sample, sample.frame.pixels * (1 + strength * grain / grain.std()))


def doppler(sample: Sample, rng: np.random.Generator) -> Sample:
    """A colour box over part of the head, as its grey."""
    rows, cols = sample.frame.pixels.shape[:2]
    pixels = sample.frame.pixels.copy()
    top, left = int(rng.uniform(0.15, 0.45) * rows), int(rng.uniform(0.15, 0.45) * cols)
    box = pixels[top : top + rows // 3, left : left + cols // 3]
    field = cv2.resize(rng.uniform(0, 1, (6, 6)), box.shape[::-1], interpolation=cv2.INTER_CUBIC)
    box[field > 0.6] = (80 + 90 * field[field > 0.6]).clip(0, 255).astype(np.uint8)
    cv2.rectangle(pixels, (left, top), (left + cols // 3, top + rows // 3), 200, 1)
    return _with_pixels(sample, pixels)


def gamma(exponent: float, sample: Sample, _rng: np.random.Generator) -> Sample:
    """Another grey map."""
    return _with_pixels(sample, 255 * (sample.frame.pixels / 255.0) ** exponent)


def gain(factor: float, sample: Sample, _rng: np.random.Generator) -> Sample:
    """Another gain."""
    return _with_pixels(sample, sample.frame.pixels * factor)


def ramp(sample: Sample, _rng: np.random.Generator) -> Sample:
    """Depth gain from 1.4 at the top to 0.25 at the bottom."""
    return _with_pixels(sample, sample.frame.pixels * np.linspace(1.4, 0.25, len(sample.frame.pixels))[:, None])


def blur(sigma: float, sample: Sample, _rng: np.random.Generator) -> Sample:
    """A blurred frame."""
    return _with_pixels(sample, cv2.GaussianBlur(sample.frame.pixels, (0, 0), sigma))


def comb(pixels: int, sample: Sample, _rng: np.random.Generator) -> Sample:
    """Every second line moved, as interlaced grabbers do."""
    moved = sample.frame.pixels.copy()
    moved[1::2] = np.roll(moved[1::2], pixels, 1)
    return _with_pixels(sample, moved)


def noise(sigma: float, sample: Sample, rng: np.random.Generator) -> Sample:
    """White noise."""
    return _with_pixels(sample, sample.frame.pixels + rng.normal(0, sigma, sample.frame.pixels.shape))


def jpeg(quality: int, sample: Sample, _rng: np.random.Generator) -> Sample:
    """Coded as JPEG and back."""
    _, data = cv2.imencode(".jpg", sample.frame.pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
    assert decoded is not None, "what was just written can be read"
    return _with_pixels(sample, decoded)


def same(sample: Sample, _rng: np.random.Generator) -> Sample:
    """The frame as it is."""
    return sample


CHANGES: dict[str, Change] = {
    "none": same,
    "shadow, one wide": partial(stripes, 1, 0.2, 0.85),
    "shadows, four thin": partial(stripes, 4, 0.05, 0.9),
    "zoom out 0.6": partial(zoom, 0.6),
    "zoom out 0.4": partial(zoom, 0.4),
    "zoom in 1.4": partial(zoom, 1.4),
    "whole screen": screen,
    "rotate 30": partial(turn, 30),
    "rotate 90": partial(turn, 90),
    "mirrored across": partial(mirror, -1.0, 1.0),
    "mirrored down": partial(mirror, 1.0, -1.0),
    "shift right 25 %": partial(shift, 0.25),
    "bars to 4:3": partial(bars, 4 / 3),
    "bars to 16:9": partial(bars, 16 / 9),
    "Doppler box": doppler,
    "speckle 0.3": partial(speckle, 0.3),
    "speckle 0.6": partial(speckle, 0.6),
    "gamma 0.5": partial(gamma, 0.5),
    "gamma 2": partial(gamma, 2.0),
    "gain 0.5": partial(gain, 0.5),
    "gain 1.8": partial(gain, 1.8),
    "depth gain 1.4 to 0.25": ramp,
    "blur 3 px": partial(blur, 3.0),
    "interlace 6 px": partial(comb, 6),
    "noise 15": partial(noise, 15.0),
    "JPEG quality 8": partial(jpeg, 8),
}
"""Name -> what is done to a frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StressRow:
    """What a model reads off one kind of frames.

    Attributes:
        name: of the transformation.
        frames: how many.
        dice: mean overlap of the reported shape with the head's.
        below: share of frames with an overlap below 0.9.
        measured: frames whose head is not cut and has a reading in mm.
        hc_mae_mm: mean absolute circumference error of those, or None.
        hc_bias_mm: mean signed error, or None.
        hc_p95_mm: 95th percentile of the absolute error, or None.
        wrong: readings off by more than a tenth.
        silent: of them, those that nothing speaks against.
        lost: frames without a mask.
    """

    name: str
    frames: int
    dice: float
    below: float
    measured: int
    hc_mae_mm: float | None
    hc_bias_mm: float | None
    hc_p95_mm: float | None
    wrong: int
    silent: int
    lost: int

    def cells(self) -> tuple[str, ...]:
        """Cells of a table, in the order of ``HEADER``."""
        numbers = (self.hc_mae_mm, self.hc_bias_mm, self.hc_p95_mm)
        shown = ("-" if value is None else f"{value:.2f}" for value in numbers)
        counts = (str(self.wrong), str(self.silent), str(self.lost))
        return (self.name, str(self.frames), f"{self.dice:.4f}", f"{self.below:.1%}", *shown, *counts)


HEADER = ("frames as", "n", "Dice", "<0.9", "HC MAE mm", "bias", "p95", "off >10 %", "silent", "no mask")
"""Columns of the table."""


def stress(
    run: Runner, spec: ModelSpec, samples: Sequence[Sample], names: Sequence[str] = tuple(CHANGES)
) -> list[StressRow]:
    """Scores a model under every transformation.

    Args:
        run: uint8 NCHW -> logits.
        spec: a binary segmentation model.
        samples: labelled frames, never those of the test split.
        names: which transformations.

    Raises:
        InputError: an unknown name, no samples, or a model that does not answer with one mask.
    """
    unknown = set(names) - set(CHANGES)
    if unknown or not samples:
        raise InputError(f"stress needs frames and known transformations, not {sorted(unknown)}")
    return [_row(run, spec, samples, name) for name in names]


def _changed(name: str, sample: Sample) -> Sample:
    seed = int.from_bytes(hashlib.sha256(f"{name}:{sample.sha256}".encode()).digest()[:8], "big")
    return CHANGES[name](sample, np.random.default_rng(seed))


def _row(run: Runner, spec: ModelSpec, samples: Sequence[Sample], name: str) -> StressRow:
    overlaps, errors, wrong, silent, lost = [], [], 0, 0, 0
    for case in run_cases(run, spec, (_changed(name, sample) for sample in samples)):
        found = score_case(case, run, spec, spec.threshold)
        overlaps.append(found.dice if found.ellipse_dice is None else found.ellipse_dice)
        lost += not found.found
        if found.hc_error_mm is None or is_cut(case.sample):
            continue
        errors.append(found.hc_error_mm)
        if found.is_off():
            wrong, silent = wrong + 1, silent + (not found.reasons)
    size = np.abs(errors)
    return StressRow(
        name=name,
        frames=len(samples),
        dice=float(np.mean(overlaps)),
        below=float(np.mean(np.array(overlaps) < 0.9)),
        measured=len(errors),
        hc_mae_mm=float(size.mean()) if errors else None,
        hc_bias_mm=float(np.mean(errors)) if errors else None,
        hc_p95_mm=float(np.percentile(wide(size), 95)) if errors else None,
        wrong=wrong,
        silent=silent,
        lost=lost,
    )


def is_cut(sample: Sample) -> bool:
    """Whether the frame cuts the head.

    Its ellipse, or its mask where there is none, reaches the frame's border.
    """
    rows, cols = sample.frame.pixels.shape[:2]
    if sample.ellipse is None:
        mask = sample.mask_HW
        return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
    reach = np.linalg.norm(np.array(sample.ellipse.shape), axis=1)
    x, y = sample.ellipse.centre_xy
    return bool(x - reach[0] < -0.5 or y - reach[1] < -0.5 or x + reach[0] > cols - 0.5 or y + reach[1] > rows - 0.5)


__all__ = [
    "CHANGES",
    "HEADER",
    "Change",
    "StressRow",
    "bars",
    "blur",
    "comb",
    "doppler",
    "gain",
    "gamma",
    "is_cut",
    "jpeg",
    "mirror",
    "noise",
    "ramp",
    "same",
    "screen",
    "shift",
    "speckle",
    "stress",
    "stripes",
    "turn",
    "zoom",
]
