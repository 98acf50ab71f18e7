"""What ``--data DIR`` means: calibration frames and validation frames.

Also the hashes of the frames that are neither.

With a table (``split.csv`` with the columns file and split) the training split calibrates, the validation split is for
the gate, and of the test split only hashes are taken. A folder of images without a table is split by natural order:
even positions calibrate, odd ones judge; images in folders inside count. Rows flagged as near duplicates or with
conflicting labels are left out, as in training. It does not know models or gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyusfm_calibration.sets import NamedFrame, SetDeclaration, draw, load_declaration
from tinyusfm_calibration.tables import TABLE, Row, clean, find_table, folder_name, read_table_rows
from tinyusfm_edge.data.frames import file_sha256, frames_without_table, read_row
from tinyusfm_edge.data.images import search
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.data.table import table_notes
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame

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
        notes: what was guessed, and which rows are not used, one line each.
        rows: row of each validation frame; empty without a table.
        training: every frame of the training split; empty unless asked for.
        reading: how files were read.
    """

    name: str
    calibration: tuple[NamedFrame, ...]
    calibration_name: str
    validation: tuple[NamedFrame, ...]
    test_sha256: frozenset[str]
    note: str
    notes: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    training: tuple[NamedFrame, ...] = ()
    reading: Reading = AS_IT_IS


def read_data(
    folder: Path,
    *,
    calibrate: bool,
    calibration: str | None = None,
    teach: bool = False,
    reading: Reading = AS_IT_IS,
) -> DataFolder:
    """Reads a data folder.

    Args:
        folder: the folder.
        calibrate: also read frames that calibrate.
        calibration: name or file of a declared calibration set, or None.
        teach: also read every frame of the training split.
        reading: how files are read that do not explain themselves.

    Returns:
        Its frames.

    Raises:
        InputError: no such folder, a table or an image that cannot be used, or no frame to judge on.
        MissingExtra: a library for a kind of file is missing.
    """
    check_folder(folder)
    declaration = load_declaration(calibration) if calibration else _default_declaration(folder)
    if find_table(folder) is not None:
        return _from_table(folder, declaration, calibrate=calibrate, teach=teach, reading=reading)
    frames = [
        NamedFrame(id=f"{folder_name(folder)}#{number}", frame=shown.frame, sha256=shown.sha256)
        for number, shown in enumerate(frames_without_table(search(folder), reading))
    ]
    if len(frames) < 2:
        raise InputError(f"{folder} holds one image, which cannot both calibrate and judge: add images, or a {TABLE}")
    return DataFolder(
        name=folder_name(folder),
        calibration=tuple(draw(declaration, frames[0::2])) if calibrate else (),
        calibration_name=declaration.name,
        validation=tuple(frames[1::2]),
        test_sha256=frozenset(),
        note=f"{folder_name(folder)} has no {TABLE}: of its {len(frames)} frames the even ones calibrate, "
        "the odd ones judge",
        training=tuple(frames[0::2]) if teach else (),
        reading=reading,
    )


def check_folder(folder: Path) -> None:
    """Refuses what is no folder, in the same words everywhere.

    Raises:
        InputError: nothing is there, or a file.
    """
    if not folder.exists():
        raise InputError(f"{folder} does not exist: give a folder with images, with or without a {TABLE}")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give the folder it lies in")


def _default_declaration(folder: Path) -> SetDeclaration:
    return SetDeclaration(
        name=f"{folder_name(folder)}-train",
        source="table",
        about="drawn from the training split, one frame a group, evenly over the labels",
        count=CALIBRATION_FRAMES,
    )


def _from_table(
    folder: Path, declaration: SetDeclaration, *, calibrate: bool, teach: bool, reading: Reading
) -> DataFolder:
    every = read_table_rows(folder, ("file", "split"), reading.table)
    rows = clean(every)[0]
    name = folder_name(folder)
    judging = [row for row in rows if row.split == "val"]
    if not judging:
        others = ", ".join(sorted({row.split or "none" for row in rows})) or "none"
        raise InputError(f"{name}/{TABLE} has no row of split val, on which the gate is judged; its splits: {others}")
    validation = [read_named(row, reading) for row in judging]
    training = [read_named(row, reading) for row in rows if row.split == "train"] if teach else []
    chosen: list[NamedFrame] = []
    if calibrate:
        # drawing looks at names and groups alone, so only what is drawn is decoded
        outlines = [outline(row) for row in rows if row.split == declaration.split]
        by_id, decoded = {row.columns["file"]: row for row in rows}, {named.id: named for named in training}
        for named in draw(declaration, outlines):
            is_made = named.id.startswith("phantom:")
            chosen.append(named if is_made else decoded.get(named.id) or read_named(by_id[named.id], reading))
    counts = f"{len(validation)} validation frames"
    counts += f", {len(chosen)} training frames calibrate" if chosen else ""
    counts += f", {len(training)} training frames teach" if teach else ""
    test = frozenset(file_sha256(row) for row in every if row.split == "test")
    return DataFolder(
        name=name,
        calibration=tuple(chosen),
        calibration_name=declaration.name,
        validation=tuple(validation),
        test_sha256=test,
        note=f"{name}: {counts}, {len(test)} test frames are not touched",
        notes=tuple(table_notes(folder, None, reading)),
        rows=tuple(judging),
        training=tuple(training),
        reading=reading,
    )


def evenly(named: Sequence[NamedFrame], most: int) -> list[NamedFrame]:
    """At most so many of the frames, evenly over their order."""
    count = min(most, len(named))
    return [named[i * len(named) // count] for i in range(count)]


def outline(row: Row) -> NamedFrame:
    """A row's name and group without its image."""
    blank = Frame(pixels=np.zeros((8, 8), np.uint8))
    return NamedFrame(id=row.columns["file"], frame=blank, stratum=row.label, group=row.columns.get("group") or "")


def read_named(row: Row, reading: Reading = AS_IT_IS) -> NamedFrame:
    """One row's frame with its names and hash.

    Raises:
        InputError: the file is missing, cannot be decoded or lies outside the folder; names table and line.
        MissingExtra: a library for this kind of file is missing.
    """
    shown = read_row(row, reading)
    return NamedFrame(
        id=row.columns.get("file") or row.id,
        frame=shown.frame,
        sha256=shown.sha256,
        stratum=row.label,
        group=row.columns.get("group") or "",
    )


def split_names(text: str | None) -> list[str]:
    """Comma-separated names, without blanks; nothing for None."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


__all__ = [
    "CALIBRATION_FRAMES",
    "DataFolder",
    "check_folder",
    "evenly",
    "outline",
    "read_data",
    "read_named",
    "split_names",
]
