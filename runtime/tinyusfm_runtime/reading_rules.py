"""What a reading is held against.

Thresholds with their rates, plausible sizes, the probe's field of view.

These are data of a ModelSpec. Thresholds are calibrated on labelled validation frames and never written without what
they were measured to do; without them a reading is ``unchecked``. How a reading is judged by them is in reading.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import FrameError, InputError

PATCH = 16
"""Rows and columns of a patch."""
MAX_SIDE = 256
"""Most patches along one side of an input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelThresholds:
    """What one label's reading must reach to be good.

    Attributes:
        label: name of the label; of a classifier the name of the class that is the answer.
        confidence: least mean probability inside the mask, or least top probability, 0..1.
        agreement: least Dice of the mask and its own ellipse, 0..1; None where no ellipse is measured.
    """

    label: str
    confidence: float
    agreement: float | None = None

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InputError: a threshold outside 0..1.
        """
        for name in ("confidence", "agreement"):
            value = getattr(self, name)
            if value is not None and not _is_share(value):
                raise InputError(f"reading threshold {name} = {value!r} of label {self.label!r} must lie in 0..1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingRates:
    """What the thresholds did on the frames they were calibrated on; counts of frames.

    Attributes:
        frames: labelled frames looked at.
        groups: patients among them, or 0 where they are not known.
        good: frames called good.
        doubtful: frames called doubtful.
        none: frames on which nothing was found.
        wrong: frames whose reading was wrong.
        good_but_wrong: frames called good all the same: what slips through.
        doubtful_but_right: frames called doubtful without need.
        good_but_wrong_limit: upper end of the 95 % interval of that share of all frames (Clopper and Pearson 1934).
        wrong_means: what counted as wrong, in words.
        frames_sha256: hash over the frames' own hashes, hex.
    """

    frames: int
    groups: int
    good: int
    doubtful: int
    none: int
    wrong: int
    good_but_wrong: int
    doubtful_but_right: int
    good_but_wrong_limit: float
    wrong_means: str
    frames_sha256: str = ""

    def __post_init__(self) -> None:
        """Checks that the counts can be.

        Raises:
            InputError: counts that do not add up, or a limit outside 0..1.
        """
        counts = (
            self.frames, self.groups, self.good, self.doubtful, self.none, self.wrong, self.good_but_wrong,
            self.doubtful_but_right,
        )  # fmt: skip
        if any(type(count) is not int or not 0 <= count <= self.frames for count in counts) or self.frames < 1:
            raise InputError("the rates of the reading thresholds are not counts of frames")
        if self.good + self.doubtful + self.none != self.frames or self.good_but_wrong > min(self.good, self.wrong):
            raise InputError("the rates of the reading thresholds do not add up")
        if not _is_share(self.good_but_wrong_limit):
            raise InputError("the limit of the rate of wrong readings must lie in 0..1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadingRules:
    """Thresholds of each label, and the rates they were calibrated with.

    Attributes:
        thresholds: one per label that is judged.
        rates: what they did.
    """

    thresholds: tuple[LabelThresholds, ...]
    rates: ReadingRates

    def __post_init__(self) -> None:
        """Checks that there is one rule a label.

        Raises:
            InputError: no thresholds, or two of one label.
        """
        names = [rule.label for rule in self.thresholds]
        if not names or len(set(names)) != len(names):
            raise InputError("reading thresholds name each label once, and at least one")

    def of(self, label: str) -> LabelThresholds | None:
        """The thresholds of a label, or None."""
        return next((rule for rule in self.thresholds if rule.label == label), None)

    @classmethod
    def from_json(cls, data: Any) -> ReadingRules:
        """Reads plain data.

        Raises:
            InputError: unknown or missing keys, or values out of range.
        """
        given = _keys(data, ("thresholds", "rates"), "the reading rules")
        if not isinstance(given["thresholds"], list):
            raise InputError("the reading rules hold no list of thresholds")
        names = tuple(f.name for f in fields(LabelThresholds))
        thresholds = tuple(LabelThresholds(**_keys(rule, names, "a threshold")) for rule in given["thresholds"])
        rates = ReadingRates(**_keys(given["rates"], tuple(f.name for f in fields(ReadingRates)), "the rates"))
        return cls(thresholds=thresholds, rates=rates)


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """What sizes the model's anatomy can have.

    An impossible size is then flagged and never printed bare.

    Attributes:
        name: such as ``fetal head``.
        size_mm: least and largest plausible size: the circumference of an ellipse reading, else the longer side of the
            box around the mask.
        spacing_mm: least and largest plausible distance of neighbouring pixels of a frame.
    """

    name: str
    size_mm: tuple[float, float]
    spacing_mm: tuple[float, float] = (0.01, 1.0)

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InputError: not a rising pair of positive numbers.
        """
        for name in ("size_mm", "spacing_mm"):
            low, high = _pair(getattr(self, name), f"anatomy {name}")
            if not 0.0 < low < high:
                raise InputError(f"anatomy {name} {(low, high)} must rise and be positive")

    @classmethod
    def from_json(cls, data: Any) -> Anatomy:
        """Reads plain data.

        Raises:
            InputError: unknown or missing keys, or values out of range.
        """
        given = _keys(data, ("name", "size_mm", "spacing_mm"), "the anatomy")
        return cls(
            name=str(given["name"]),
            size_mm=_pair(given["size_mm"], "anatomy size_mm"),
            spacing_mm=_pair(given["spacing_mm"], "anatomy spacing_mm"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeGeometry:
    """The field of view of one named probe (transducer) in the frame.

    Shares of the frame, so any size of it fits.

    Attributes:
        name: of the probe.
        kind: ``sector`` (curved and phased arrays) or ``linear``.
        apex: (row, column) where the beams meet, as shares of rows and columns; may lie outside 0..1. Of a linear
            probe the middle of its upper edge.
        radii: nearest and farthest distance from the apex, as shares of the rows.
        angles_deg: leftmost and rightmost beam, from the vertical, growing to the right; of a linear probe 0 and 0.
    """

    name: str
    kind: str
    apex: tuple[float, float]
    radii: tuple[float, float]
    angles_deg: tuple[float, float]

    def __post_init__(self) -> None:
        """Checks kind and ranges.

        Raises:
            InputError: another kind, or numbers no probe has.
        """
        if self.kind not in ("sector", "linear"):
            raise InputError(f"probe kind {self.kind!r} must be sector or linear")
        near, far = _pair(self.radii, "probe radii")
        left, right = _pair(self.angles_deg, "probe angles_deg")
        _pair(self.apex, "probe apex")
        fits = -90.0 < left < right < 90.0 if self.kind == "sector" else left == right == 0.0
        if not 0.0 <= near < far or not fits:
            raise InputError(f"probe {self.name!r}: radii must rise from 0 up, angles from left to right in (-90, 90)")

    @classmethod
    def from_json(cls, data: Any) -> ProbeGeometry:
        """Reads plain data.

        Raises:
            InputError: unknown or missing keys, or values out of range.
        """
        given = _keys(data, tuple(f.name for f in fields(cls)), "the probe")
        pairs = {name: _pair(given[name], f"probe {name}") for name in ("apex", "radii", "angles_deg")}
        return cls(name=str(given["name"]), kind=str(given["kind"]), **pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSector:
    """Patches that an artefact looks at.

    Attributes:
        name: of the probe's geometry: letters, digits, dot, dash and underscore.
        kept: one text a row of patches, ``1`` for a patch that is looked at, ``0`` for one that is left out.
    """

    name: str
    kept: tuple[str, ...]

    def __post_init__(self) -> None:
        """Checks name and grid.

        Raises:
            InputError: no plain name, no grid, or a sector that leaves nothing or everything out.
        """
        plain = isinstance(self.name, str) and all((c.isascii() and c.isalnum()) or c in ".-_" for c in self.name)
        if not plain or not self.name or self.name[0] in ".-" or len(self.name) > 80:
            raise InputError(f"sector name {self.name!r:.90}: use letters, digits, '.', '-' and '_'")
        if not 1 <= len(self.kept) <= MAX_SIDE or any(not isinstance(row, str) for row in self.kept):
            raise InputError(f"sector {self.name!r}: give 1 to {MAX_SIDE} rows of patches as texts")
        width = len(self.kept[0])
        if not 1 <= width <= MAX_SIDE or any(len(row) != width or set(row) - {"0", "1"} for row in self.kept):
            raise InputError(f"sector {self.name!r}: every row must be as many digits 0 or 1, at most {MAX_SIDE}")
        if len({digit for row in self.kept for digit in row}) < 2:
            raise InputError(f"sector {self.name!r} must keep some patches and leave some out")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return len(self.kept), len(self.kept[0])

    @property
    def indices(self) -> tuple[int, ...]:
        """Numbers of the kept patches, row by row, rising."""
        return tuple(index for index, digit in enumerate("".join(self.kept)) if digit == "1")

    @property
    def pixels_HW(self) -> np.ndarray:
        """Pixels of the input that lie in kept patches, bool."""
        tokens = np.array([[digit == "1" for digit in row] for row in self.kept])
        return np.repeat(np.repeat(tokens, PATCH, axis=0), PATCH, axis=1)

    def masked(self, tensor: np.ndarray) -> np.ndarray:
        """A preprocessed input with black where no patch is looked at, a new array.

        Args:
            tensor: uint8 NCHW of the sector's size.

        Raises:
            FrameError: another size.
        """
        inside = self.pixels_HW
        if tensor.shape[-2:] != inside.shape:
            raise FrameError(f"an input of {tensor.shape[-2:]} pixels does not fit a sector of {inside.shape}")
        return np.where(inside, tensor, np.uint8(0))

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {"name": self.name, "kept": list(self.kept)}

    @classmethod
    def from_json(cls, data: Any) -> TokenSector:
        """Reads what ``to_json`` wrote.

        Raises:
            InputError: unknown or missing keys, or no sector.
        """
        if not isinstance(data, Mapping) or set(data) != {"name", "kept"}:
            raise InputError("a sector must have the keys name and kept and no others")
        if not isinstance(data["kept"], (list, tuple)):
            raise InputError("a sector's kept patches must be a list of texts")
        return cls(name=data["name"], kept=tuple(data["kept"]))


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def _pair(value: Any, what: str) -> tuple[float, float]:
    fits = isinstance(value, (list, tuple)) and len(value) == 2
    if not fits or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in value):
        raise InputError(f"{what} must be two numbers, not {value!r}")
    try:
        low, high = float(value[0]), float(value[1])
    except OverflowError as error:
        raise InputError(f"{what} holds a number too large") from error
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{what} must be finite")
    return low, high


def _keys(data: Any, names: tuple[str, ...], what: str) -> dict[str, Any]:
    if not isinstance(data, Mapping) or set(data) != set(names):
        raise InputError(f"{what} must have the keys {', '.join(names)} and no others")
    return dict(data)


__all__ = [
    "MAX_SIDE",
    "PATCH",
    "Anatomy",
    "LabelThresholds",
    "ProbeGeometry",
    "ReadingRates",
    "ReadingRules",
    "TokenSector",
]
