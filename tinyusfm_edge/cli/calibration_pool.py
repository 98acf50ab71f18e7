"""The frames that ``calibrate`` chooses from: a folder with a table, a plain folder, a clip or a DICOM file.

Frames are read one at a time and again when they are needed, so that a pool may be larger than memory. A crop is
applied as soon as a frame is read: hashes, features and pictures of the report are of the cropped frame, and what
lies outside (names, rulers) goes nowhere. With a table the training split calibrates and the validation split judges;
without one every other frame judges. It does not know students.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_calibration.sets import NamedFrame, pixels_sha256
from tinyusfm_edge.cli import console, data_folder
from tinyusfm_runtime.errors import CalibrationError, FrameError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.sources import open_source

Box = tuple[int, int, int, int]
PoolFrame = tuple[NamedFrame, Mapping[str, str]]
"""A frame and what the table says about it."""

WHOLE, REGION = "whole", "region"
DICOM_SUFFIXES = (".dcm", ".dicom")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Where frames come from.

    Attributes:
        location: folder, clip or file.
        rows: rows of the table, or None without one.
        crop: what is kept of every frame, ``region``, or None for all of it.
    """

    location: Path
    rows: tuple[Mapping[str, str], ...] | None
    crop: Box | str | None

    @property
    def name(self) -> str:
        """Short name of the data."""
        return self.location.stem

    @property
    def note(self) -> str:
        """How the data is understood, one line."""
        if self.rows is None:
            return f"{self.location.name} has no table: every other frame calibrates, the rest judge"
        counts = {split: sum(row["split"] == split for row in self.rows) for split in ("train", "val", "test")}
        said = (
            f"{counts['train']} frames may calibrate, {counts['val']} judge, {counts['test']} of the test split do not"
        )
        return f"{self.location.name}: {said}"

    def frames(self, split: str, only: Collection[str] | None = None) -> Iterator[PoolFrame]:
        """Reads frames, one at a time.

        Args:
            split: train, val or test.
            only: names of the frames wanted, or None for all.

        Raises:
            InputError: a file cannot be read.
            SourceError: it is no picture.
            FrameError: the crop lies outside a frame.
        """
        if self.rows is None:
            yield from self._plain(split, only)
            return
        for row in self.rows:
            if row["split"] == split and (only is None or row["file"] in only):
                named = data_folder.read_frame(self.location, row)
                box = self.crop if isinstance(self.crop, tuple) else None
                yield replace(named, frame=cropped(named.frame, box)), row

    def _plain(self, split: str, only: Collection[str] | None) -> Iterator[PoolFrame]:
        if split == "test":
            return
        scheme = "folder:" if self.location.is_dir() else ""
        with open_source(f"{scheme}{self.location}", crop=self.crop) as source:
            for number, frame in enumerate(source):
                name = f"{self.location.name}#{number}"
                if number % 2 == (split == "val") and (only is None or name in only):
                    kept = replace(frame, pixels=np.array(frame.pixels), t_recv_ns=None)
                    yield NamedFrame(id=name, frame=kept), {}

    def test_hashes(self) -> frozenset[str]:
        """Hashes of the test split, by file and by pixels, so that a copy stored another way is caught as well."""
        return frozenset().union(*(named.hashes for named, _ in self.frames("test")))

    def check_patients(self) -> None:
        """Refuses a table that has a patient in the test split and in another one.

        Raises:
            CalibrationError: how many.
        """
        groups: dict[bool, set[str]] = {True: set(), False: set()}
        for row in self.rows or ():
            if row.get("group"):
                groups[row["split"] == "test"].add(row["group"])
        if shared := groups[True] & groups[False]:
            raise CalibrationError(
                f"{len(shared)} patients stand in the test split and in another one: deal whole patients out"
            )


def open_pool(location: Path, crop: str | None) -> Pool:
    """Looks at a location.

    Args:
        location: folder with ``split.csv``, plain folder, clip or DICOM file.
        crop: ``ROW,COL,HEIGHT,WIDTH``, ``region``, ``whole``, or None: the region for DICOM, else whole frames.

    Raises:
        InputError: nothing there, or a crop that cannot be read.
    """
    if not location.exists():
        raise InputError(f"no data at {location.name!r}: give a folder, a clip or a DICOM file")
    box = _read_crop(crop, location)
    if not (location / data_folder.TABLE).is_file():
        return Pool(location=location, rows=None, crop=box)
    if box == REGION:
        raise InputError("--crop region needs a DICOM file: a table's pictures mark none, give ROW,COL,HEIGHT,WIDTH")
    rows: list[dict[str, Any]] = data_folder.read_table_rows(location)
    if not any(row["split"] == "train" for row in rows):
        raise CalibrationError(
            f"{location.name}/{data_folder.TABLE} names no frame of split train: nothing can calibrate"
        )
    pool = Pool(location=location, rows=tuple(rows), crop=box)
    pool.check_patients()
    return pool


def _read_crop(text: str | None, location: Path) -> Box | str | None:
    if text == WHOLE:
        return None
    if text is None:
        return REGION if location.suffix.lower() in DICOM_SUFFIXES else None
    if text == REGION:
        return REGION
    row, col, height, width = console.numbers(text, 4, "--crop ROW,COL,HEIGHT,WIDTH, region or whole")
    return int(row), int(col), int(height), int(width)


def cropped(frame: Frame, box: Box | None) -> Frame:
    """A frame without what lies outside a box, in memory of its own.

    Raises:
        FrameError: the box does not lie inside the frame.
    """
    if box is None:
        return frame
    row, col, height, width = box
    rows, cols = frame.pixels.shape[:2]
    if min(row, col) < 0 or min(height, width) < 8 or row + height > rows or col + width > cols:
        raise FrameError(f"crop {box} does not lie inside a frame of {rows}x{cols} rows x columns")
    return replace(frame, pixels=frame.pixels[row : row + height, col : col + width].copy(), crop=box)


def is_flat(frame: Frame) -> bool:
    """Whether a frame is of one colour."""
    return bool((frame.pixels == frame.pixels[0, 0]).all())


def fingerprint(named: NamedFrame) -> str:
    """Short name of a frame in reports: the beginning of its pixels' hash, since file names may name patients."""
    return pixels_sha256(named.frame)[:12]
