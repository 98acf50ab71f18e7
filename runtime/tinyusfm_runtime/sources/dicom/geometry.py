"""Geometry and time of a DICOM file.

Millimetres of the part that is looked at, and when each frame was taken.

Millimetres come from the ultrasound region that the view lies in (SequenceOfUltrasoundRegions, PS3.3 C.8.5.5), else
from PixelMeasuresSequence (enhanced objects, shared or frame by frame), else from PixelSpacing. Two regions of
different depth have no common spacing; a view inside one of them has that one's. A file whose region does not fit its
own image was resized after acquisition: its spacing is not used.

Times come from FrameTimeVector, FrameTime, ActualFrameDuration, CineRate or RecommendedDisplayFrameRate, the first that
is there and possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinyusfm_runtime.sources._crop import Box
from tinyusfm_runtime.sources.dicom.header import DicomHeader

CENTIMETRE = 3
"""PhysicalUnitsXDirection code for cm (PS3.3 C.8.5.5.1.15)."""
TISSUE_2D = 1
"""RegionSpatialFormat code for 2D (PS3.3 C.8.5.5.1.1)."""
PERIODS_MS = (0.2, 10_000.0)
"""Shortest and longest time from frame to frame: 5,000 images per second, one in ten seconds."""
FORMATS = {
    2: "an M-mode",
    3: "a spectral Doppler",
    4: "a curve",
    5: "a graphics",
}
"""Codes of RegionSpatialFormat for regions that are no 2D image (PS3.3 C.8.5.5.1.1)."""
SAME = 0.01
"""Two spacings that differ by less, relatively, are one."""
Spacing = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A two-dimensional ultrasound region that fits the image.

    Attributes:
        box: (row, column, height, width) in frame pixels.
        spacing_mm: (row, column), or None where it has none in cm.
    """

    box: Box
    spacing_mm: Spacing | None

    @property
    def area(self) -> int:
        """Pixels inside."""
        return self.box[2] * self.box[3]


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherRegion:
    """An ultrasound region in which the millimetres of a 2D image do not hold.

    Attributes:
        box: (row, column, height, width) in frame pixels, or None where that is not said or lies outside.
        name: what it is, with its article.
    """

    box: Box | None
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Millimetres of one view of a file.

    Attributes:
        spacing_mm: (row, column), mm, or None.
        per_frame: spacing of each frame where they differ, else empty.
        region: the largest region's box, or None.
        aspect: column spacing over row spacing by PixelAspectRatio, or None where it is 1 or not said.
        notes: what there is to tell, one line each.
        doubts: where the tags contradict each other, one line each.
    """

    spacing_mm: Spacing | None
    per_frame: tuple[Spacing | None, ...] = ()
    region: Box | None = None
    aspect: float | None = None
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def geometry_of(header: DicomHeader, view: Box | str | None) -> Geometry:
    """Finds the spacing of a view.

    Args:
        header: of the file.
        view: (row, column, height, width) of a crop, ``region`` for the largest region, or None for the whole image.
    """
    dataset = header.dataset
    aspect = _aspect(dataset.get("PixelAspectRatio"))
    regions, misfit = _regions(header)
    if misfit:
        note = "the ultrasound region does not fit the image, which was resized or cut: no spacing"
        return Geometry(spacing_mm=None, aspect=aspect, notes=(note,))
    if regions:
        largest = max(regions, key=lambda region: region.area)
        seen = largest.box if view == "region" else view
        spacing, notes = _of_view(regions, seen)
        if spacing is not None:
            notes = (*notes, *_beside(regions, _others(header), seen))
        doubts = _contradiction(spacing, _pair(dataset.get("PixelSpacing")))
        return Geometry(spacing_mm=spacing, region=largest.box, aspect=aspect, notes=notes, doubts=doubts)
    per_frame = _measures(dataset)
    if len(set(per_frame)) == 1:
        return Geometry(spacing_mm=per_frame[0], aspect=aspect, notes=() if per_frame[0] else _NO_SPACING)
    if per_frame:
        note = "the file gives each frame a spacing of its own"
        return Geometry(spacing_mm=None, per_frame=tuple(per_frame), aspect=aspect, notes=(note,))
    plain = _pair(dataset.get("PixelSpacing"))
    return Geometry(spacing_mm=plain, aspect=aspect, notes=() if plain else _NO_SPACING)


def _contradiction(region: Spacing | None, plain: Spacing | None) -> tuple[str, ...]:
    if region is None or plain is None or all(abs(a / b - 1) < 0.05 for a, b in zip(region, plain, strict=True)):
        return ()
    shown = [f"{pair[0]:.4g},{pair[1]:.4g} mm" for pair in (region, plain)]
    return (f"the ultrasound region says {shown[0]} and PixelSpacing {shown[1]}: the region counts",)


_NO_SPACING = ("the DICOM file gives no spacing: measurements are in pixels; --spacing MM gives millimetres",)


def _regions(header: DicomHeader) -> tuple[list[Region], bool]:
    """Regions that fit the image, and whether one does not."""
    found, misfit = [], False
    for item in header.dataset.get("SequenceOfUltrasoundRegions") or []:
        if item.get("RegionSpatialFormat") != TISSUE_2D:
            continue
        box = _region_box(item, header)
        if box is None:
            misfit = True
        else:
            found.append(Region(box=box, spacing_mm=_region_spacing(item)))
    return found, misfit


def _of_view(regions: Sequence[Region], view: Box | str | None) -> tuple[Spacing | None, tuple[str, ...]]:
    """The spacing that holds for all of a view."""
    inside = list(regions)
    if isinstance(view, tuple):
        around = [region for region in regions if _contains(region.box, view)]
        touched = [region for region in regions if _overlap(region.box, view)]
        # of regions that lie inside one another the smallest is the view's own
        inside = [min(around, key=lambda region: region.area)] if around else touched
        if not inside:
            return None, ("the crop lies outside the ultrasound regions that the file marks: no spacing",)
    largest = max(inside, key=lambda region: region.area)
    others = [region.spacing_mm for region in inside if region.spacing_mm is not None]
    if largest.spacing_mm is None:
        return None, ("the ultrasound region has no spacing in cm",)
    if any(not _same(other, largest.spacing_mm) for other in others):
        what = "the crop" if isinstance(view, tuple) else "the whole image (crop to one of them)"
        return None, (f"several regions of different depth: no spacing for {what}",)
    return largest.spacing_mm, ()


def _others(header: DicomHeader) -> list[OtherRegion]:
    """Regions that are no 2D image."""
    found = []
    for item in header.dataset.get("SequenceOfUltrasoundRegions") or []:
        kind = item.get("RegionSpatialFormat")
        if kind == TISSUE_2D:
            continue
        try:
            box = _region_box(item, header, smallest=1)
        except (AttributeError, TypeError, ValueError):
            box = None
        found.append(OtherRegion(box=box, name=FORMATS.get(kind, "another")))
    return found


def _beside(regions: Sequence[Region], others: Sequence[OtherRegion], view: Box | str | None) -> tuple[str, ...]:
    """The note that parts of a view are in no 2D region with millimetres, or none."""
    inside = [region for region in regions if region.spacing_mm is not None]
    unknown = [OtherRegion(box=region.box, name="a 2D") for region in regions if region.spacing_mm is None]
    seen = [*others, *unknown]
    if isinstance(view, tuple):
        if any(_contains(region.box, view) for region in inside):
            return ()
        seen = [other for other in seen if other.box is not None and _overlap(other.box, view)]
        inside = [region for region in inside if _overlap(region.box, view)]
    if not seen:
        return ()
    names = " and ".join(dict.fromkeys(other.name for other in seen))
    row, column, height, width = max(inside, key=lambda region: region.area).box
    return (
        f"the image also shows {names} region, where its millimetres do not hold: "
        f"--crop {row},{column},{height},{width} takes the 2D region alone",
    )


def _same(one: Spacing, other: Spacing) -> bool:
    return bool(np.allclose(one, other, rtol=SAME))


def _contains(outer: Box, inner: Box) -> bool:
    # regions are drawn by hand in some firmware: one pixel of slack
    ends = (outer[0] + outer[2] + 1, outer[1] + outer[3] + 1)
    return (
        inner[0] >= outer[0] - 1
        and inner[1] >= outer[1] - 1
        and inner[0] + inner[2] <= ends[0]
        and inner[1] + inner[3] <= ends[1]
    )


def _overlap(one: Box, other: Box) -> bool:
    rows = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    columns = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return rows > 1 and columns > 1


def _region_box(item: Any, header: DicomHeader, smallest: int = 8) -> Box | None:
    """(row, column, height, width), or None where it is not in the image.

    1 pixel of slack.
    """
    x0, y0 = int(item.RegionLocationMinX0), int(item.RegionLocationMinY0)
    x1, y1 = int(item.RegionLocationMaxX1), int(item.RegionLocationMaxY1)
    if x1 - x0 < smallest or y1 - y0 < smallest or x1 > header.columns or y1 > header.rows:
        return None
    return y0, x0, min(y1, header.rows - 1) - y0 + 1, min(x1, header.columns - 1) - x0 + 1


def _region_spacing(item: Any) -> Spacing | None:
    units = item.get("PhysicalUnitsXDirection"), item.get("PhysicalUnitsYDirection")
    spacing = abs(float(item.get("PhysicalDeltaY") or 0)) * 10.0, abs(float(item.get("PhysicalDeltaX") or 0)) * 10.0
    return spacing if units == (CENTIMETRE, CENTIMETRE) and _possible(spacing) else None


def _measures(dataset: Any) -> list[Spacing | None]:
    """PixelSpacing of each frame of an enhanced object.

    One entry where all share it (PS3.3 C.7.6.16.2.1).
    """
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    found = [_measure(group) for group in per_frame]
    if any(spacing is not None for spacing in found):
        return found
    shared = [_measure(group) for group in dataset.get("SharedFunctionalGroupsSequence") or []]
    return shared[:1] if shared and shared[0] is not None else []


def _measure(group: Any) -> Spacing | None:
    for item in group.get("PixelMeasuresSequence") or []:
        return _pair(item.get("PixelSpacing"))
    return None


def _pair(value: Any) -> Spacing | None:
    try:
        pair = float(value[0]), float(value[1])
    except (TypeError, ValueError, IndexError):
        return None
    return pair if len(value) == 2 and _possible(pair) else None


def _possible(spacing: Spacing) -> bool:
    return all(bool(np.isfinite(side)) and 1e-4 < side < 100 for side in spacing)


def _aspect(value: Any) -> float | None:
    """Column spacing over row spacing from PixelAspectRatio.

    Vertical, horizontal (PS3.3 C.7.6.3.1.7).
    """
    try:
        ratio = float(value[1]) / float(value[0])
    except (TypeError, ValueError, IndexError, ZeroDivisionError):
        return None
    return ratio if 0.1 < ratio < 10 and abs(ratio - 1) > SAME else None


def frame_times_ns(dataset: Any, frames: int, doubts: list[str] | None = None) -> tuple[list[int] | None, list[str]]:
    """Start of each frame on the file's own clock.

    Args:
        dataset: the tags.
        frames: how many frames there are.
        doubts: takes what cannot be, one line each, or None.

    Returns:
        ns for each frame, or None if the file tells no time, and notes.
    """
    notes: list[str] = []
    doubts = [] if doubts is None else doubts
    vector = _numbers(dataset.get("FrameTimeVector"))
    if vector is not None and len(vector) == frames and _are_times(vector):
        doubts.append("FrameTimeVector holds times and not the steps between them: read as times")
        return [int((time_ms - vector[0]) * 1e6) for time_ms in vector], notes
    if vector is not None and len(vector) >= frames and all(step >= 0 for step in vector[1:]):
        if len(vector) > frames:
            notes.append(f"FrameTimeVector has {len(vector)} entries for {frames} frames: the first are used")
        return [int(total) for total in np.cumsum([0.0, *vector[1:frames]]) * 1e6], notes
    if vector is not None:
        notes.append(f"FrameTimeVector has {len(vector)} entries for {frames} frames: it is not used")
    for keyword, rate in (
        ("FrameTime", False), ("ActualFrameDuration", False), ("CineRate", True), ("RecommendedDisplayFrameRate", True),
    ):  # fmt: skip
        numbers = _numbers(dataset.get(keyword))
        if not numbers or not 1e-3 < numbers[0] < 1e6:
            continue
        period_ms = 1000.0 / numbers[0] if rate else numbers[0]
        if not PERIODS_MS[0] <= period_ms <= PERIODS_MS[1]:
            doubts.append(f"{keyword} gives {period_ms:g} ms from frame to frame, which cannot be: it is not used")
            continue
        if rate and frames > 1:
            notes.append(f"the file gives no FrameTime: {keyword} ({numbers[0]:g} Hz) tells the rate")
        return [int(index * period_ms * 1e6) for index in range(frames)], notes
    return None, notes


def _are_times(vector: list[float]) -> bool:
    """Whether steps grow all the way, as times do and steps do not."""
    rising = all(b > a for a, b in zip(vector, vector[1:], strict=False))
    return len(vector) >= 4 and rising and vector[-1] - vector[0] > 0.8 * (len(vector) - 1) * (vector[1] - vector[0])


def _numbers(value: Any) -> list[float] | None:
    if value in (None, ""):
        return None
    try:
        values = [value] if isinstance(value, str | int | float) else list(value)
        found = [float(each) for each in values]
    except (TypeError, ValueError):
        return None
    return found if found and all(np.isfinite(found)) else None


__all__ = [
    "CENTIMETRE",
    "FORMATS",
    "PERIODS_MS",
    "SAME",
    "TISSUE_2D",
    "Geometry",
    "OtherRegion",
    "Region",
    "Spacing",
    "frame_times_ns",
    "geometry_of",
]
