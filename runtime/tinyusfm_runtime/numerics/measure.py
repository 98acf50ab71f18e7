"""Logits -> mask -> what is measured of each label.

In plainly specified arithmetic.

* Mask: one channel is compared with ``log(t / (1 - t))`` in float32, never through a sigmoid; several channels go to
  the largest logit, the lowest index among equals.
* Component: of each label the largest (shape.py); of an ellipse reading its holes are filled first.
* Confidence: mean probability of the label inside the component (exact.py), summed row by row.
* Ellipse: what the logits say (ellipse.py). Its moments are scaled by the two sides of a pixel, then their eigenvalues
  give the semi-axes; circumference by Ramanujan's second formula.
* Border: the component reaches the edge of the image, or the edge of the field of view cuts it (shape.py).

Everything is given in pixels *of the frame*, whatever the model's input did to its shape, and in millimetres where the
frame has a spacing. What is left for a perfect mask is the error of drawing an ellipse on a grid, unbiased: over random
centres, angles, aspects of 0.7 to 0.9 and unequal spacings 1.1 % at most at a minor semi-axis of 8 pixels, 0.17 % at
24 and 0.04 % at 64.

It does not know models or what a head is, and it does not judge (reading.py does). The compiled kernels (native.py) do
all of it where they are available: same bytes.

Shapes: NKHW = 1, channels, rows, columns of the model's input; HW = rows, columns. x = column, y = row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics import native
from tinyusfm_runtime.numerics.ellipse import (
    Covariance,
    agreement,
    axes,
    covariance,
    fit_logits,
    moments_of,
)
from tinyusfm_runtime.numerics.exact import direction_deg, logit, ordered_sum, sigmoid, softmax
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.numerics.shape import (
    as_mask,
    box_of,
    contour,
    cut_by_sector,
    fill_holes,
    largest_component,
    moments,
    touches_border,
)

Points = tuple[tuple[float, float], ...]
"""(row, column) of each, pixels of the frame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What is measured of one label's largest component.

    In pixels of the frame and in mm.

    Pixel centres lie at whole numbers. The last seven are those of an ellipse reading, else 0 or None.

    Attributes:
        found: False if the component is missing or covers less than the model's ``min_area``; every number is then 0 or
            None.
        label: name of the label.
        has_ellipse: it is an ellipse reading.
        confidence: mean probability of the label inside the component, 0..1, or None.
        area_px: area.
        area_mm2: area in mm^2, None without spacing.
        box_px: (row, column, height, width) of the smallest box around it, to the edges of its pixels.
        centroid_px: (row, column).
        contour_px: its border pixels in the input, clockwise, ``shape.CONTOUR_POINTS`` at most.
        touches_border: it reaches the edge of the image, or the edge of the field of view cuts it: part of it may lie
            outside.
        cut_by_sector: the edge of the field of view cuts it.
        hc_mm: circumference of the ellipse in mm, None without spacing.
        hc_px: circumference in pixels of the frame, as if they were square.
        axes_mm: full lengths (major, minor) in mm, None without spacing.
        axes_px: full lengths (major, minor).
        centre_px: (row, column) of the ellipse.
        angle_deg: direction of the major axis, from the columns' axis towards growing rows, in (-90, 90].
        agreement: Dice of the component and the ellipse, 0..1, or None.
    """

    found: bool
    label: str = ""
    has_ellipse: bool = False
    confidence: float | None = None
    area_px: float = 0.0
    area_mm2: float | None = None
    box_px: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    centroid_px: tuple[float, float] = (0.0, 0.0)
    contour_px: Points = ()
    touches_border: bool = False
    cut_by_sector: bool = False
    hc_mm: float | None = None
    hc_px: float = 0.0
    axes_mm: tuple[float, float] | None = None
    axes_px: tuple[float, float] = (0.0, 0.0)
    centre_px: tuple[float, float] = (0.0, 0.0)
    angle_deg: float = 0.0
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRequest:
    """What is to be measured.

    Attributes:
        label: name of the label.
        index: its value in the mask, which is its channel where there are several.
        threshold: probability that one channel must exceed; unused where there are several.
        min_area: least share of the image.
        ellipse: fill holes and fit an ellipse.
    """

    label: str
    index: int = 1
    threshold: float = 0.5
    min_area: float = 0.0
    ellipse: bool = False


def binary_mask(logits: np.ndarray, threshold: float) -> np.ndarray:
    """Logits to labels.

    Args:
        logits: float32 NKHW, batch of 1. A NaN never wins.
        threshold: probability that one channel must exceed, 0..1; unused where K > 1.

    Returns:
        uint8 HW: 0 and 1 for K = 1, else the index of the largest logit, the lowest of equals.

    Raises:
        InputError: the shape, the type or the threshold is not usable.
    """
    if logits.ndim != 4 or logits.shape[0] != 1 or not 1 <= logits.shape[1] <= 256 or logits.dtype != np.float32:
        raise InputError(f"mask logits must be float32 1xKxHxW with K of 1 to 256, not {logits.dtype} {logits.shape}")
    if logits.shape[1] > 1:
        return _argmax(logits[0])
    cut = cut_of(threshold)
    plane = logits[0, 0]
    if native.available() and plane.flags.c_contiguous:
        out = np.empty(plane.shape, np.uint8)
        native.threshold(plane, cut, out)
        return out
    return (plane > np.float32(cut)).astype(np.uint8)


def cut_of(threshold: float) -> float:
    """The logit that one channel must exceed, a float32 value.

    It stands for a probability above a threshold.

    Raises:
        InputError: the threshold does not lie between 0 and 1.
    """
    if not 0.0 < threshold < 1.0:
        raise InputError(f"threshold {threshold} must lie between 0 and 1")
    return logit(threshold)


def measure_label(
    mask_HW: np.ndarray,
    logits: np.ndarray,
    placement: Placement,
    request: LabelRequest,
    codes_HW: np.ndarray | None = None,
) -> tuple[np.ndarray, Measurement]:
    """Measures one label.

    Args:
        mask_HW: uint8 labels at the input's size, as ``binary_mask`` gives them.
        logits: float32 NKHW, the batch is 1; finite.
        placement: where the frame lies in the input; what lies outside its box is no image.
        request: what to measure.
        codes_HW: the input's brightness, for the field of view; None leaves that out.

    Returns:
        The component (uint8 HW at the input's size) and what was measured.

    Raises:
        InputError: mask, logits and placement do not fit.
    """
    if mask_HW.shape != logits.shape[2:] or mask_HW.dtype != np.uint8:
        raise InputError(f"a mask of {mask_HW.shape} does not fit logits of {logits.shape}")
    top, left, height, width = placement.box
    if top + height > mask_HW.shape[0] or left + width > mask_HW.shape[1] or min(top, left, height - 1, width - 1) < 0:
        raise InputError(f"the frame's box {placement.box} does not lie in an input of {mask_HW.shape}")
    if native.available():
        component, values = native.measure(
            mask_HW,
            logits,
            codes_HW,
            crop=placement.crop,
            box=placement.box,
            spacing_mm=placement.spacing_mm,
            index=request.index,
            cut=cut_of(request.threshold),
            min_area=request.min_area,
            ellipse=request.ellipse,
        )
        return component, Measurement(label=request.label, has_ellipse=request.ellipse, **values)
    here = (slice(top, top + height), slice(left, left + width))
    component = np.zeros_like(mask_HW)
    inner = np.ascontiguousarray(mask_HW[here] == request.index).astype(np.uint8)
    part = largest_component(inner)
    if request.ellipse:
        part = fill_holes(part)
    component[here] = part
    sums = moments(part)
    if sums[0] == 0 or sums[0] < request.min_area * float(height * width):
        return component, Measurement(found=False, label=request.label, has_ellipse=request.ellipse)
    codes = None if codes_HW is None else np.ascontiguousarray(codes_HW[here])
    return component, _measured(part, logits[0][:, here[0], here[1]], sums, placement, request, codes)


def _measured(
    part_HW: np.ndarray,
    logits_KHW: np.ndarray,
    sums: tuple[int, int, int, int, int, int],
    placement: Placement,
    request: LabelRequest,
    codes_HW: np.ndarray | None,
) -> Measurement:
    row, col, height, width = placement.crop
    per_row, per_col = float(height) / float(part_HW.shape[0]), float(width) / float(part_HW.shape[1])

    def on_frame(at_row: float, at_col: float) -> tuple[float, float]:
        return (at_row + 0.5) * per_row + float(row) - 0.5, (at_col + 0.5) * per_col + float(col) - 0.5

    middle = covariance(sums)
    first_row, first_col, rows, cols = box_of(part_HW)
    spacing = placement.spacing_mm
    in_view = codes_HW is None or not cut_by_sector(part_HW, codes_HW)
    walked = contour(part_HW)
    measured = Measurement(
        found=True,
        label=request.label,
        has_ellipse=request.ellipse,
        confidence=_confidence(part_HW, logits_KHW, request.index, sums[0]),
        area_px=float(sums[0]) * (per_row * per_col),
        area_mm2=None if spacing is None else float(sums[0]) * (spacing[0] * spacing[1]),
        box_px=(
            float(first_row) * per_row + float(row),
            float(first_col) * per_col + float(col),
            float(rows) * per_row,
            float(cols) * per_col,
        ),  # fmt: skip
        centroid_px=on_frame(middle.row, middle.col),
        contour_px=tuple(on_frame(float(r), float(c)) for r, c in walked.tolist()),
        touches_border=touches_border(part_HW) or not in_view,
        cut_by_sector=not in_view,
    )
    if not request.ellipse:
        return measured
    parameters = fit_logits(_margin(logits_KHW, request), middle)
    found = moments_of(parameters)
    major, minor, cosine, sine = axes(found.scaled(per_col, per_row))
    in_mm = None if spacing is None else axes(found.scaled(spacing[1], spacing[0]))[:2]
    return _with_ellipse(
        measured,
        hc_mm=None if in_mm is None else ramanujan_mm(*in_mm),
        hc_px=ramanujan_mm(major, minor),
        axes_mm=None if in_mm is None else (2.0 * in_mm[0], 2.0 * in_mm[1]),
        axes_px=(2.0 * major, 2.0 * minor),
        centre_px=on_frame(found.row, found.col),
        angle_deg=direction_deg(cosine, sine),
        agreement=agreement(part_HW, parameters),
    )


def _with_ellipse(measured: Measurement, **values: object) -> Measurement:
    from dataclasses import replace

    return replace(measured, **values)  # type: ignore[arg-type]


def _margin(logits_KHW: np.ndarray, request: LabelRequest) -> np.ndarray:
    """How far the label's logit lies above what it must exceed, float64 HW."""
    if len(logits_KHW) == 1:
        return logits_KHW[0].astype(np.float64) - cut_of(request.threshold)
    others = np.delete(logits_KHW, request.index, axis=0).max(axis=0)
    return np.asarray(logits_KHW[request.index].astype(np.float64) - others)


def _confidence(part_HW: np.ndarray, logits_KHW: np.ndarray, index: int, count: int) -> float:
    wide = logits_KHW.astype(np.float64)
    chances = sigmoid(wide[0]) if len(wide) == 1 else softmax(wide)[index]
    return ordered_sum(np.where(part_HW != 0, chances, 0.0)) / float(count)


def measure_head(mask_HW: np.ndarray, spacing_mm: tuple[float, float] | None) -> Measurement:
    """Measures the ellipse that the *moments* of a mask's largest component say.

    For masks without logits, such as labels.

    Args:
        mask_HW: whatever is not 0 belongs to the mask.
        spacing_mm: (row, column) spacing of the mask's pixels, or None.

    Returns:
        The measurement; ``confidence`` is None, and pixels are those of the mask.

    Raises:
        InputError: not an image.
    """
    part = fill_holes(largest_component(as_mask(mask_HW)))
    sums = moments(part)
    if sums[0] == 0:
        return Measurement(found=False, has_ellipse=True)
    found = covariance(sums)
    major, minor, cosine, sine = axes(found)
    in_mm = None if spacing_mm is None else axes(found.scaled(spacing_mm[1], spacing_mm[0]))[:2]
    first_row, first_col, rows, cols = box_of(part)
    return Measurement(
        found=True,
        has_ellipse=True,
        area_px=float(sums[0]),
        area_mm2=None if spacing_mm is None else float(sums[0]) * (spacing_mm[0] * spacing_mm[1]),
        box_px=(float(first_row), float(first_col), float(rows), float(cols)),
        centroid_px=(found.row, found.col),
        touches_border=touches_border(part),
        hc_mm=None if in_mm is None else ramanujan_mm(*in_mm),
        hc_px=ramanujan_mm(major, minor),
        axes_mm=None if in_mm is None else (2.0 * in_mm[0], 2.0 * in_mm[1]),
        axes_px=(2.0 * major, 2.0 * minor),
        centre_px=(found.row, found.col),
        angle_deg=direction_deg(cosine, sine),
        agreement=agreement(part, _parameters(found)),
    )


def _parameters(found: Covariance) -> tuple[float, float, float, float, float, float]:
    major, minor, cosine, sine = axes(found)
    least = 1e-9  # a line has no minor axis; an ellipse needs one to be cut by a row
    return found.col, found.row, max(major, least), max(minor, least), cosine, sine


def ramanujan_mm(a: float, b: float) -> float:
    """Circumference of an ellipse from its semi-axes, in their unit.

    Source: S. Ramanujan, Modular equations and approximations to pi (1914), second formula:
    pi (a + b) (1 + 3h / (10 + sqrt(4 - 3h))), h = ((a - b) / (a + b))^2.
    """
    if a + b <= 0:
        return 0.0
    q = (a - b) / (a + b)
    h = q * q
    return math.pi * (a + b) * (1 + 3 * h / (10 + math.sqrt(4 - 3 * h)))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Overlap of two masks, ``2 |a and b| / (|a| + |b|)``.

    Args:
        a: whatever is not 0 belongs to the mask.
        b: likewise, of the same shape.

    Returns:
        0..1; two empty masks agree: 1.

    Raises:
        InputError: the shapes differ.
    """
    if a.shape != b.shape:
        raise InputError(f"masks of shape {a.shape} and {b.shape} cannot be compared")
    in_a, in_b = a != 0, b != 0
    total = int(np.count_nonzero(in_a)) + int(np.count_nonzero(in_b))
    return 1.0 if total == 0 else 2.0 * int(np.count_nonzero(in_a & in_b)) / total


def ellipse_mask(measured: Measurement, size: tuple[int, int]) -> np.ndarray:
    """The measured ellipse as a mask of the frame's pixels whose centres lie inside.

    Args:
        measured: an ellipse reading; nothing is drawn where nothing was found.
        size: rows and columns of the frame.

    Returns:
        uint8, 0 and 1.
    """
    out = np.zeros(size, np.uint8)
    if not measured.found or not measured.has_ellipse or min(measured.axes_px) <= 0.0:
        return out
    turn = math.radians(measured.angle_deg)
    rows, cols = np.ogrid[: size[0], : size[1]]
    down, right = rows - measured.centre_px[0], cols - measured.centre_px[1]
    along = (right * math.cos(turn) + down * math.sin(turn)) / (0.5 * measured.axes_px[0])
    across = (down * math.cos(turn) - right * math.sin(turn)) / (0.5 * measured.axes_px[1])
    out[along * along + across * across <= 1.0] = 1
    return out


def _argmax(logits_KHW: np.ndarray) -> np.ndarray:
    # not np.argmax: where a NaN should stand, that would name it the winner
    best = np.where(np.isnan(logits_KHW[0]), -np.inf, logits_KHW[0])
    label = np.zeros(best.shape, np.uint8)
    for index in range(1, len(logits_KHW)):
        better = logits_KHW[index] > best
        label[better] = index
        best = np.where(better, logits_KHW[index], best)
    return label


__all__ = [
    "LabelRequest",
    "Measurement",
    "Points",
    "binary_mask",
    "cut_of",
    "dice",
    "ellipse_mask",
    "largest_component",
    "measure_head",
    "measure_label",
    "ramanujan_mm",
]
