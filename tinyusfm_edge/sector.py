"""Finds the sector of a probe in its frames, as patches of a model's input.

Every frame goes through the model's preprocessing. What lies in its field of view (numerics/shape.py: pixels above the
noise, words and scales beside the image left out) in at least one of fifty frames is in view. Where a fan fits that
view well, the fan's pixels count as well: a part that stayed dark in this clip may be lit in the next one. A patch is
kept if a few of its pixels are in view or in the fan.

    found = find_sector(frames, PreprocessSpec(), name="convex")
    print(found.sector.kept, found.fit)

It does not know students or how a graph is pruned (tinyusfm_export/graph/build.py).

Shapes: HW = rows, columns of the model's input; HWC = RGB.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.numerics.shape import field_of_view
from tinyusfm_runtime.overlay import encode_png, outline
from tinyusfm_runtime.reading_rules import PATCH, ProbeGeometry, TokenSector
from tinyusfm_runtime.spec import PreprocessSpec
from tinyusfm_runtime.strict_json import parse_json

MAX_FRAMES = 2000
"""Frames that are looked at; more say nothing new."""
SEEN_SHARE = 0.02
"""Share of the frames in whose field of view a pixel must lie."""
PIXELS_IN_PATCH = 4
"""A patch with fewer pixels in view is left out."""
GOOD_FIT = 0.9
"""Overlap (intersection over union) from which a fan counts as found."""
FIRST_VIEWS = 64
"""Frames whose own field of view is held against the sector."""
MOVING_CODES = 8
"""A pixel whose brightest and darkest code lie further apart changes."""
_VERSION = 1
_KIND = "tinyusfm-edge sector file"
_NARROW_DEG = 3.0
_KEPT_RGB, _LEFT_RGB, _FAN_RGB = (70, 220, 255), (255, 90, 90), (255, 205, 60)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSector:
    """What was found in some frames.

    Attributes:
        name: of the probe's geometry.
        sector: the patches to look at, or None: all of them are in view, so there is nothing to leave out.
        grid: rows and columns of patches.
        probe: the fan or rectangle that fits the view, or None where none does.
        fit: overlap (intersection over union) of that shape and the view, 0..1; 0 without one.
        frames: frames looked at.
        black: frames without a field of view.
        outside: largest share of one frame's field of view outside the sector, 0..1; of the first frames.
        still: patches in view whose pixels never changed, such as words; 0 where one frame says nothing about it.
        brightest_HW: the brightest code that each pixel had.
        view_HW: bool, in view.
        fan_HW: bool, in the fitted shape; nothing where none fits.
    """

    name: str
    sector: TokenSector | None
    grid: tuple[int, int]
    probe: ProbeGeometry | None
    fit: float
    frames: int
    black: int
    outside: float
    still: int
    brightest_HW: np.ndarray
    view_HW: np.ndarray
    fan_HW: np.ndarray

    @property
    def kept(self) -> int:
        """Patches that are looked at."""
        return math.prod(self.grid) if self.sector is None else len(self.sector.indices)

    def to_json(self) -> dict[str, Any]:
        """Plain data without the images, ready for ``json.dumps``."""
        return {
            "name": self.name,
            "grid": list(self.grid),
            "kept": None if self.sector is None else list(self.sector.kept),
            "patches": [self.kept, math.prod(self.grid)],
            "probe": None if self.probe is None else asdict(self.probe),
            "fit": round(self.fit, 4),
            "frames": self.frames,
            "black": self.black,
            "outside": round(self.outside, 4),
            "still": self.still,
        }


def find_sector(frames: Iterable[Frame], spec: PreprocessSpec, *, name: str = "sector") -> FoundSector:
    """Finds the sector in some frames of one probe.

    Args:
        frames: of one clip, or images that one probe took in one mode.
        spec: how a frame becomes the model's input.
        name: of the probe's geometry.

    Raises:
        InputError: no frames, none that shows anything, or an input that is no grid of patches.
        FrameError: a frame that the preprocessing cannot place.
    """
    seen = _See(spec)
    for frame in frames:
        if seen.count == MAX_FRAMES:
            break
        seen.add(frame)
    if not seen.count:
        raise InputError("there are no frames to find a sector in")
    if seen.black == seen.count:
        raise InputError("every frame is black, so no sector can be found")
    view_HW = seen.views_HW >= max(1, math.ceil(SEEN_SHARE * (seen.count - seen.black)))
    probe, fan_HW, fit = fit_probe(view_HW, seen.aspect, name)
    sector = _sector_of(view_HW | fan_HW, name)
    inside = np.ones_like(view_HW) if sector is None else sector.pixels_HW
    # of the first frames, whose own views were kept
    share = max((np.count_nonzero(view & ~inside) / view.sum() for view in seen.first_views), default=0.0)
    changing = seen.high_HW.astype(int) - seen.low_HW > MOVING_CODES
    patches = [_patches(mask).any((1, 3)) for mask in (view_HW, changing)]
    return FoundSector(
        name=name,
        sector=sector,
        grid=(spec.height // PATCH, spec.width // PATCH),
        probe=probe,
        fit=fit,
        frames=seen.count,
        black=seen.black,
        outside=float(share),
        still=int((patches[0] & ~patches[1]).sum()) if seen.count > 1 else 0,
        brightest_HW=seen.high_HW,
        view_HW=view_HW,
        fan_HW=fan_HW,
    )


class _See:
    """Sums over frames."""

    def __init__(self, spec: PreprocessSpec) -> None:
        if spec.height % PATCH or spec.width % PATCH:
            raise InputError(f"input size {spec.height}x{spec.width} is no grid of {PATCH}x{PATCH} patches")
        size = (spec.height, spec.width)
        self._spec = spec
        self.high_HW, self.low_HW = np.zeros(size, np.uint8), np.full(size, 255, np.uint8)
        self.views_HW = np.zeros(size, np.int32)
        self.count = self.black = 0
        self.aspect = 1.0
        self.first_views: list[np.ndarray] = []

    def add(self, frame: Frame) -> None:
        tensor, placement = preprocess(frame, self._spec)
        codes_HW = tensor[0].max(axis=0)
        view_HW = field_of_view(codes_HW)
        if not self.count:
            (rows, cols), (box_rows, box_cols) = placement.crop[2:], placement.box[2:]
            # the input stretches the frame: this wide is one of its pixels for each unit of height
            self.aspect = (cols / box_cols) / (rows / box_rows)
        self.count += 1
        self.black += not view_HW.any()
        self.views_HW += view_HW
        np.maximum(self.high_HW, codes_HW, out=self.high_HW)
        np.minimum(self.low_HW, codes_HW, out=self.low_HW)
        if view_HW.any() and len(self.first_views) < FIRST_VIEWS:
            self.first_views.append(view_HW)


def fit_probe(view_HW: np.ndarray, aspect: float, name: str) -> tuple[ProbeGeometry | None, np.ndarray, float]:
    """Fits a fan to a view, or says that its sides are upright.

    Args:
        view_HW: bool, in view.
        aspect: width of the input's pixels by their height, in the frame.
        name: of the probe.

    Returns:
        The geometry in shares of the input, or None; its pixels (none of a rectangle, whose width no geometry holds);
        how well it fits, 0..1.
    """
    rows = np.flatnonzero(view_HW.any(axis=1))
    nothing = np.zeros_like(view_HW)
    if len(rows) < PATCH:
        return None, nothing, 0.0
    height, width = view_HW.shape
    left = np.argmax(view_HW[rows], axis=1) * aspect
    right = (width - np.argmax(view_HW[rows][:, ::-1], axis=1)) * aspect
    # straight sides: from where the view begins to where it is widest
    last = max(PATCH, int(np.argmax(right - left >= 0.98 * (right - left).max())))
    (a, b), (c, d) = _line(rows[:last], left[:last]), _line(rows[:last], right[:last])
    if math.degrees(math.atan(d) - math.atan(b)) < 2 * _NARROW_DEG:
        middle = float(np.median(wide(left + right)) / 2 / aspect / width)
        apex = (float(rows[0] / height), middle)
        depth = (rows[-1] + 1 - rows[0]) / height
        flat = ProbeGeometry(name=name, kind="linear", apex=apex, radii=(0.0, float(depth)), angles_deg=(0.0, 0.0))
        box = nothing.copy()
        first, behind = int(np.median(wide(left)) / aspect), math.ceil(np.median(wide(right)) / aspect)
        box[rows[0] : rows[-1] + 1, first:behind] = True
        return flat, nothing, _overlap(view_HW, box)
    apex_row = (a - c) / (d - b)
    apex_col = (a + b * apex_row) / aspect
    y, x = np.indices(view_HW.shape) + 0.5
    away = np.hypot(y - apex_row, (x - apex_col) * aspect)[view_HW]
    near, far = np.percentile(wide(away), (0.2, 99.8))
    fan = ProbeGeometry(
        name=name,
        kind="sector",
        apex=(float(apex_row / height), float(apex_col / width)),
        radii=(float(max(0.0, near) / height), float(far / height)),
        angles_deg=(math.degrees(math.atan(b)), math.degrees(math.atan(d))),
    )
    fan_HW = fan_pixels(fan, view_HW.shape, aspect)
    fit = _overlap(view_HW, fan_HW)
    return (fan, fan_HW, fit) if fit >= GOOD_FIT else (None, nothing, fit)


def fan_pixels(probe: ProbeGeometry, size: tuple[int, ...], aspect: float = 1.0) -> np.ndarray:
    """Pixels of an input in a probe's fan, bool HW.

    Args:
        probe: of kind ``sector``, in shares of the input.
        size: rows and columns of the input.
        aspect: width of the input's pixels by their height, in the frame.

    Raises:
        InputError: a linear probe, whose geometry says nothing about its width.
    """
    if probe.kind != "sector":
        raise InputError(f"probe {probe.name!r} is linear: its geometry does not say how wide it is, so give a mask")
    y, x = np.indices(size) + 0.5
    down, across = y - probe.apex[0] * size[0], (x - probe.apex[1] * size[1]) * aspect
    away, angle = np.hypot(down, across) / size[0], np.degrees(np.arctan2(across, down))
    inside = (away >= probe.radii[0]) & (away <= probe.radii[1])
    return np.asarray(inside & (angle >= probe.angles_deg[0]) & (angle <= probe.angles_deg[1]))


def read_sector(place: Path) -> tuple[TokenSector, ProbeGeometry | None]:
    """Reads a sector file, or a mask image whose bright pixels are the sector.

    Args:
        place: of a file that ``sector_bytes`` made, or of an image of the model's input size.

    Returns:
        The sector, and the geometry of its probe if the file holds one.

    Raises:
        InputError: no such file, or one that holds no sector.
    """
    if not place.is_file():
        raise InputError(f"there is no sector file {place}: tinyusfm-edge sector CLIP --out FILE.json writes one")
    if place.suffix.lower() != ".json":
        return _from_image(place), None
    try:
        data = parse_json(place.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"the sector file {place} cannot be read: {error}") from error
    keys = {"kind", "version", "name", "kept", "probe", "frames"}
    if not isinstance(data, Mapping) or set(data) != keys or data["kind"] != _KIND or data["version"] != _VERSION:
        raise InputError(f"{place} is no sector file: tinyusfm-edge sector CLIP --out FILE.json writes one")
    if data["kept"] is None:
        raise InputError(f"{place}: every patch is in view there, so nothing can be left out: export without --sector")
    sector = TokenSector.from_json({"name": data["name"], "kept": data["kept"]})
    return sector, None if data["probe"] is None else ProbeGeometry.from_json(data["probe"])


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenSector:
    """What an export was asked to prune to.

    Attributes:
        sector: the patches to look at, or None: nothing can be left out.
        probe: geometry of the probe, or None where none is known.
        note: how it was understood, one line.
    """

    sector: TokenSector | None
    probe: ProbeGeometry | None
    note: str


def choose_sector(text: str, frames: Sequence[Frame], spec: PreprocessSpec) -> ChosenSector:
    """The sector that ``--sector`` means.

    Args:
        text: ``auto`` finds it in the frames; ROW,COL,NEAR,FAR,LEFT,RIGHT is a fan (see ProbeGeometry) in shares of
            the input; anything else is a file, see ``read_sector``.
        frames: of the data folder.
        spec: how a frame becomes the model's input.

    Raises:
        InputError: nothing of the kind, ``auto`` without frames, or a sector of another input size.
    """
    if text == "auto":
        if not frames:
            raise InputError("--sector auto finds the sector in frames: give --data FOLDER, or a sector file")
        found = find_sector(frames, spec, name="auto")
        many = f"{found.kept} of {math.prod(found.grid)} patches"
        end = "" if found.sector is not None else ": nothing can be left out, so the export is as without --sector"
        return ChosenSector(
            sector=found.sector,
            probe=found.probe,
            note=f"sector auto: {many} kept, found in {found.frames} frames{end}",
        )
    try:
        row, col, near, far, left, right = (float(part) for part in text.split(","))
    except ValueError:
        sector, probe = read_sector(Path(text))
    else:
        fan = {"apex": (row, col), "radii": (near, far), "angles_deg": (left, right)}
        probe = ProbeGeometry(name="fan", kind="sector", **fan)
        kept = _sector_of(fan_pixels(probe, (spec.height, spec.width)), probe.name)
        if kept is None:
            raise InputError(f"--sector {text}: the fan covers every patch, so nothing can be left out")
        sector = kept
    if (sector.grid[0] * PATCH, sector.grid[1] * PATCH) != (spec.height, spec.width):
        size = f"{sector.grid[0] * PATCH}x{sector.grid[1] * PATCH}"
        wanted = f"{spec.height}x{spec.width}"
        raise InputError(f"--sector {text}: is of an input of {size}, the student's is {wanted}: see --image-size")
    many = f"{len(sector.indices)} of {math.prod(sector.grid)} patches"
    return ChosenSector(sector=sector, probe=probe, note=f"sector {sector.name}: {many} kept")


def sector_bytes(found: FoundSector) -> bytes:
    """The sector file: what ``read_sector`` reads."""
    data = {
        "kind": _KIND,
        "version": _VERSION,
        "name": found.name,
        "kept": None if found.sector is None else list(found.sector.kept),
        "probe": None if found.probe is None else asdict(found.probe),
        "frames": found.frames,
    }
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode("ascii")


def sector_image(found: FoundSector, scale: int = 3) -> bytes:
    """What was found, as a PNG.

    The brightest code of each pixel; patches that are left out are red, the view's edge is blue, the fan's edge yellow.

    Args:
        found: it.
        scale: pixels of the image for one of the input, from 1.
    """
    grown = [np.kron(mask, np.ones((scale, scale), bool)) for mask in (found.view_HW, found.fan_HW)]
    grey = np.kron(found.brightest_HW, np.ones((scale, scale), np.uint8))
    image_HWC = np.repeat(grey[..., None], 3, axis=2)
    inside = np.ones_like(found.view_HW) if found.sector is None else found.sector.pixels_HW
    left_out = ~np.kron(inside, np.ones((scale, scale), bool))
    image_HWC[left_out] = (image_HWC[left_out] // 2 + np.array(_LEFT_RGB, np.uint16) // 3).astype(np.uint8)
    image_HWC[:: PATCH * scale] = image_HWC[:: PATCH * scale] // 2 + 40
    image_HWC[:, :: PATCH * scale] = image_HWC[:, :: PATCH * scale] // 2 + 40
    for mask, colour in zip(grown, (_KEPT_RGB, _FAN_RGB), strict=True):
        image_HWC[outline(mask.astype(np.uint8))] = colour
    return encode_png(image_HWC)


def _sector_of(inside_HW: np.ndarray, name: str) -> TokenSector | None:
    """The patches with enough pixels inside, or None where that is all of them."""
    kept = _patches(inside_HW).sum(axis=(1, 3)) >= PIXELS_IN_PATCH
    if kept.all():
        return None
    if not kept.any():
        raise InputError("no patch of the input lies in the sector")
    return TokenSector(name=name, kept=tuple("".join("01"[int(one)] for one in row) for row in kept))


def _patches(mask_HW: np.ndarray) -> np.ndarray:
    rows, cols = mask_HW.shape
    return mask_HW.reshape(rows // PATCH, PATCH, cols // PATCH, PATCH)


def _line(rows: np.ndarray, edge: np.ndarray) -> tuple[float, float]:
    """Offset and slope of a straight edge.

    By medians (Theil and Sen), which a notch does not move.
    """
    apart = len(rows) // 2
    slopes = (edge[apart:] - edge[: len(edge) - apart]) / (rows[apart:] - rows[: len(rows) - apart])
    slope = float(np.median(wide(slopes)))
    return float(np.median(wide(edge - slope * rows))), slope


def _overlap(a_HW: np.ndarray, b_HW: np.ndarray) -> float:
    return float(np.count_nonzero(a_HW & b_HW)) / max(1, int(np.count_nonzero(a_HW | b_HW)))


def _from_image(place: Path) -> TokenSector:
    from tinyusfm_runtime.images.decode import read_image

    codes = read_image(place.read_bytes()).pixels
    if codes.ndim == 3:
        codes = codes.max(axis=2)
    if codes.shape[0] % PATCH or codes.shape[1] % PATCH:
        size = f"{codes.shape[0]}x{codes.shape[1]}"
        raise InputError(f"the mask {place} has {size} pixels: draw it at the model's input size, such as 224x224")
    name = "".join(c if (c.isascii() and c.isalnum()) or c in ".-_" else "-" for c in place.stem).strip(".-") or "mask"
    found = _sector_of(codes > 127, name)
    if found is None:
        raise InputError(f"the mask {place} leaves nothing out: export without --sector")
    return found


__all__ = [
    "FIRST_VIEWS",
    "GOOD_FIT",
    "MAX_FRAMES",
    "MOVING_CODES",
    "PIXELS_IN_PATCH",
    "SEEN_SHARE",
    "ChosenSector",
    "FoundSector",
    "choose_sector",
    "fan_pixels",
    "find_sector",
    "fit_probe",
    "read_sector",
    "sector_bytes",
    "sector_image",
]
