"""Frame -> input tensor: the one definition.

Used by training, calibration, checks and live frames.

Steps, in this order: crop to the region of interest; expand limited video range; brightness
(luma) of colour frames; antialiased bilinear resize; letterbox fill. All of it is integer
arithmetic, so two machines, two compilers and two languages give the same bytes:

* limited range: ``((clip(v, 16, 235) - 16) * 255 + 109) // 219``, per channel.
* luma: ``(77 R + 150 G + 29 B + 128) >> 8`` (BT.601 weights in 1/256; the weights sum to 256, so a
  grey image in three channels keeps its codes).
* resize: Pillow's ``resample`` for 8-bit images: triangle filter stretched by the scale factor,
  coefficients rounded to 22-bit fixed point; the columns first, rounded to 8 bits, then the rows.
  Coefficients are computed in float64 from sums, products and one division, so IEEE machines agree on them;
  from there on everything is an integer.

The oracle of the tests is Pillow, one axis at a time: each pass equals a Pillow resize of that axis alone. A whole
resize by Pillow equals ours where Pillow takes the columns first, which it always did before Pillow 13; since then it
takes the cheaper order, for instance rows first where the width grows and the height shrinks, and then single codes
differ by 1. Here the order is fixed.

The compiled kernel (runtime/capi/preprocess.c) does the same arithmetic, on large frames 10 to 30 times as fast;
``backend()`` says which of the two is in use. Normalisation is not here: it is folded into the graph.

It does not know the model beyond its PreprocessSpec and never looks at spacing except to carry it.

Shapes: HW, HWC as in frame.py; NCHW = 1, channels, rows, columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tinyusfm_runtime.errors import FrameError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.numerics import native
from tinyusfm_runtime.spec import AspectPolicy, PreprocessSpec

PRECISION_BITS = 22
"""Fixed-point bits of a filter coefficient: 32 - 8 - 2, as in Pillow's src/libImaging/Resample.c."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where the frame lies in the model's input, so that answers can be put back.

    Attributes:
        crop: (row, column, height, width) of the region used, frame pixels.
        box: (row, column, height, width) that this region fills in the input.
        spacing_mm: (row, column) spacing of the *input's* pixels, or None.
        frame_size: (rows, columns) of the frame.
    """

    crop: tuple[int, int, int, int]
    box: tuple[int, int, int, int]
    spacing_mm: tuple[float, float] | None
    frame_size: tuple[int, int]


def preprocess(frame: Frame, spec: PreprocessSpec, out: np.ndarray | None = None) -> tuple[np.ndarray, Placement]:
    """Turns a frame into the model's input.

    Args:
        frame: any supported frame.
        spec: the model's preprocessing.
        out: uint8 tensor of the input's shape to be filled again, or None for a new one.

    Returns:
        uint8 tensor NCHW (1 channel, or 3 equal ones where the spec is not grey), C-contiguous, and the placement.

    Raises:
        FrameError: the crop lies outside the frame, or ``out`` is not such a tensor.
    """
    placement = place(frame, spec)
    row, col, height, width = placement.crop
    region = frame.pixels[row : row + height, col : col + width]
    top, left, box_h, box_w = placement.box
    shape = (1, 1 if spec.grey else 3, spec.height, spec.width)
    tensor = np.zeros(shape, np.uint8) if out is None else out
    if tensor.shape != shape or tensor.dtype != np.uint8 or not tensor.flags.c_contiguous:
        raise FrameError(f"the tensor to fill must be C-contiguous uint8 of shape {shape}")
    if out is not None and (box_h, box_w) != shape[2:]:
        out.fill(0)  # what stood in the bars of a letterbox
    plane = tensor[0, 0]
    box = plane[top : top + box_h, left : left + box_w]
    _fill(region, PixelFormat(frame.pixel_format), VideoRange(frame.video_range), box)
    tensor[0, 1:] = plane
    return tensor, placement


def backend() -> str:
    """Which of the two equal implementations is in use.

    ``native`` or ``numpy`` (native.reason() says why).
    """
    return "native" if native.available() else "numpy"


def place(frame: Frame, spec: PreprocessSpec) -> Placement:
    """Computes where a frame lies in the input, without touching its pixels.

    Raises:
        FrameError: the crop lies outside the frame.
    """
    rows, cols = frame.pixels.shape[:2]
    crop = spec.crop or (0, 0, rows, cols)
    row, col, height, width = crop
    if row < 0 or col < 0 or height < 8 or width < 8 or row + height > rows or col + width > cols:
        raise FrameError(f"crop {crop} does not lie inside a frame of {rows}x{cols} rows x columns")
    if spec.aspect is AspectPolicy.STRETCH:
        box = (0, 0, spec.height, spec.width)
    else:
        # integer form of round(scale * side), scale = min of the two ratios
        if spec.height * width <= spec.width * height:
            box_h, box_w = spec.height, max(1, (2 * width * spec.height + height) // (2 * height))
        else:
            box_h, box_w = max(1, (2 * height * spec.width + width) // (2 * width)), spec.width
        box_h, box_w = min(box_h, spec.height), min(box_w, spec.width)
        box = ((spec.height - box_h) // 2, (spec.width - box_w) // 2, box_h, box_w)
    spacing = None
    if frame.spacing_mm is not None:
        spacing = (frame.spacing_mm[0] * height / box[2], frame.spacing_mm[1] * width / box[3])
    return Placement(crop=crop, box=box, spacing_mm=spacing, frame_size=(rows, cols))


def _fill(pixels: np.ndarray, pixel_format: PixelFormat, video_range: VideoRange, out: np.ndarray) -> None:
    """Writes the resized brightness of ``pixels`` (any strides) to ``out`` (uint8 HW)."""
    rows, cols = pixels.shape[:2]
    if native.available():
        limited = video_range is VideoRange.LIMITED
        along_columns, along_rows = _native_filter(cols, out.shape[1]), _native_filter(rows, out.shape[0])
        native.luma_resize(pixels, pixel_format.value, limited, along_columns, along_rows, out)
    else:
        grey = to_grey(pixels, pixel_format, video_range)
        out[:] = _resample_rows(_resample_columns(grey, out.shape[1]), out.shape[0])


@lru_cache(maxsize=64)
def _native_filter(in_size: int, out_size: int) -> native.ResampleFilter:
    return native.ResampleFilter(*coefficients(in_size, out_size), in_size)


def to_grey(pixels: np.ndarray, pixel_format: PixelFormat, video_range: VideoRange) -> np.ndarray:
    """Brightness of an image.

    Args:
        pixels: uint8, HW or HWC as the format says.
        pixel_format: meaning of the channels.
        video_range: meaning of the codes.

    Returns:
        uint8 HW.
    """
    if video_range is VideoRange.LIMITED:
        pixels = _FULL_FROM_LIMITED[pixels]
    if pixel_format is PixelFormat.GREY:
        return pixels
    red, blue = (2, 0) if pixel_format is PixelFormat.BGR else (0, 2)
    wide = pixels[..., red].astype(np.uint16) * 77
    wide += pixels[..., 1].astype(np.uint16) * 150
    wide += pixels[..., blue].astype(np.uint16) * 29
    wide += 128
    return (wide >> 8).astype(np.uint8)


_FULL_FROM_LIMITED = ((np.clip(np.arange(256), 16, 235) - 16) * 255 + 109) // 219
_FULL_FROM_LIMITED = _FULL_FROM_LIMITED.astype(np.uint8)


def resize(grey_HW: np.ndarray, out_h: int, out_w: int) -> np.ndarray:
    """Antialiased bilinear resize, columns first, then rows.

    Args:
        grey_HW: uint8 image.
        out_h: rows wanted.
        out_w: columns wanted.

    Returns:
        uint8 image of out_h x out_w, a new one.
    """
    out = np.empty((out_h, out_w), np.uint8)
    _fill(grey_HW, PixelFormat.GREY, VideoRange.FULL, out)
    return out


@lru_cache(maxsize=64)
def coefficients(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Fixed-point triangle-filter weights of one axis.

    Pillow, Resample.c, precompute_coeffs.

    Args:
        in_size: samples along the axis.
        out_size: samples wanted.

    Returns:
        first: int32 (out_size,), first input sample of each output.
        weights: int32 (out_size, taps), zero beyond each output's support. Both are shared: read-only.
    """
    scale = in_size / out_size
    filter_scale = max(scale, 1.0)
    support = filter_scale
    taps = int(np.ceil(support)) * 2 + 1
    first = np.zeros(out_size, np.int32)
    weights = np.zeros((out_size, taps), np.int32)
    inverse = 1.0 / filter_scale
    for i in range(out_size):
        center = (i + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), in_size)
        raw = [max(0.0, 1.0 - abs((x + low - center + 0.5) * inverse)) for x in range(high - low)]
        total = 0.0
        for value in raw:
            total += value
        # multiply by the reciprocal, as Pillow does
        recip = 1.0 / total if total != 0.0 else 0.0
        first[i] = low
        weights[i, : high - low] = [int(0.5 + value * recip * (1 << PRECISION_BITS)) for value in raw]
    first.flags.writeable = weights.flags.writeable = False
    return first, weights


def _resample_columns(image_HW: np.ndarray, out_w: int) -> np.ndarray:
    if out_w == image_HW.shape[1]:
        return image_HW
    first, weights = coefficients(image_HW.shape[1], out_w)
    out = np.full((image_HW.shape[0], out_w), 1 << (PRECISION_BITS - 1), np.int32)
    last = image_HW.shape[1] - 1
    for tap in range(weights.shape[1]):
        column = np.minimum(first + tap, last)
        out += image_HW[:, column].astype(np.int32) * weights[:, tap]
    return np.clip(out >> PRECISION_BITS, 0, 255).astype(np.uint8)


def _resample_rows(image_HW: np.ndarray, out_h: int) -> np.ndarray:
    return _resample_columns(np.ascontiguousarray(image_HW.T), out_h).T


__all__ = ["PRECISION_BITS", "Placement", "backend", "coefficients", "place", "preprocess", "resize", "to_grey"]
