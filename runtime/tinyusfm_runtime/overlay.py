"""Draws an answer onto its frame, in numpy alone; and packs PNG.

Mask outline, ellipse, one line of text.

The image is for people. Nothing is measured on it, and what it shows is what the Prediction says:
an invalid answer shows no mask, an unverified artefact is written on every image. It does not know
video files or web pages; sinks and reports do.

Shapes: HW = rows, columns of the frame; HWC = rows, columns, RGB.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.numerics.preprocess import to_grey
from tinyusfm_runtime.reading import DriftStatus, ReadingState, Reason, SecondPassState

if TYPE_CHECKING:
    from tinyusfm_runtime.numerics.measure import Measurement
    from tinyusfm_runtime.results import Prediction

OUTLINE_RGB = (70, 220, 255)
"""Edge of the mask: cyan stays apart from grey tissue and from the colours of Doppler's red half."""
ELLIPSE_RGB = (255, 205, 60)
"""The fitted ellipse."""
MODEL_RGB = (OUTLINE_RGB, (255, 140, 220), (140, 255, 140), (255, 170, 90))
"""Of several models the colour of each, in turn; the live page has the same."""
TEXT_RGB = (255, 255, 255)
WARNING_RGB = (255, 90, 90)
DASHES = 24
"""Pieces of the ellipse of a doubtful reading."""
_GLYPH_ROWS = 7

# 5x7 letters, one row of five dots per group, drawn for this project
_FONT = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01110 10001 10000 10000 10000 10001 01110",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01110 10001 10000 10111 10001 10001 01110",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "I": "01110 00100 00100 00100 00100 00100 01110",
    "J": "00001 00001 00001 00001 00001 10001 01110",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 10101 10101 10011 10001 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "Q": "01110 10001 10001 10001 10101 10010 01101",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "V": "10001 10001 10001 10001 10001 01010 00100",
    "W": "10001 10001 10001 10101 10101 11011 10001",
    "X": "10001 01010 00100 00100 00100 01010 10001",
    "Y": "10001 01010 00100 00100 00100 00100 00100",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
    "m": "00000 00000 11010 10101 10101 10101 10101",
    "p": "00000 00000 11110 10001 11110 10000 10000",
    "s": "00000 00000 01111 10000 01110 00001 11110",
    "x": "00000 00000 10001 01010 00100 01010 10001",
    ".": "00000 00000 00000 00000 00000 01100 01100",
    "-": "00000 00000 00000 11111 00000 00000 00000",
    "%": "11001 11010 00010 00100 01000 01011 10011",
    ":": "00000 01100 01100 00000 01100 01100 00000",
    " ": "00000 00000 00000 00000 00000 00000 00000",
}


def draw(frame: Frame, prediction: Prediction, *, text: bool = True, labels: Sequence[str] = ()) -> np.ndarray:
    """Draws a prediction onto its frame.

    Args:
        frame: the frame that was predicted.
        prediction: what was said about it.
        text: False leaves the words out.
        labels: names of a classifier's classes, so that their probabilities can be written.

    Returns:
        uint8 HWC (RGB, full range), a new array.
    """
    image_HWC = as_rgb(frame)
    draw_shapes(image_HWC, prediction)
    if text:
        for line, (words, colour) in enumerate(captions(prediction, labels)):
            write_line(image_HWC, words, line, colour)
    return image_HWC


def draw_shapes(
    image_HWC: np.ndarray,
    prediction: Prediction,
    *,
    outline_rgb: tuple[int, int, int] = OUTLINE_RGB,
    ellipse_rgb: tuple[int, int, int] = ELLIPSE_RGB,
) -> None:
    """Draws mask and ellipse in place, without words.

    Args:
        image_HWC: uint8 HWC (RGB) of the frame's size.
        prediction: what was said about the frame.
        outline_rgb: colour of the mask's edge.
        ellipse_rgb: colour of the ellipse.
    """
    unit = _unit(image_HWC)
    if prediction.mask_HW is not None:
        _paint(image_HWC, _thick(outline(prediction.mask_on_frame()), unit - 1), outline_rgb)
    measured = prediction.measurement
    if measured is not None and measured.found and measured.has_ellipse:
        ellipse_HW = np.zeros(image_HWC.shape[:2], bool)
        rows, cols = ellipse_points(measured)
        if prediction.reading is ReadingState.DOUBTFUL:
            rows, cols = _dashed(rows), _dashed(cols)
        num_rows, num_cols = prediction.placement.frame_size
        inside = (rows >= 0) & (rows < num_rows) & (cols >= 0) & (cols < num_cols)
        ellipse_HW[rows[inside], cols[inside]] = True
        _paint(image_HWC, _thick(ellipse_HW, unit - 1), ellipse_rgb)


def as_rgb(frame: Frame) -> np.ndarray:
    """The frame's pixels as full-range RGB, uint8 HWC, a new array."""
    pixels = frame.pixels
    if VideoRange(frame.video_range) is VideoRange.LIMITED:
        # to_grey expands the range code by code, whatever the shape
        pixels = to_grey(pixels, PixelFormat.GREY, VideoRange.LIMITED)
    kind = PixelFormat(frame.pixel_format)
    if kind is PixelFormat.GREY:
        return np.repeat(pixels[..., None], 3, axis=2)
    order = [2, 1, 0] if kind is PixelFormat.BGR else [0, 1, 2]
    return np.ascontiguousarray(pixels[..., order])


def outline(mask_HW: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a 4-neighbour of another label; bool HW."""
    padded = np.pad(mask_HW, 1)
    centre = padded[1:-1, 1:-1]
    differs = (padded[:-2, 1:-1] != centre) | (padded[2:, 1:-1] != centre)
    differs |= (padded[1:-1, :-2] != centre) | (padded[1:-1, 2:] != centre)
    return differs & (centre > 0)


def _dashed(points: np.ndarray) -> np.ndarray:
    """Every other of ``DASHES`` pieces of a closed line."""
    return points[np.arange(len(points)) * 2 * DASHES // len(points) % 2 == 0]


def ellipse_points(measured: Measurement) -> tuple[np.ndarray, np.ndarray]:
    """Points of the measured ellipse on the frame, dense enough to leave no gap.

    Returns:
        rows, columns: int64, frame pixels; some may lie outside the frame.
    """
    major, minor = measured.axes_px
    rows, cols = ellipse_curve(measured, max(64, int(8 * (major + minor))))
    return np.rint(rows).astype(np.int64), np.rint(cols).astype(np.int64)


def ellipse_curve(measured: Measurement, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of the measured ellipse on the frame, between its pixels.

    Args:
        measured: an ellipse reading that found something.
        steps: how many points, evenly turned, the first at the end of the major axis.

    Returns:
        rows, columns: float64, frame pixels, pixel centres at whole numbers; some may lie outside the frame.
    """
    major, minor = measured.axes_px
    turn = np.linspace(0.0, 2.0 * math.pi, steps, endpoint=False)
    along, across = 0.5 * major * np.cos(turn), 0.5 * minor * np.sin(turn)
    angle = math.radians(measured.angle_deg)
    rows = measured.centre_px[0] + along * math.sin(angle) + across * math.cos(angle)
    cols = measured.centre_px[1] + along * math.cos(angle) - across * math.sin(angle)
    return rows, cols


def captions(prediction: Prediction, labels: Sequence[str] = ()) -> list[tuple[str, tuple[int, int, int]]]:
    """The lines of text of an overlay.

    The reading, then whatever must be known before it is believed.

    Args:
        prediction: what was said about a frame.
        labels: names of a classifier's classes; their probabilities are written, the likeliest first.
    """
    lines = [(_words(measured), TEXT_RGB) for measured in prediction.measurements]
    scores = prediction.scores
    if scores is not None and scores.ndim == 1 and len(scores) == len(labels):
        best = sorted(range(len(labels)), key=lambda index: -float(scores[index]))[:CLASSES]
        lines += [(f"{labels[index]} {100 * float(scores[index]):.0f} %", TEXT_RGB) for index in best]
    if prediction.found and prediction.reading is ReadingState.DOUBTFUL:
        lines.append(("DOUBTFUL", WARNING_RGB))
    lines += [(_REASONS[reason], WARNING_RGB) for reason in prediction.reasons]
    lines += [(words, WARNING_RGB) for words in _unchecked(prediction)]
    if not prediction.judged and any(measured.touches_border for measured in prediction.measurements):
        lines.append(("AT BORDER", WARNING_RGB))
    if not prediction.valid:
        lines.append(("INVALID", WARNING_RGB))
    if not prediction.verified:
        lines.append(("UNVERIFIED", WARNING_RGB))
    if prediction.degraded:
        lines.append(("DEGRADED", WARNING_RGB))
    return lines


CLASSES = 3
"""Classes whose probabilities are written."""
_REASONS = {
    Reason.CONFIDENCE: "LOW CONFIDENCE",
    Reason.AGREEMENT: "NO CLEAN ELLIPSE",
    Reason.BORDER: "AT BORDER",
    Reason.SECTOR: "CUT BY SECTOR",
    Reason.SIZE: "SIZE NOT PLAUSIBLE",
    Reason.SPACING: "SPACING NOT PLAUSIBLE",
    Reason.DRIFT: "UNLIKE CALIBRATION",
}
"""What speaks against a reading, in the few letters of an image."""


def _unchecked(prediction: Prediction) -> list[str]:
    """What nobody looked at, so that the reading does not pass for a good one."""
    if not prediction.judged:
        return []
    said = (
        ("UNCHECKED", prediction.found and prediction.reading is ReadingState.UNCHECKED),
        (f"DRIFT {prediction.drift_status.value}".upper(), prediction.drift_status is not DriftStatus.CHECKED),
        ("SECOND PASS OFF", prediction.second_pass is SecondPassState.OFF),
    )
    return [words for words, holds in said if holds]


def _words(measured: Measurement) -> str:
    if not measured.found:
        return f"NO {(measured.label or 'mask').upper()}"
    if measured.has_ellipse:
        return f"HC {measured.hc_mm:.1f} mm" if measured.hc_mm is not None else f"HC {measured.hc_px:.0f} px"
    area = f"{measured.area_mm2:.0f} mm2" if measured.area_mm2 is not None else f"{measured.area_px:.0f} px"
    return f"{measured.label} {area}"


def write_line(image_HWC: np.ndarray, words: str, line: int, colour: tuple[int, int, int]) -> None:
    """Writes words in place as one of the lines in the upper left corner.

    The first line is 0.
    """
    unit = _unit(image_HWC)
    write(image_HWC, words, 4 * unit, (4 + (_GLYPH_ROWS + 4) * line) * unit, unit, colour)


def write(image_HWC: np.ndarray, words: str, left: int, top: int, scale: int, colour: tuple[int, int, int]) -> None:
    """Writes words in place.

    Letters that the small font lacks become capitals or dashes.
    """
    columns = []
    for letter in words:
        rows = _FONT.get(letter) or _FONT.get(letter.upper()) or _FONT["-"]
        glyph = np.array([[dot == "1" for dot in row] for row in rows.split()])
        columns.append(np.pad(glyph, ((0, 0), (0, 1))))
    if not columns:
        return
    dots = np.kron(np.concatenate(columns, axis=1), np.ones((scale, scale), bool))
    pad = 2 * scale
    # a darkened box keeps the words readable on bright, noisy tissue
    box = image_HWC[max(0, top - pad) : top + dots.shape[0] + pad, max(0, left - pad) : left + dots.shape[1] + pad]
    box //= 4
    room = image_HWC[top : top + dots.shape[0], left : left + dots.shape[1]]
    _paint(room, dots[: room.shape[0], : room.shape[1]], colour)


def encode_png(pixels: np.ndarray, *, level: int = 6) -> bytes:
    """Packs an image as PNG (RFC 2083): 8-bit grey or RGB, filter "sub" on every row.

    Args:
        pixels: uint8 HW or HWC with 3 channels.
        level: zlib's, 0 (fast, large) to 9.

    Returns:
        The file's bytes.
    """
    rows, cols = pixels.shape[:2]
    depth = pixels.reshape(rows, cols, -1)
    left = np.pad(depth[:, :-1], ((0, 0), (1, 0), (0, 0)))
    body = np.empty((rows, 1 + cols * depth.shape[2]), np.uint8)
    body[:, 0] = 1
    body[:, 1:] = (depth - left).reshape(rows, -1)
    colour_type = 0 if depth.shape[2] == 1 else 2
    head = cols.to_bytes(4, "big") + rows.to_bytes(4, "big") + bytes([8, colour_type, 0, 0, 0])
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(body.tobytes(), level)), (b"IEND", b""))
    packed = (
        len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big") for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _unit(image_HWC: np.ndarray) -> int:
    """Thickness of a line and size of a letter's dot.

    Large images are then readable too.
    """
    return max(1, round(min(image_HWC.shape[:2]) / 320))


def _paint(image_HWC: np.ndarray, where_HW: np.ndarray, colour: tuple[int, int, int]) -> None:
    image_HWC[where_HW] = colour


def _thick(where_HW: np.ndarray, radius: int) -> np.ndarray:
    """Grows a drawing by ``radius`` pixels in the four directions."""
    for _ in range(radius):
        grown = where_HW.copy()
        grown[1:] |= where_HW[:-1]
        grown[:-1] |= where_HW[1:]
        grown[:, 1:] |= where_HW[:, :-1]
        grown[:, :-1] |= where_HW[:, 1:]
        where_HW = grown
    return where_HW


__all__ = [
    "CLASSES",
    "DASHES",
    "ELLIPSE_RGB",
    "MODEL_RGB",
    "OUTLINE_RGB",
    "TEXT_RGB",
    "WARNING_RGB",
    "as_rgb",
    "captions",
    "draw",
    "draw_shapes",
    "ellipse_curve",
    "ellipse_points",
    "encode_png",
    "outline",
    "write",
    "write_line",
]
