"""What ``--data DIR`` means: frames to calibrate on, frames to judge on, and the hashes of the frames that are neither.

With a table (``split.csv`` with the columns file and split) the training split calibrates, the validation split judges,
and of the test split only hashes are taken. A folder of pictures without a table is dealt out by natural order: even
positions calibrate, odd ones judge. It does not know masks, models or gates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyusfm_calibration.sets import NamedFrame, SetDeclaration, draw, load_declaration
from tinyusfm_calibration.tables import TABLE, read_rows, spacing_mm
from tinyusfm_runtime.errors import InputError, SourceError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.sources import open_source

CALIBRATION_FRAMES = 128
"""Drawn from the training split where no declared set is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFolder:
    """The frames of a data folder.

    Attributes:
        name: the folder's own name.
        calibration: frames that calibrate; empty unless asked for.
        calibration_name: name of that set.
        validation: frames that judge.
        test_sha256: hashes of the test split's files.
        note: how the folder was understood, one line.
        masks: mask picture of each validation frame, or None; empty without a table.
        training: every frame of the training split; empty unless asked for.
    """

    name: str
    calibration: tuple[NamedFrame, ...]
    calibration_name: str
    validation: tuple[NamedFrame, ...]
    test_sha256: frozenset[str]
    note: str
    masks: tuple[Path | None, ...] = ()
    training: tuple[NamedFrame, ...] = ()


def read_data(folder: Path, *, calibrate: bool, calibration: str | None = None, teach: bool = False) -> DataFolder:
    """Reads a data folder.

    Args:
        folder: the folder.
        calibrate: also read frames that calibrate.
        calibration: name or file of a declared calibration set, or None.
        teach: also read every frame of the training split.

    Returns:
        Its frames.

    Raises:
        InputError: no such folder, a table that cannot be used, or no frame to judge on.
        SourceError: a picture cannot be read.
        MissingExtra: OpenCV is not installed.
    """
    if not folder.is_dir():
        raise InputError(f"--data {folder}: there is no such folder")
    declaration = load_declaration(calibration) if calibration else _default_declaration(folder)
    if (folder / TABLE).is_file():
        return _from_table(folder, declaration, calibrate=calibrate, teach=teach)
    frames = _plain_frames(folder)
    if len(frames) < 2:
        raise SourceError(f"--data {folder.name}: one picture cannot both calibrate and judge")
    return DataFolder(
        name=folder.name,
        calibration=tuple(draw(declaration, frames[0::2])) if calibrate else (),
        calibration_name=declaration.name,
        validation=tuple(frames[1::2]),
        test_sha256=frozenset(),
        note=f"{folder.name} has no {TABLE}: of its {len(frames)} pictures the even ones calibrate, the odd ones judge",
        training=tuple(frames[0::2]) if teach else (),
    )


def _default_declaration(folder: Path) -> SetDeclaration:
    return SetDeclaration(
        name=f"{folder.name}-train",
        source="table",
        about="drawn from the training split, one frame a group, evenly over the labels",
        count=CALIBRATION_FRAMES,
    )


def _from_table(folder: Path, declaration: SetDeclaration, *, calibrate: bool, teach: bool) -> DataFolder:
    rows = read_rows(folder)
    judging = [row for row in rows if row["split"] == "val"]
    validation = [_named(folder, row) for row in judging]
    if not validation:
        raise InputError(f"{folder.name}/{TABLE} names no frame of split val, on which the gate is judged")
    training = [_named(folder, row) for row in rows if row["split"] == "train"] if teach else []
    chosen: list[NamedFrame] = []
    if calibrate:
        # drawing looks at names and groups alone, so only what is drawn is decoded
        outlines = [outline(row) for row in rows if row["split"] == declaration.split]
        by_id, decoded = {row["file"]: row for row in rows}, {named.id: named for named in training}
        for named in draw(declaration, outlines):
            is_made = named.id.startswith("phantom:")
            chosen.append(named if is_made else decoded.get(named.id) or _named(folder, by_id[named.id]))
    counts = f"{len(validation)} frames judge, {len(chosen)} calibrate" + (f", {len(training)} teach" if teach else "")
    test = frozenset(hashlib.sha256(_read(folder, row)).hexdigest() for row in rows if row["split"] == "test")
    return DataFolder(
        name=folder.name,
        calibration=tuple(chosen),
        calibration_name=declaration.name,
        validation=tuple(validation),
        test_sha256=test,
        note=f"{folder.name}: {counts}, {len(test)} of the test split stay out",
        masks=tuple(folder / row["mask"] if row.get("mask") else None for row in judging),
        training=tuple(training),
    )


def evenly(named: Sequence[NamedFrame], most: int) -> list[NamedFrame]:
    """At most so many of the frames, evenly over their order."""
    count = min(most, len(named))
    return [named[i * len(named) // count] for i in range(count)]


def outline(row: Mapping[str, str]) -> NamedFrame:
    """A row's name and group without its picture."""
    blank = Frame(pixels=np.zeros((8, 8), np.uint8))
    return NamedFrame(id=row["file"], frame=blank, stratum=row.get("label") or "", group=row.get("group") or "")


def _named(folder: Path, row: Mapping[str, str]) -> NamedFrame:
    data = _read(folder, row)
    with open_source(f"folder:{folder / row['file']}") as source:
        frame = next(iter(source))
    frame = replace(frame, spacing_mm=spacing_mm(row, *frame.pixels.shape[:2], unusable="unknown"), t_recv_ns=None)
    return NamedFrame(
        id=row["file"],
        frame=frame,
        sha256=hashlib.sha256(data).hexdigest(),
        stratum=row.get("label") or "",
        group=row.get("group") or "",
    )


def _read(folder: Path, row: Mapping[str, str]) -> bytes:
    path = folder / row["file"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder.name}/{TABLE} names a file outside its folder")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{folder.name}/{TABLE} names a file that cannot be read: {error.strerror}") from error


def _plain_frames(folder: Path) -> list[NamedFrame]:
    with open_source(f"folder:{folder}") as source:
        return [NamedFrame(id=f"{folder.name}#{frame.seq}", frame=frame) for frame in source]


def read_frame(folder: Path, row: Mapping[str, str]) -> NamedFrame:
    """One row's frame with its names and hash.

    Raises:
        InputError: the file cannot be read or lies outside the folder.
        SourceError: it is no picture.
    """
    return _named(folder, row)


def read_table_rows(folder: Path) -> list[dict[str, str]]:
    """Rows of a folder's table.

    Raises:
        InputError: there is none that can be used.
    """
    return read_rows(folder)


def split_names(text: str | None) -> list[str]:
    """Comma-separated names, without blanks; nothing for None."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]
