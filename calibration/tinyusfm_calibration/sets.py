"""Which frames calibrate.

NamedFrame, CalibrationSet, and the declared sets of the package.

A set is a list of names and hashes, never pixels, so it can stand in a bundle; its ``id`` is the
hash of all of it, order included. A declaration (``sets/*.toml``) says how a set is drawn from a
table or from phantoms and is reviewed like code. It does not know ranges, models or where files lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_calibration.leakage import check_leakage
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.strict_json import check_values, refusing

SET_VERSION = 1
"""Version of the JSON that ``CalibrationSet.to_json`` writes."""

MIN_FRAMES = 16
"""Fewest distinct frames of a set: below this one odd frame decides the ranges (our choice; NNCF asks for 300)."""

_DECLARATIONS = Path(__file__).with_name("sets")


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedFrame:
    """A frame with a name that can be written down.

    Attributes:
        id: name inside its source, such as a table's file column or ``phantom:7``.
        frame: the image.
        sha256: hash of the file it came from, hex; empty if it came from no file.
        stratum: kind of frame, such as a label or a device; sets are drawn evenly from the strata.
        group: patient or examination; at most one frame of a group enters a drawn set.
    """

    id: str
    frame: Frame
    sha256: str = ""
    stratum: str = ""
    group: str = ""

    @property
    def hashes(self) -> frozenset[str]:
        """All hashes this image is known by: of its pixels and, if any, of its file."""
        return frozenset({pixels_sha256(self.frame)} | ({self.sha256} if self.sha256 else set()))


def pixels_sha256(frame: Frame) -> str:
    """Hash of what a frame shows: format, range, shape and pixels.

    Spacing and time stamps left out.
    """
    head = f"{frame.pixel_format.value}|{frame.video_range.value}|{frame.pixels.shape}|"
    return hashlib.sha256(head.encode() + np.ascontiguousarray(frame.pixels).tobytes()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationSet:
    """Names and hashes of the frames that calibrated.

    Attributes:
        name: short name of the set.
        ids: names of the frames, in order.
        pixels_sha256: hash of each frame's pixels, hex.
        file_sha256: hash of each frame's file, hex, or empty.
        strata: kind of each frame.
        version: of the JSON form.
    """

    name: str
    ids: tuple[str, ...]
    pixels_sha256: tuple[str, ...]
    file_sha256: tuple[str, ...]
    strata: tuple[str, ...]
    version: int = SET_VERSION

    def __post_init__(self) -> None:
        """Checks that the columns fit.

        Raises:
            CalibrationError: columns of different length or another version.
        """
        if self.version != SET_VERSION:
            raise CalibrationError(f"calibration set version {self.version} is not {SET_VERSION}: write it again")
        if len({len(self.ids), len(self.pixels_sha256), len(self.file_sha256), len(self.strata)}) != 1:
            raise CalibrationError(f"calibration set {self.name!r} has columns of different length")

    @property
    def id(self) -> str:
        """Hash of everything above, order included, hex."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def hashes(self) -> frozenset[str]:
        """Every hash any of its frames is known by."""
        return frozenset(self.pixels_sha256) | (frozenset(self.file_sha256) - {""})

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``; carries the id."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {**plain, "id": self.id}

    @classmethod
    @refusing("the calibration set", CalibrationError)
    def from_json(cls, data: dict[str, Any]) -> CalibrationSet:
        """Reads what ``to_json`` wrote.

        Raises:
            CalibrationError: unknown or missing keys, or an id that is not the hash of the rest.
        """
        wanted = {f.name for f in fields(cls)} | {"id"}
        if set(data) != wanted:
            raise CalibrationError(f"calibration set has unknown or missing keys {sorted(set(data) ^ wanted)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "id"}
        found = cls(**values)
        if found.id != data["id"]:
            raise CalibrationError(f"calibration set {found.name!r} was edited: its id is not the hash of its content")
        return found


def describe_frames(name: str, frames: Sequence[NamedFrame]) -> CalibrationSet:
    """Writes down which frames a set holds, after checking that they can calibrate.

    Args:
        name: short name of the set.
        frames: the frames, in order.

    Returns:
        Their names and hashes.

    Raises:
        CalibrationError: fewer than MIN_FRAMES distinct frames, or frames of one colour.
    """
    flat = [named.id for named in frames if int(named.frame.pixels.min()) == int(named.frame.pixels.max())]
    if flat:
        raise CalibrationError(
            f"{len(flat)} of {len(frames)} calibration frames are of one colour (first {flat[0]!r}): take them out"
        )
    hashes = [pixels_sha256(named.frame) for named in frames]
    if len(set(hashes)) < MIN_FRAMES:
        raise CalibrationError(
            f"calibration set {name!r} has {len(set(hashes))} distinct frames: give at least {MIN_FRAMES}"
        )
    return CalibrationSet(
        name=name,
        ids=tuple(named.id for named in frames),
        pixels_sha256=tuple(hashes),
        file_sha256=tuple(named.sha256 for named in frames),
        strata=tuple(named.stratum for named in frames),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SetDeclaration:
    """How a calibration set is drawn.

    Attributes:
        name: short name, the file's stem.
        source: ``table`` (a split of a labelled table) or ``phantom``.
        about: one line for people.
        count: frames wanted.
        split: split of the table; never ``test``.
        seed: of the draw for tables, first phantom seed for phantoms.
        version: of this form.
    """

    name: str
    source: str
    about: str
    count: int
    split: str = "train"
    seed: int = 0
    version: int = SET_VERSION

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            CalibrationError: a source, split, count or version that cannot be used.
        """
        if self.source not in ("table", "phantom") or self.version != SET_VERSION:
            raise CalibrationError(f"set {self.name!r}: source must be table or phantom, version {SET_VERSION}")
        if self.split == "test":
            raise CalibrationError(f"set {self.name!r} draws from the test split: calibrate on train or val")
        if self.count < MIN_FRAMES:
            raise CalibrationError(f"set {self.name!r} wants {self.count} frames: at least {MIN_FRAMES}")


def declared_names() -> list[str]:
    """Names of the declared sets of this package, sorted."""
    return sorted(path.stem for path in _DECLARATIONS.glob("*.toml"))


def load_declaration(name: str) -> SetDeclaration:
    """Reads a declared set.

    Args:
        name: a declared name, or the path of a ``.toml`` file.

    Raises:
        InputError: no such set, or a file with unknown keys.
    """
    try:
        import tomllib
    except ImportError as error:  # Python 3.10
        raise InputError("declared calibration sets are .toml files, which need Python 3.11") from error
    path = Path(name) if name.endswith(".toml") else _DECLARATIONS / f"{name}.toml"
    if not path.is_file() or (path.parent == _DECLARATIONS and path.stem not in declared_names()):
        raise InputError(f"no calibration set {name!r}: declared are {', '.join(declared_names())}")
    try:
        return SetDeclaration(name=path.stem, **check_values(tomllib.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError, RecursionError, OSError) as error:
        raise InputError(f"calibration set {path.name}: {error}") from error


def draw(declaration: SetDeclaration, frames: Sequence[NamedFrame] = ()) -> list[NamedFrame]:
    """Draws a declared set: the same frames whatever the order they come in.

    One frame of each group at most while groups last, evenly over the strata, ordered by the hash of seed and name.

    Args:
        declaration: how to draw.
        frames: frames of the declared split; not used for phantoms.

    Returns:
        At most ``count`` frames.
    """
    if declaration.source == "phantom":
        return phantom_frames(range(declaration.seed, declaration.seed + declaration.count))
    ranked = sorted(frames, key=lambda named: _rank(declaration.seed, named.id))
    first: dict[str, NamedFrame] = {}
    for named in ranked:
        first.setdefault(named.group or named.id, named)
    chosen = _round_robin(list(first.values()))
    taken = {named.id for named in chosen}
    chosen += _round_robin([named for named in ranked if named.id not in taken])
    return chosen[: declaration.count]


def phantom_frames(seeds: range | Sequence[int]) -> list[NamedFrame]:
    """Phantoms as named frames.

    Args:
        seeds: phantom seeds.
    """
    return [NamedFrame(id=f"phantom:{seed}", frame=make_phantom(seed).frame, stratum="phantom") for seed in seeds]


def exclude_test_frames(frames: Sequence[NamedFrame], test_hashes: Sequence[str] | frozenset[str]) -> None:
    """Refuses calibration frames that also stand in the test split.

    Args:
        frames: calibration frames.
        test_hashes: hashes of the test split's files or pixels, hex.

    Raises:
        CalibrationError: how many frames stand in both.
    """
    check_leakage(frozenset().union(*(named.hashes for named in frames)) if frames else (), test_hashes)


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _round_robin(frames: list[NamedFrame]) -> list[NamedFrame]:
    queues: dict[str, list[NamedFrame]] = {}
    for named in frames:
        queues.setdefault(named.stratum, []).append(named)
    out: list[NamedFrame] = []
    for turn in range(max((len(queue) for queue in queues.values()), default=0)):
        out += [queues[stratum][turn] for stratum in sorted(queues) if turn < len(queues[stratum])]
    return out


__all__ = [
    "MIN_FRAMES",
    "SET_VERSION",
    "CalibrationSet",
    "NamedFrame",
    "SetDeclaration",
    "declared_names",
    "describe_frames",
    "draw",
    "exclude_test_frames",
    "load_declaration",
    "phantom_frames",
    "pixels_sha256",
]
