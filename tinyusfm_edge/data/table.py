"""Labelled tables: ``split.csv`` to arrays in the model's input geometry.

Columns: file,label,mask,split,group,...

Images are decoded and preprocessed as live frames are, so training sees what live frames will be (frames.py). Masks
are read by the rules of masks.py; a table whose masks contradict each other, or a split whose every mask is empty or
full, is refused. Decode errors are named and stop the load. Rows flagged as near duplicates or with conflicting labels
are left out of every split, since they would count an image twice or teach two classes for one lesion;
``table_counts`` says how many. It does not know the model or augmentation.

Shapes: S samples, HW rows and columns.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tinyusfm_calibration.table_text import KNOWN_NAMES
from tinyusfm_calibration.tables import (
    SPLITS,
    TABLE,
    Row,
    clean,
    folder_name,
    label_share,
    number,
    read_table_rows,
    read_table_text,
    unused,
)
from tinyusfm_edge.data.doubts import hold
from tinyusfm_edge.data.ellipses import ELLIPSES, Ellipse, read_ellipses
from tinyusfm_edge.data.frames import read_row
from tinyusfm_edge.data.lacking import absent_classes, check_values, doubt_of
from tinyusfm_edge.data.marks import label_numbers
from tinyusfm_edge.data.mask_values import Foreground
from tinyusfm_edge.data.masks import read_classes_map, read_mask
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import place, preprocess, resize
from tinyusfm_runtime.spec import PreprocessSpec


def class_indices(samples: Sequence[Sample], labels: tuple[str, ...]) -> np.ndarray:
    """Classes of samples as int64 S.

    Raises:
        InputError: a label that is not among the names.
    """
    known = label_numbers(labels)
    unknown = sorted({sample.label for sample in samples} - set(known))
    if unknown:
        raise InputError(f"label {unknown[0]!r} is not among the model's: {', '.join(labels)}")
    return np.array([known[sample.label] for sample in samples], np.int64)


FILLED_MASK_THRESHOLD = 128
"""Code above which an antialiased, resized 0/255 mask counts as foreground."""
EllipseNumbers = tuple[float, float, float, float, float]
"""Centre, axes and angle of a head's ellipse, as ``ellipses.csv`` has them."""
Need = Literal["mask", "label"]
"""What a row must have to be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One labelled image.

    Attributes:
        id: the table's file column.
        group: patient or examination.
        frame: the image with its spacing.
        mask_HW: uint8 0/1 at the frame's size; all 0 where only a label was asked for.
        hc_mm: stated head circumference, mm, or None.
        sha256: hash of the image file, hex.
        label: the table's label column, or empty.
        ellipse: the head's ellipse in the frame's pixels, where ``ellipses.csv`` names it.
        original_hw: rows and columns of the original image, which the frame may be a smaller copy of.
        mask_value: of the mask's foreground where nobody named it and the file holds two values, or None.
        other_values: of the mask beside 0 and those that were asked for, as they are typed.
        classes: names of ``--classes`` that the mask holds.
        where: table and line.
    """

    id: str
    group: str
    frame: Frame
    mask_HW: np.ndarray
    hc_mm: float | None
    sha256: str
    label: str = ""
    ellipse: Ellipse | None = None
    original_hw: tuple[int, int] = (0, 0)
    mask_value: str | None = None
    other_values: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    where: str = ""


def read_table(
    folder: Path,
    split: str,
    *,
    need: Need = "mask",
    limit: int | None = None,
    share: float = 1.0,
    share_seed: int = 0,
    reading: Reading = AS_IT_IS,
) -> list[Sample]:
    """Reads one split of a labelled table, flagged rows left out.

    Args:
        folder: holds ``split.csv``.
        split: ``train``, ``val`` or ``test``.
        need: what a row must have to be read.
        limit: at most this many samples, the first in table order.
        share: of the samples, by whole patients, nested (``label_share``); in (0, 1].
        share_seed: which patients enter the share first.
        reading: how files are read that do not explain themselves.

    Returns:
        Samples in table order.

    Raises:
        InputError: no table, a column or number that is not usable, a file that cannot be read, mask and image of
            different size, masks that contradict each other or are all empty or all full, or no sample in the split.
        MissingExtra: a library for a kind of file is missing.
    """
    rows = split_rows(folder, split, need, reading)
    ellipses = read_ellipses(folder)
    samples = [_read_sample(row, need, reading, ellipses) for row in label_share(rows, share, share_seed)[:limit]]
    if need == "mask":
        _check_asked(samples, f"{folder_name(folder)}/{TABLE} split {split}", reading)
        absent = absent_classes(
            [sample.classes for sample in samples], f"{folder_name(folder)}/{TABLE} split {split}", reading.masks
        )
        if absent and split == "train" and limit is None:
            raise InputError(absent)
        if absent and reading.doubts is not None:
            reading.doubts.add("the masks", (absent,))
        check_masks(samples, f"{folder_name(folder)}/{TABLE} split {split}")
    return samples


def _check_asked(samples: Sequence[Sample], where: str, reading: Reading) -> None:
    """Judges masks that hold none of the values asked for.

    Where nobody takes doubts (training), such a mask is refused unless its values are classes: they stand beside the
    value asked for in another mask.
    """
    check_values([(bool(s.mask_HW.any()), s.other_values) for s in samples], where, reading.masks)
    beside = {value for s in samples if s.mask_HW.any() for value in s.other_values}
    for sample in samples:
        found = () if sample.mask_HW.any() else doubt_of(sample.other_values, reading.masks)
        if reading.doubts is not None or not beside.issuperset(sample.other_values):
            hold(reading.doubts, sample.where, found)


def frames_sha256(samples: Sequence[Sample]) -> str:
    """One hash of which frames these are, whatever their order; hex."""
    return hashlib.sha256("".join(sorted(sample.sha256 for sample in samples)).encode()).hexdigest()


def split_rows(folder: Path, split: str, need: Need, reading: Reading = AS_IT_IS) -> list[Row]:
    """Rows of one split that have what is needed, flagged ones left out.

    Raises:
        InputError: no table, a column that is missing, or no such row; says what the table has instead.
    """
    kept = clean(read_table_rows(folder, ("file", "split", need), reading.table))[0]
    rows = [row for row in kept if row.split == split and (row.mask if need == "mask" else row.label)]
    if not rows:
        others = Counter(row.split or "none" for row in kept)
        found = ", ".join(f"{name} ({count} rows)" for name, count in sorted(others.items())) or "no rows"
        raise InputError(f"{folder / TABLE} has no row with split {split!r} and a {need}; its splits: {found}")
    return rows


def table_notes(folder: Path, need: Need | None, reading: Reading = AS_IT_IS) -> list[str]:
    """What was guessed about a table, and its unused rows, one line each.

    Args:
        folder: holds ``split.csv``.
        need: what a row must have to be used, or None.
        reading: how files are read.

    Raises:
        InputError: no table that can be used.
    """
    where = f"{folder_name(folder)}/{TABLE}"
    text = read_table_text(folder, ("file", "split"), reading.table)
    lines = list(text.notes)
    if "group" not in text.columns:
        like = next((name for name in KNOWN_NAMES["group"] if name in text.columns), None)
        also = f"; --columns group={like} takes {like}" if like else ""
        lines.append(f"{where}: no column group, so every file counts as a patient of its own{also}")
    rows, flagged = clean(read_table_rows(folder, options=reading.table))
    left = {**unused(rows, need), **{name: count for name, count in flagged.items() if count}}
    if left:
        named = ", ".join(f"{count} {why}" for why, count in left.items())
        lines.append(f"{where}: {sum(left.values())} rows are not used ({named})")
    return lines


def check_masks(samples: Sequence[Sample], where: str) -> None:
    """Refuses masks that contradict each other or a split with one class only.

    A split without any foreground or without any background is such a split.

    Args:
        samples: of one split or of several that belong together.
        where: what they are, for the message.

    Raises:
        InputError: how many masks hold which value, or that all are empty or full.
    """
    check_masks_of([sample.mask_value for sample in samples], [sample.mask_HW for sample in samples], where)


def check_masks_of(found: Sequence[str | None], masks: Sequence[np.ndarray], where: str) -> None:
    """The same for masks without their images.

    Args:
        found: value of each mask's foreground, or None where it was named or has soft edges.
        masks: uint8 0/1; empty to look at the values alone.
        where: what they are, for the message.

    Raises:
        InputError: how many masks hold which value, or that all are empty or full.
    """
    values = Counter(value for value in found if value is not None)
    if len(values) > 1:
        shown = ", ".join(f"{count} with {value}" for value, count in values.most_common(6))
        asked = ",".join(sorted(values)[:6])
        raise InputError(
            f"{where}: masks have different foreground values ({shown}): class ids? --mask-value {asked!r} takes all "
            f"of them, a single one that class, --classes names them"
        )
    for what, good in (("empty", lambda mask: mask.any()), ("full", lambda mask: not mask.all())):
        if len(masks) and not any(good(mask) for mask in masks):
            raise InputError(
                f"{where}: every mask is {what} ({len(masks)} of {len(masks)}): name the foreground's value with "
                f"--mask-value; tinyusfm-edge data check shows how masks are read"
            )


def table_counts(folder: Path, reading: Reading = AS_IT_IS) -> dict[str, dict[str, int]]:
    """Frames and patients of each split of a table.

    The flagged frames that are left out are counted as well.

    Args:
        folder: holds ``split.csv``.
        reading: how files are read.

    Returns:
        Split -> ``frames`` and ``groups``, splits sorted; ``flagged`` where a split has such rows.

    Raises:
        InputError: no table, or one without the columns.
    """
    every = read_table_rows(folder, ("file", "split"), reading.table)
    kept = clean(every)[0]
    groups: dict[str, list[str]] = {}
    for row in kept:
        if row.split in SPLITS and (row.mask is not None or row.label):
            groups.setdefault(row.split, []).append(row.group)
    found = {}
    for split, names in sorted(groups.items()):
        found[split] = {"frames": len(names), "groups": len(set(names))}
        flagged = sum(row.split == split and (row.near_duplicate or row.label_conflict) for row in every)
        if flagged:
            found[split]["flagged"] = flagged
    return found


def _read_sample(row: Row, need: Need, reading: Reading, ellipses: Mapping[str, EllipseNumbers]) -> Sample:
    shown = read_row(row, reading)
    rows, cols = shown.frame.pixels.shape[:2]
    mask = Foreground(mask_HW=np.zeros((rows, cols), np.uint8))
    if need == "mask" and row.mask is not None:
        mask = read_row_mask(row, shown.frame, reading)
    stated = row.columns.get("head_circumference_mm")
    try:
        hc_mm = number(stated) if stated else None
        original = tuple(
            int(number(row.columns.get(key) or str(own))) for key, own in (("orig_h", rows), ("orig_w", cols))
        )
    except InputError as error:
        raise InputError(f"{row.where}: a number of the table: {error}") from error
    name = row.columns["file"]
    return Sample(
        id=row.columns["file"],
        group=row.columns.get("group") or row.columns["file"],
        frame=shown.frame,
        mask_HW=mask.mask_HW,
        hc_mm=hc_mm,
        sha256=shown.sha256,
        label=row.label,
        ellipse=None if name not in ellipses else _in_frame(ellipses[name], (original[0], original[1]), (rows, cols)),
        original_hw=(original[0], original[1]),
        mask_value=mask.value,
        other_values=mask.others,
        classes=mask.classes,
        where=row.where,
    )


def _in_frame(numbers: EllipseNumbers, original_hw: tuple[int, int], shape: tuple[int, ...]) -> Ellipse:
    found = Ellipse.from_axes((numbers[0], numbers[1]), *numbers[2:])
    return found.scaled(shape[1] / original_hw[1], shape[0] / original_hw[0])


def read_row_mask(row: Row, frame: Frame, reading: Reading = AS_IT_IS) -> Foreground:
    """The mask of a row at its frame's size, and what is known of its values.

    Args:
        row: that names a mask.
        frame: its frame.
        reading: how masks are read.

    Raises:
        InputError: missing, not to be decoded, not explaining itself, or of another size; names table and line.
        MissingExtra: a library is missing.
    """
    data = _mask_bytes(row)
    try:
        found = read_mask(data, reading.masks)
    except InputError as error:
        raise InputError(f"{row.where}, the mask: {error}") from error
    size = frame.pixels.shape[:2]
    if found.mask_HW.shape != size:
        raise InputError(f"{row.where}: {_other_size(found.mask_HW.shape, size)}")
    return found


def read_row_classes(row: Row, frame: Frame, classes: Sequence[str], reading: Reading) -> np.ndarray:
    """The classes of a row's mask at its frame's size.

    Args:
        row: that names a mask.
        frame: its frame.
        classes: names in the order of their numbers, from 1; ``reading`` has the values of all of them.
        reading: how masks are read.

    Returns:
        uint8: 0 background, 1 the first class, and so on.

    Raises:
        InputError: missing, not to be decoded, with a value that no class has, or of another size; names table and
            line.
        MissingExtra: a library is missing.
    """
    try:
        found = read_classes_map(_mask_bytes(row), {name: reading.masks.classes[name] for name in classes})
    except InputError as error:
        raise InputError(f"{row.where}, the mask: {error}") from error
    size = frame.pixels.shape[:2]
    if found.shape != size:
        raise InputError(f"{row.where}: {_other_size(found.shape, size)}")
    return found


def _mask_bytes(row: Row) -> bytes:
    if row.mask is None:
        raise InputError(f"{row.where} names no mask")
    if row.mask.exists() and row.path.exists() and row.mask.samefile(row.path):
        raise InputError(f"{row.where}: mask and image are one file")
    try:
        return row.mask.read_bytes()
    except FileNotFoundError as error:
        several = ": name one file; merge several masks into one" if set(";| ") & set(row.columns["mask"]) else ""
        raise InputError(f"{row.where}: the mask does not exist{several}") from error
    except OSError as error:
        raise InputError(f"{row.where}: the mask cannot be read: {error.strerror}") from error


def _other_size(mask: Sequence[int], image: Sequence[int]) -> str:
    text = f"mask {mask[0]}x{mask[1]} and image {image[0]}x{image[1]} (rows x columns) differ in size"
    if tuple(mask) == tuple(image)[::-1]:
        return f"{text}: one is turned; the image may carry an orientation (EXIF) that its mask lacks. Turn the mask"
    return f"{text}: store the mask at the size of the image"


def to_arrays(samples: list[Sample], spec: PreprocessSpec) -> tuple[np.ndarray, np.ndarray]:
    """Brings samples to the model's input geometry.

    Args:
        samples: labelled images.
        spec: the model's preprocessing.

    Returns:
        images uint8 SHW and masks uint8 0/1 SHW.
    """
    masks = np.stack([resize_mask(s.mask_HW, s.frame, spec) for s in samples])
    return stack_frames([s.frame for s in samples], spec), masks


def soft_masks(samples: Sequence[Sample], spec: PreprocessSpec, *, from_ellipse: bool) -> np.ndarray:
    """Masks in the model's input geometry as shares of every pixel, uint8 0..255, SHW.

    Args:
        samples: labelled images.
        spec: the model's preprocessing.
        from_ellipse: draw each head's ellipse; else the table's own masks, cut at half coverage.

    Raises:
        InputError: an ellipse is wanted and the table names none for an image.
    """
    if not from_ellipse:
        return np.stack([resize_mask(s.mask_HW, s.frame, spec) * np.uint8(255) for s in samples])
    missing = sum(sample.ellipse is None for sample in samples)
    if missing:
        raise InputError(f"masks of ellipses are wanted, and {ELLIPSES} lacks {missing} of {len(samples)} images")
    drawn = [
        sample.ellipse.placed(place(sample.frame, spec)).coverage(spec.height, spec.width)
        for sample in samples
        if sample.ellipse is not None
    ]
    return (np.stack(drawn) * 255).round().astype(np.uint8)


def read_frames(folder: Path, split: str, reading: Reading = AS_IT_IS) -> list[Frame]:
    """Images of one split of a table, whether labelled or not, flagged rows left out.

    Args:
        folder: holds ``split.csv``.
        split: ``train``, ``val`` or ``test``.
        reading: how files are read.

    Raises:
        InputError: no table, no row of the split, or an image that cannot be decoded.
        MissingExtra: a library for a kind of file is missing.
    """
    rows = clean(read_table_rows(folder, ("file", "split"), reading.table))[0]
    found = [read_row(row, reading).frame for row in rows if row.split == split]
    if not found:
        raise InputError(f"{folder / TABLE} has no row with split {split!r}")
    return found


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


__all__ = [
    "FILLED_MASK_THRESHOLD",
    "EllipseNumbers",
    "Need",
    "Sample",
    "check_masks",
    "check_masks_of",
    "class_indices",
    "frames_sha256",
    "read_frames",
    "read_row_classes",
    "read_row_mask",
    "read_table",
    "resize_mask",
    "soft_masks",
    "split_rows",
    "stack_frames",
    "table_counts",
    "table_notes",
    "to_arrays",
]
