"""One row's frame, decoded as ``run`` decodes it, and its hash.

The hash is that of the bytes that were decoded.

A row names one frame: a still image, a DICOM file of one frame, or ``FILE#N`` for frame N of a cine or video. It does
not know masks or splits.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyusfm_calibration.tables import Row, spacing_mm
from tinyusfm_edge.data.doubts import hold, kept
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import EdgeError, InputError, MissingExtra
from tinyusfm_runtime.frame import Frame, FrameSource
from tinyusfm_runtime.sources import open_source

LIKELY_SPACING_MM = (0.01, 1.0)
"""Range of pixel sizes of ultrasound images; outside it units were mixed up."""

UNLIKELY = "pixel_size_mm gives"
"""How the doubt about such a size begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFrame:
    """What a row shows.

    Attributes:
        frame: with the table's spacing, else the file's own.
        sha256: of the file, hex.
        notes: what was obeyed or neglected, one line each.
        doubts: where the file contradicts itself, one line each.
    """

    frame: Frame
    sha256: str
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


def read_row(row: Row, reading: Reading = AS_IT_IS) -> RowFrame:
    """Reads a row's frame.

    Args:
        row: of a table.
        reading: how files are read.

    Raises:
        InputError: the file is missing, cannot be decoded, holds several frames, changed meanwhile, or a size in mm is
            no number; names table and line.
        MissingExtra: a library for this kind of file is missing.
    """
    before = file_sha256(row)
    try:
        with open_file(row.path, reading) as source:
            frame = _one(source, row.frame)
            notes, doubts = (tuple(getattr(source, name, ())) for name in ("notes", "doubts"))
            notes = tuple(line for line in notes if "carry no spacing" not in line)
        rows, cols = frame.pixels.shape[:2]
        spacing = spacing_mm(row.columns, rows, cols)
        if spacing is not None and not all(LIKELY_SPACING_MM[0] <= side <= LIKELY_SPACING_MM[1] for side in spacing):
            low, high = LIKELY_SPACING_MM
            doubts = (*doubts, f"{UNLIKELY} {spacing[0]:.4g} mm, outside {low:g} to {high:g}: it is not used")
            spacing = None
    except MissingExtra:
        raise
    except EdgeError as error:
        raise InputError(f"{row.where}: {error}") from error
    if file_sha256(row) != before:
        raise InputError(f"{row.where}: the file changed while it was read")
    hold(reading.doubts, row.where, doubts)
    frame = replace(frame, pixels=np.array(frame.pixels), spacing_mm=spacing or frame.spacing_mm, seq=0, t_recv_ns=None)
    return RowFrame(frame=frame, sha256=before, notes=notes, doubts=doubts)


def frames_without_table(rows: Sequence[Row], reading: Reading = AS_IT_IS) -> Iterator[RowFrame]:
    """Every frame of every file of a folder without a table, in order.

    A cine gives all of its frames.

    Args:
        rows: files of the folder, in order.
        reading: how files are read.

    Raises:
        InputError: a file cannot be decoded; names its place in the folder.
        MissingExtra: a library for a kind of file is missing.
    """
    for row in rows:
        sha256 = file_sha256(row)
        try:
            with open_file(row.path, reading) as source:
                for frame in kept(source, reading.doubts, row.where):
                    own = replace(frame, pixels=np.array(frame.pixels), t_recv_ns=None)
                    yield RowFrame(frame=own, sha256=sha256)
                hold(reading.doubts, row.where, getattr(source, "doubts", ()))
        except MissingExtra:
            raise
        except EdgeError as error:
            raise InputError(f"{row.where}: {error}") from error


def file_sha256(row: Row) -> str:
    """Hash of a row's file, hex.

    Raises:
        InputError: it is missing or cannot be read; names table and line.
    """
    try:
        digest = hashlib.sha256()
        with row.path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
        return digest.hexdigest()
    except IsADirectoryError as error:
        raise InputError(f"{row.where} names a folder: name one file per line") from error
    except FileNotFoundError as error:
        raise InputError(f"{row.where}: the file does not exist") from error
    except OSError as error:
        raise InputError(f"{row.where}: the file cannot be read: {error.strerror}") from error


def open_file(
    path: Path, reading: Reading = AS_IT_IS, *, crop: tuple[int, int, int, int] | str | None = None
) -> FrameSource:
    """Opens one file as ``run`` does, with the window where its source takes one.

    Args:
        path: an image, DICOM file or video.
        reading: how files are read.
        crop: part of every frame, ``region``, or None for all of it.

    Raises:
        InputError: as ``open_source``.
        MissingExtra: a library is missing.
    """
    location = _location(path)
    if reading.window is not None and _takes_window(location):
        return open_source(location, crop=crop, window=reading.window)
    return open_source(location, crop=crop)


def _location(path: Path) -> str:
    """The path so that no source takes its beginning for a scheme."""
    return str(path.absolute())


def _takes_window(location: str) -> bool:
    for name in plugins.names("sources"):
        module = plugins.load("sources", name)
        if module.accepts(location):
            return "window" in inspect.signature(module.open_source).parameters
    return False


def _one(source: FrameSource, number: int | None) -> Frame:
    frames: Iterator[Frame] = iter(source)
    if number is not None:
        found = next(itertools.islice(frames, number, None), None)
        if found is None:
            raise InputError(f"it has no frame {number} (from 0)")
        return found
    first = next(frames, None)
    if first is None:
        raise InputError("it holds no frame")
    kept = replace(first, pixels=np.array(first.pixels))
    if next(frames, None) is not None:
        raise InputError("it holds several frames: name one, as in FILE#0, a line for each")
    return kept


__all__ = ["LIKELY_SPACING_MM", "UNLIKELY", "RowFrame", "file_sha256", "frames_without_table", "open_file", "read_row"]
