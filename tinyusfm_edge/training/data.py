"""Labelled tables: ``split.csv`` (file,label,mask,split,group,...) to arrays in the model's input geometry.

Pictures go through the runtime's own preprocessing, so training sees what live frames will be.
Decode errors are named and stop the load. Rows flagged as near duplicates or with conflicting labels are left out of
every split, since they would count a picture twice or teach two classes for one lesion; ``table_counts`` says how many.
It does not know the model or augmentation.

Shapes: S samples, HW rows and columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from tinyusfm_calibration.tables import TABLE, Row, clean, label_share, read_rows, read_table_rows, spacing_mm
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.preprocess import place, preprocess, resize
from tinyusfm_runtime.spec import PreprocessSpec

FILLED_MASK_THRESHOLD = 128
"""Code above which an antialiased, resized 0/255 mask counts as foreground."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One labelled picture.

    Attributes:
        id: the table's file column.
        group: patient or examination.
        frame: the picture with its spacing.
        mask_HW: uint8 0/1 at the frame's size; all 0 where only a label was asked for and the table names no mask.
        hc_mm: stated head circumference, mm, or None.
        sha256: hash of the picture file, hex.
        label: the table's label column, or empty.
    """

    id: str
    group: str
    frame: Frame
    mask_HW: np.ndarray
    hc_mm: float | None
    sha256: str
    label: str = ""


def read_table(
    folder: Path,
    split: str,
    *,
    need: Literal["mask", "label"] = "mask",
    limit: int | None = None,
    share: float = 1.0,
    share_seed: int = 0,
) -> list[Sample]:
    """Reads one split of a labelled table, flagged rows left out.

    Args:
        folder: holds ``split.csv`` and the files it names.
        split: ``train``, ``val`` or ``test``.
        need: what a row must have to be read.
        limit: at most this many samples, the first in table order.
        share: of the samples, by whole patients, nested (``label_share``); in (0, 1].
        share_seed: which patients enter the share first.

    Returns:
        Samples in table order.

    Raises:
        InputError: no table, a column or number that is not usable, a file that cannot be read, mask and picture of
            different size, or no sample in the split.
    """
    found = _clean_rows(folder, need)[0]
    rows = [row for row in found if row.split == split and (row.mask if need == "mask" else row.label)]
    if not rows:
        raise InputError(f"{folder / TABLE} has no row with split {split!r} and a {need}")
    return [_read_sample(row) for row in label_share(rows, share, share_seed)[:limit]]


def table_counts(folder: Path) -> dict[str, dict[str, int]]:
    """Frames and patients of each split of a table, and the flagged frames that are left out.

    Args:
        folder: holds ``split.csv``.

    Returns:
        Split -> ``frames`` and ``groups``, splits sorted; ``flagged`` where a split has such rows.

    Raises:
        InputError: no table, or one without the columns.
    """
    kept, every = _clean_rows(folder, None)
    groups: dict[str, list[str]] = {}
    for row in kept:
        if row.mask is not None or row.label:
            groups.setdefault(row.split, []).append(row.group)
    found = {}
    for split, names in sorted(groups.items()):
        found[split] = {"frames": len(names), "groups": len(set(names))}
        flagged = sum(row.split == split and (row.near_duplicate or row.label_conflict) for row in every)
        if flagged:
            found[split]["flagged"] = flagged
    return found


def _clean_rows(folder: Path, need: str | None) -> tuple[list[Row], list[Row]]:
    read_rows(folder, ("file", "split", *((need,) if need is not None else ())))
    every = read_table_rows(folder)
    return clean(every)[0], every


def _read_sample(row: Row) -> Sample:
    name = row.columns["file"]
    data = _read_bytes(row.path)
    pixels = _decode(data)
    mask = _decode(_read_bytes(row.mask)) if row.mask is not None else pixels
    if row.mask is None and mask is not None:
        mask = np.zeros_like(mask)
    if pixels is None or mask is None:
        raise InputError(f"table row {name!r}: picture or mask is missing or cannot be decoded")
    if mask.shape != pixels.shape:
        raise InputError(f"table row {name!r}: mask {mask.shape} and picture {pixels.shape} differ in size")
    try:
        spacing = spacing_mm(row.columns, *pixels.shape, unusable="raise")
        stated = row.columns.get("head_circumference_mm")
        hc_mm = float(stated) if stated else None
    except (InputError, ValueError) as error:
        raise InputError(f"table row {name!r}: a size in mm or pixels is missing or no number: {error}") from error
    return Sample(
        id=name,
        group=row.columns.get("group") or name,
        frame=Frame(pixels=pixels, spacing_mm=spacing),
        mask_HW=(mask >= FILLED_MASK_THRESHOLD).astype(np.uint8),
        hc_mm=hc_mm,
        sha256=hashlib.sha256(data).hexdigest(),
        label=row.label,
    )


def _read_bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _decode(data: bytes) -> np.ndarray | None:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None


def to_arrays(samples: list[Sample], spec: PreprocessSpec) -> tuple[np.ndarray, np.ndarray]:
    """Brings samples to the model's input geometry.

    Args:
        samples: labelled pictures.
        spec: the model's preprocessing.

    Returns:
        images uint8 SHW and masks uint8 0/1 SHW.
    """
    masks = np.stack([resize_mask(s.mask_HW, s.frame, spec) for s in samples])
    return stack_frames([s.frame for s in samples], spec), masks


def stack_frames(frames: Sequence[Frame], spec: PreprocessSpec) -> np.ndarray:
    """Frames in the model's input geometry, uint8 SHW; at least one."""
    return np.stack([preprocess(frame, spec)[0][0, 0] for frame in frames])


def resize_mask(mask_HW: np.ndarray, frame: Frame, spec: PreprocessSpec) -> np.ndarray:
    """A mask in the input's geometry, antialiased and cut at half coverage.

    Args:
        mask_HW: uint8 0/1 at the frame's size.
        frame: the frame it belongs to.
        spec: the model's preprocessing.

    Returns:
        uint8 0/1 of the input's size.
    """
    placement = place(frame, spec)
    row, col, height, width = placement.crop
    top, left, box_h, box_w = placement.box
    out = np.zeros((spec.height, spec.width), np.uint8)
    region = np.ascontiguousarray(mask_HW[row : row + height, col : col + width]) * np.uint8(255)
    out[top : top + box_h, left : left + box_w] = resize(region, box_h, box_w) >= FILLED_MASK_THRESHOLD
    return out


__all__ = ["FILLED_MASK_THRESHOLD", "Sample", "read_table", "resize_mask", "stack_frames", "table_counts", "to_arrays"]
