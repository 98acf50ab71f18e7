"""Heads as ellipses: ``ellipses.csv`` beside a table.

They are drawn as masks at any size and measured in mm.

A filled mask that was made of a drawn outline is as much too wide as half the line; the ellipse is not. An ellipse is
kept as a centre and a 2x2 matrix that maps the unit circle to it, so that scaling rows and columns apart is exact.
It does not know models or images.

Coordinates: x to the columns, y to the rows, in pixels, a pixel's centre at whole numbers. HW rows and columns.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.measure import ramanujan_mm
from tinyusfm_runtime.numerics.preprocess import Placement

ELLIPSES = "ellipses.csv"
"""Name of the file in a data folder: file,centre_x,centre_y,semi_major,semi_minor,angle_deg, in original pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ellipse:
    """An ellipse in an image.

    Attributes:
        centre_xy: column and row.
        shape: rows of the 2x2 matrix that maps the unit circle to the ellipse, pixels.
    """

    centre_xy: tuple[float, float]
    shape: tuple[tuple[float, float], tuple[float, float]]

    @classmethod
    def from_axes(cls, centre_xy: tuple[float, float], major: float, minor: float, angle_deg: float) -> Ellipse:
        """An ellipse of two semi-axes and an angle.

        The angle is that of the major axis, from the columns towards the rows.
        """
        cos, sin = math.cos(math.radians(angle_deg)), math.sin(math.radians(angle_deg))
        return cls(centre_xy=centre_xy, shape=((major * cos, -minor * sin), (major * sin, minor * cos)))

    def scaled(self, x: float, y: float) -> Ellipse:
        """The same ellipse in an image resized by these factors.

        A pixel is an area, so the centre moves too.
        """
        (a, b), (c, d) = self.shape
        centre = ((self.centre_xy[0] + 0.5) * x - 0.5, (self.centre_xy[1] + 0.5) * y - 0.5)
        return Ellipse(centre_xy=centre, shape=((a * x, b * x), (c * y, d * y)))

    def shifted(self, x: float, y: float) -> Ellipse:
        """The same ellipse moved."""
        return Ellipse(centre_xy=(self.centre_xy[0] + x, self.centre_xy[1] + y), shape=self.shape)

    def placed(self, placement: Placement) -> Ellipse:
        """The ellipse of a frame in the model's input."""
        row, col, height, width = placement.crop
        top, left, box_h, box_w = placement.box
        return self.shifted(-col, -row).scaled(box_w / width, box_h / height).shifted(left, top)

    def unplaced(self, placement: Placement) -> Ellipse:
        """The ellipse of a model's input in the frame."""
        row, col, height, width = placement.crop
        top, left, box_h, box_w = placement.box
        return self.shifted(-left, -top).scaled(width / box_w, height / box_h).shifted(col, row)

    def semi_axes(self, spacing_mm: tuple[float, float] = (1.0, 1.0)) -> tuple[float, float]:
        """Both semi-axes, the longer first, in mm or in pixels.

        In mm for a spacing of (row, column), else in pixels.
        """
        scale = np.array([[spacing_mm[1]], [spacing_mm[0]]])
        found = np.linalg.svd(np.array(self.shape) * scale, compute_uv=False)
        return float(found[0]), float(found[1])

    def circumference(self, spacing_mm: tuple[float, float] = (1.0, 1.0)) -> float:
        """Circumference by Ramanujan's second formula, mm or pixels."""
        return ramanujan_mm(*self.semi_axes(spacing_mm))

    def coverage(self, height: int, width: int, *, fine: int = 4) -> np.ndarray:
        """Share of every pixel that lies inside, float32 HW.

        Args:
            height: rows of the image.
            width: columns.
            fine: samples along each side of a pixel.
        """
        offsets = (np.arange(fine) + 0.5) / fine - 0.5
        x = (np.arange(width)[:, None] + offsets).ravel() - self.centre_xy[0]
        y = (np.arange(height)[:, None] + offsets).ravel() - self.centre_xy[1]
        matrix = np.array(self.shape)
        if abs(np.linalg.det(matrix)) < 1e-9:
            return np.zeros((height, width), np.float32)
        (a, b), (c, d) = np.linalg.inv(matrix)
        inside = (a * x + b * y[:, None]) ** 2 + (c * x + d * y[:, None]) ** 2 <= 1.0
        shares: np.ndarray = inside.reshape(height, fine, width, fine).mean((1, 3), dtype=np.float32)
        return shares


def read_ellipses(folder: Path) -> dict[str, tuple[float, float, float, float, float]]:
    """File -> centre x, centre y, semi-axes and angle, in the original's pixels.

    Empty without such a file.

    Args:
        folder: of the table.

    Raises:
        InputError: a column is missing, or a cell is no number.
    """
    path = folder / ELLIPSES
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
        names = ("centre_x", "centre_y", "semi_major", "semi_minor", "angle_deg")
        return {row["file"]: tuple(float(row[name]) for name in names) for row in rows}  # type: ignore[misc]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder.name}/{ELLIPSES} is not usable: file,centre_x,centre_y,semi_major,semi_minor,angle_deg wanted"
        ) from error


__all__ = ["ELLIPSES", "Ellipse", "read_ellipses"]
