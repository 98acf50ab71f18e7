"""The frames that ``calibrate`` chooses from.

A folder with a table, a plain folder, a clip or a DICOM file.

Frames are read one at a time and again when they are needed, so that a pool may be larger than memory. A crop is
applied as soon as a frame is read: hashes, features and images of the report are of the cropped frame, and what
lies outside (names, rulers) goes nowhere. With a table the training split calibrates and the validation split compares;
without one every other frame compares. It does not know students.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyusfm_calibration.sets import NamedFrame, pixels_sha256
from tinyusfm_calibration.tables import TABLE, Row, clean, find_table, read_table_rows
from tinyusfm_edge.data.doubts import hold, kept
from tinyusfm_edge.data.folder import read_named
from tinyusfm_edge.data.frames import frames_without_table, open_file
from tinyusfm_edge.data.images import search
from tinyusfm_edge.data.reading import AS_IT_IS, Reading, numbers
from tinyusfm_edge.data.table import table_notes
from tinyusfm_runtime.errors import CalibrationError, FrameError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.images.kinds import known_kind

Box = tuple[int, int, int, int]
PoolFrame = tuple[NamedFrame, Mapping[str, str]]
"""A frame and what the table says about it."""

WHOLE, REGION = "whole", "region"


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationPool:
    """Where frames come from.

    Attributes:
        location: folder, clip or file.
        rows: rows of the table, or None without one; flagged ones only in the test split.
        crop: what is kept of every frame, ``region``, or None for all of it.
        reading: how files are read.
        notes: what was guessed about the table, and which rows are not used.
    """

    location: Path
    rows: tuple[Row, ...] | None
    crop: Box | str | None
    reading: Reading = AS_IT_IS
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Short name of the data."""
        return self.location.stem

    @property
    def note(self) -> str:
        """How the data is understood, one line."""
        if self.rows is None:
            return f"{self.location.name} has no table: every other frame calibrates, the rest judge"
        counts = {split: sum(row.split == split for row in self.rows) for split in ("train", "val", "test")}
        use_of_splits = (
            f"{counts['train']} training frames may calibrate, {counts['val']} validation frames judge, "
            f"{counts['test']} test frames are not touched"
        )
        return f"{self.location.name}: {use_of_splits}"

    def frames(self, split: str, only: Collection[str] | None = None) -> Iterator[PoolFrame]:
        """Reads frames, one at a time.

        Args:
            split: train, val or test.
            only: names of the frames wanted, or None for all.

        Raises:
            InputError: a file cannot be read.
            SourceError: it is no image.
            FrameError: the crop lies outside a frame.
        """
        if self.rows is None:
            yield from self._plain(split, only)
            return
        box = self.crop if isinstance(self.crop, tuple) else None
        for row in self.rows:
            if row.split == split and (only is None or row.columns["file"] in only):
                named = read_named(row, self.reading)
                yield replace(named, frame=cropped(named.frame, box)), row.columns

    def _plain(self, split: str, only: Collection[str] | None) -> Iterator[PoolFrame]:
        if split == "test":
            return
        for number, frame in enumerate(self._every_frame()):
            name = f"{self.location.name}#{number}"
            if number % 2 == (split == "val") and (only is None or name in only):
                yield NamedFrame(id=name, frame=replace(frame, pixels=np.array(frame.pixels), t_recv_ns=None)), {}

    def _every_frame(self) -> Iterator[Frame]:
        if self.location.is_dir():
            box = self.crop if isinstance(self.crop, tuple) else None
            for shown in frames_without_table(search(self.location), self.reading):
                yield cropped(shown.frame, box)
            return
        with open_file(self.location, self.reading, crop=self.crop) as source:
            yield from kept(source, self.reading.doubts, self.location.name)
            hold(self.reading.doubts, self.location.name, getattr(source, "doubts", ()))

    def test_hashes(self) -> frozenset[str]:
        """Hashes of the test split, by file and by pixels.

        A copy that is stored another way is caught as well.
        """
        if self.rows is None:
            return frozenset()
        return frozenset().union(*(named.hashes for named, _ in self.frames("test")))

    def check_patients(self) -> None:
        """Refuses a table that has a patient in the test split and in another one.

        Raises:
            CalibrationError: how many.
        """
        groups: dict[bool, set[str]] = {True: set(), False: set()}
        for row in self.rows or ():
            if group := row.columns.get("group"):
                groups[row.split == "test"].add(group)
        if shared := groups[True] & groups[False]:
            raise CalibrationError(
                f"{len(shared)} patients stand in the test split and in another one: deal whole patients out"
            )


def open_pool(location: Path, crop: str | None, reading: Reading = AS_IT_IS) -> CalibrationPool:
    """Looks at a location.

    Args:
        location: folder with ``split.csv``, plain folder, clip or DICOM file.
        crop: ``ROW,COL,HEIGHT,WIDTH``, ``region``, ``whole``, or None: the region for DICOM, else whole frames.
        reading: how files are read.

    Raises:
        InputError: nothing there, or a crop that cannot be read.
    """
    if not location.exists():
        raise InputError(f"{location} does not exist: give a folder, a clip or a DICOM file")
    box = _read_crop(crop, location)
    if box == REGION and location.is_dir():
        raise InputError("--crop region needs a DICOM file: a folder's images mark none, give ROW,COL,HEIGHT,WIDTH")
    if not location.is_dir() or find_table(location) is None:
        return CalibrationPool(location=location, rows=None, crop=box, reading=reading)
    every = read_table_rows(location, ("file", "split"), reading.table)
    rows = [row for row in every if row.split == "test"] + [row for row in clean(every)[0] if row.split != "test"]
    if not any(row.split == "train" for row in rows):
        raise CalibrationError(f"{location.name}/{TABLE} names no frame of split train: nothing can calibrate")
    notes = tuple(table_notes(location, None, reading))
    pool = CalibrationPool(location=location, rows=tuple(rows), crop=box, reading=reading, notes=notes)
    pool.check_patients()
    return pool


def _read_crop(text: str | None, location: Path) -> Box | str | None:
    if text == WHOLE:
        return None
    if text is None:
        return REGION if location.is_file() and known_kind(location) == "DICOM" else None
    if text == REGION:
        return REGION
    row, col, height, width = numbers(text, 4, "--crop ROW,COL,HEIGHT,WIDTH, region or whole")
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
    """Short name of a frame in reports: the beginning of its pixels' hash.

    File names may name patients.
    """
    return pixels_sha256(named.frame)[:12]


__all__ = [
    "REGION",
    "WHOLE",
    "Box",
    "CalibrationPool",
    "PoolFrame",
    "cropped",
    "fingerprint",
    "is_flat",
    "open_pool",
]
