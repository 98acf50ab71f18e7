"""What a data folder holds and how it is understood, before training.

Rows, masks, spacing, copies, leaks.

Every file is read once, by the rules that training, evaluation and export follow; a row that cannot be used is a fault
and does not stop the reading. A leak is a patient, an image or a near copy of one in two splits. It knows no page.

Shapes: HW rows, columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tinyusfm_calibration.sets import pixels_sha256
from tinyusfm_calibration.tables import SPLITS, Row, clean, find_table, folder_name, read_table_rows, read_table_text
from tinyusfm_calibration.tables import unused as unused_rows
from tinyusfm_edge.data.doubts import Doubts
from tinyusfm_edge.data.frames import LIKELY_SPACING_MM, UNLIKELY, frames_without_table, read_row
from tinyusfm_edge.data.images import search
from tinyusfm_edge.data.lacking import absent_classes, check_values, doubt_of
from tinyusfm_edge.data.mask_values import Foreground
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.data.table import check_masks_of, read_row_mask
from tinyusfm_runtime.errors import EdgeError, InputError, MissingExtra
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import resize, to_grey

PRINT_ROWS, PRINT_COLS = 16, 17
"""A fingerprint compares neighbours of an image of this size: 256 bits."""
NEAR_BITS = 6
"""Fingerprints that differ in at most so many bits show nearly one image; no two splits of HC18 share one so near."""
MAX_COMPARED = 6000
"""Frames whose fingerprints are compared with each other; above it only whole copies are looked for."""
DOUBTFUL = "doubtful"
"""Kind of a doubt about a file that contradicts itself and was read as its data say."""

Track = Callable[[Iterable[Row], str, int], Iterator[Row]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something to mend.

    Attributes:
        kind: ``file``, ``mask``, ``leak``, ``label``, ``spacing``, ``table`` or ``doubtful``.
        text: one line, without file names.
        lines: of the table, from 1; empty where it concerns none.
        grave: whether training on the data would be wrong; else it is a doubt.
    """

    kind: str
    text: str
    lines: tuple[int, ...] = ()
    grave: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRow:
    """What is kept of a row after its files were read.

    Attributes:
        row: of the table.
        size: (rows, columns), or None where the image cannot be read.
        sha256: of the pixels, hex.
        print_bits: fingerprint as 32 bytes.
        spacing_mm: (row, column), or None.
        mask_share: share of the pixels that are foreground, or None without a mask.
        mask_value: of its foreground, where nobody named it and it has no soft edges.
        other_values: beside 0 and the values that were asked for.
        classes: names of ``--classes`` that its mask holds.
        on_border: whether the foreground touches the border.
        fault: why image or mask cannot be used, or empty.
        notes: what was obeyed or neglected.
        doubts: where the file contradicts itself and was read all the same.
    """

    row: Row
    size: tuple[int, int] | None = None
    sha256: str = ""
    print_bits: bytes = b""
    spacing_mm: tuple[float, float] | None = None
    mask_share: float | None = None
    mask_value: str | None = None
    other_values: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    on_border: bool = False
    fault: str = ""
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCount:
    """One split.

    Attributes:
        rows: that are used.
        patients: groups among them.
        masks: rows with a mask that can be read.
        empty: of these, masks without foreground.
        labels: class -> rows.
        unreadable: rows whose image or mask cannot be used.
    """

    rows: int
    patients: int
    masks: int
    empty: int
    labels: dict[str, int]
    unreadable: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """What was found.

    Attributes:
        name: the folder's own name.
        table: how the table is written, in words; empty without one.
        columns: of the table.
        reading: what was asked for, as it is typed.
        splits: split -> counts.
        unused: why rows are not used -> how many.
        looked: every row that was read.
        faults: what is to be mended, grave ones first.
        notes: what was guessed or obeyed.
    """

    name: str
    table: str
    columns: tuple[str, ...]
    reading: dict[str, object]
    splits: dict[str, SplitCount]
    unused: dict[str, int]
    looked: tuple[CheckedRow, ...]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()
    seen: tuple[ShownRow, ...] = field(default=(), repr=False)

    def __bool__(self) -> bool:
        """Whether nothing grave was found."""
        return not any(fault.grave for fault in self.faults)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRow:
    """A frame and its mask, kept to be shown.

    Attributes:
        row: of the table.
        frame: the image.
        mask_HW: uint8 0/1, or None.
        fault: why the row cannot be used, or empty.
    """

    row: Row
    frame: Frame
    mask_HW: np.ndarray | None
    fault: str = ""


def check_folder_data(
    folder: Path,
    reading: Reading = AS_IT_IS,
    *,
    shown: int = 8,
    track: Track = lambda rows, _label, _total: iter(rows),
) -> DataReport:
    """Reads a data folder as training would, and tells what is there.

    Args:
        folder: with or without ``split.csv``.
        reading: how its files are read.
        shown: images of each split that are kept to be shown; as many more that have a fault.
        track: wraps the rows, for a progress bar.

    Raises:
        InputError: nothing there, or a table that cannot be read at all.
        MissingExtra: a library for a kind of file is missing.
    """
    if not folder.is_dir():
        what = "is a file: give the folder that holds it" if folder.exists() else "does not exist: give a folder"
        raise InputError(f"{folder} {what}")
    if find_table(folder) is None:
        return _without_table(folder, reading, shown)
    text = read_table_text(folder, ("file",), reading.table)
    every = read_table_rows(folder, options=reading.table)
    kept, flagged = clean(every)
    left = {**unused_rows(kept), **{f"flagged {name}": count for name, count in flagged.items() if count}}
    used = [row for row in kept if row.split in SPLITS]
    looked, seen = _look_at(used, replace(reading, doubts=Doubts()), shown, track)
    faults = [
        *_table_faults(text.columns, used),
        *_file_faults(looked),
        *_doubts(looked),
        *_mask_faults(looked, reading),
        *_leaks(looked),
        *_label_faults(looked),
        *_spacing_faults(looked),
    ]
    respelt = sum(row.respelt for row in used)
    notes = [*text.notes, *([f"{respelt} files are spelt otherwise than in the folder"] if respelt else [])]
    obeyed = Counter(line for item in looked for line in item.notes)
    return DataReport(
        name=folder_name(folder),
        table=f"{len(every)} rows, {text.encoding}, {text.separator} between cells",
        columns=text.columns,
        reading=reading.to_json(),
        splits={split: _count(split, looked) for split in SPLITS if any(row.split == split for row in used)},
        unused=left,
        looked=tuple(looked),
        faults=tuple(sorted(faults, key=lambda fault: not fault.grave)),
        notes=(*notes, *(f"{count} images: {line}" for line, count in obeyed.items())),
        seen=tuple(seen),
    )


def _without_table(folder: Path, reading: Reading, shown: int) -> DataReport:
    rows = search(folder)
    looked: list[CheckedRow] = []
    seen: list[ShownRow] = []
    every = max(1, len(rows) // max(1, shown))
    doubts = Doubts()
    for number, item in enumerate(frames_without_table(rows, replace(reading, doubts=doubts))):
        row = Row(id=f"{folder.name}#{number}", path=folder, source=folder.name, line=number)
        looked.append(_facts(row, item.frame, None))
        if number % every == 0 and len(seen) < shown:
            seen.append(ShownRow(row=row, frame=item.frame, mask_HW=None))
    copies = len(looked) - len({item.sha256 for item in looked})
    faults = (
        [Fault(kind="leak", text=f"frames that are copies of another one: {copies}", grave=False)] if copies else []
    )
    faults += [Fault(kind=DOUBTFUL, text=line, grave=False) for line in doubts.lines]
    return DataReport(
        name=folder_name(folder),
        table="",
        columns=(),
        reading=reading.to_json(),
        splits={},
        unused={},
        looked=tuple(looked),
        faults=tuple(faults),
        notes=(
            f"no table: {len(rows)} files with {len(looked)} frames; of every two the first may calibrate and the "
            "second judges, and nothing says which are of one patient",
        ),
        seen=tuple(seen),
    )


def _look_at(
    rows: Sequence[Row], reading: Reading, shown: int, track: Track
) -> tuple[list[CheckedRow], list[ShownRow]]:
    picked = {row.id for split in SPLITS for row in _evenly([row for row in rows if row.split == split], shown)}
    looked, seen, bad = [], [], 0
    for row in track(rows, "reading", len(rows)):
        try:
            item = read_row(row, reading)
        except MissingExtra:
            raise
        except EdgeError as error:
            looked.append(CheckedRow(row=row, fault=_bare(str(error), row)))
            continue
        mask, fault = None, ""
        if row.mask is not None:
            try:
                mask = read_row_mask(row, item.frame, reading)
            except MissingExtra:
                raise
            except EdgeError as error:
                fault = _bare(str(error), row)
        lacking = () if mask is None or mask.mask_HW.any() else doubt_of(mask.others, reading.masks)
        doubts = (*item.doubts, *lacking)
        looked.append(_facts(row, item.frame, mask, fault=fault, notes=item.notes, doubts=doubts))
        bad += bool(fault)
        if row.id in picked or (fault and bad <= shown):
            shown_HW = None if mask is None else mask.mask_HW
            seen.append(ShownRow(row=row, frame=item.frame, mask_HW=shown_HW, fault=fault))
    return looked, seen


def _evenly(rows: Sequence[Row], most: int) -> list[Row]:
    count = min(most, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _bare(text: str, row: Row) -> str:
    """A message without the place, which stands beside it."""
    return text.removeprefix(row.where).lstrip(":, ")


def _facts(
    row: Row,
    frame: Frame,
    mask: Foreground | None,
    *,
    fault: str = "",
    notes: tuple[str, ...] = (),
    doubts: tuple[str, ...] = (),
) -> CheckedRow:
    rows, cols = frame.pixels.shape[:2]
    mask_HW = None if mask is None else mask.mask_HW
    border = None if mask_HW is None else (mask_HW[0], mask_HW[-1], mask_HW[:, 0], mask_HW[:, -1])
    return CheckedRow(
        row=row,
        size=(rows, cols),
        sha256=pixels_sha256(frame),
        print_bits=fingerprint_bits(frame),
        spacing_mm=frame.spacing_mm,
        mask_share=None if mask_HW is None else float(mask_HW.mean()),
        mask_value=None if mask is None else mask.value,
        other_values=() if mask is None else mask.others,
        classes=() if mask is None else mask.classes,
        on_border=border is not None and any(bool(edge.any()) for edge in border),
        fault=fault,
        notes=notes,
        doubts=doubts,
    )


def fingerprint_bits(frame: Frame) -> bytes:
    """256 bits of what an image shows (dHash).

    Each tells whether a pixel of a small copy is brighter than its neighbour.
    """
    grey = to_grey(frame.pixels, frame.pixel_format, frame.video_range)
    small = resize(np.ascontiguousarray(grey), PRINT_ROWS, PRINT_COLS).astype(np.int16)
    return np.packbits(small[:, 1:] > small[:, :-1]).tobytes()


def _count(split: str, looked: Sequence[CheckedRow]) -> SplitCount:
    own = [item for item in looked if item.row.split == split]
    shares = [item.mask_share for item in own if item.mask_share is not None]
    return SplitCount(
        rows=len(own),
        patients=len({item.row.group for item in own}),
        masks=len(shares),
        empty=sum(share == 0 for share in shares),
        labels=dict(sorted(Counter(item.row.label or "none" for item in own).items())),
        unreadable=sum(bool(item.fault) for item in own),
    )


def _table_faults(columns: Sequence[str], used: Sequence[Row]) -> list[Fault]:
    found = []
    if "split" not in columns:
        found.append(Fault(kind="table", text="there is no column split: no row is used"))
    elif not used:
        found.append(Fault(kind="table", text="no row is of a split train, val or test"))
    else:
        found += [
            Fault(kind="table", text=f"no row is of split {split}", grave=False)
            for split in SPLITS
            if not any(row.split == split for row in used)
        ]
    if "group" not in columns and used:
        text = "there is no column group: every file counts as a patient of its own, so no leak of patients can be seen"
        found.append(Fault(kind="table", text=text, grave=False))
    return found


def _file_faults(looked: Sequence[CheckedRow]) -> list[Fault]:
    by_text: dict[str, list[int]] = {}
    for item in looked:
        if item.fault:
            by_text.setdefault(item.fault, []).append(item.row.line)
    return [
        Fault(kind="mask" if text.startswith("the mask") or "mask" in text else "file", text=text, lines=tuple(lines))
        for text, lines in sorted(by_text.items(), key=lambda pair: -len(pair[1]))
    ]


def _doubts(looked: Sequence[CheckedRow]) -> list[Fault]:
    by_text: dict[str, list[int]] = {}
    for item in looked:
        for text in (text for text in item.doubts if not text.startswith(UNLIKELY)):
            by_text.setdefault(text, []).append(item.row.line)
    return [Fault(kind=DOUBTFUL, text=text, lines=tuple(lines), grave=False) for text, lines in by_text.items()]


def _mask_faults(looked: Sequence[CheckedRow], reading: Reading) -> list[Fault]:
    good = [item for item in looked if item.mask_share is not None]
    found = []
    try:
        check_masks_of([item.mask_value for item in good], [], "the table")
    except InputError as error:
        found.append(Fault(kind="mask", text=str(error)))
    for split in SPLITS:
        own = [item for item in good if item.row.split == split]
        try:
            check_values([(bool(item.mask_share), item.other_values) for item in own], f"split {split}", reading.masks)
        except InputError as error:
            found.append(Fault(kind="mask", text=str(error)))
            continue
        if absent := absent_classes([item.classes for item in own], f"split {split}", reading.masks):
            found.append(Fault(kind="mask", text=absent, grave=split == "train"))
        shares = [item.mask_share for item in own]
        for what, value in (("empty", 0.0), ("full", 1.0)):
            if shares and all(share == value for share in shares):
                found.append(Fault(kind="mask", text=f"every mask of split {split} is {what} ({len(shares)})"))
    return found


def _leaks(looked: Sequence[CheckedRow]) -> list[Fault]:
    whole = [item for item in looked if item.sha256]
    return [*_shared_patients(looked), *_copies(whole), *_near_copies(whole)]


def _shared_patients(looked: Sequence[CheckedRow]) -> list[Fault]:
    splits: dict[str, dict[str, int]] = {}
    for item in looked:
        if item.row.columns.get("group"):
            splits.setdefault(item.row.group, {}).setdefault(item.row.split, item.row.line)
    shared = [lines for lines in splits.values() if len(lines) > 1]
    if not shared:
        return []
    lines = tuple(sorted(line for found in shared for line in found.values()))
    return [Fault(kind="leak", text=f"patients that stand in two splits or more: {len(shared)}", lines=lines)]


def _copies(looked: Sequence[CheckedRow]) -> list[Fault]:
    by_pixels: dict[str, list[CheckedRow]] = {}
    for item in looked:
        by_pixels.setdefault(item.sha256, []).append(item)
    found = []
    for grave, text in ((True, "stand in two splits"), (False, "are copies of another row of their split")):
        groups = [
            items
            for items in by_pixels.values()
            if len(items) > 1 and (len({item.row.split for item in items}) > 1) == grave
        ]
        if groups:
            lines = tuple(sorted(item.row.line for items in groups for item in items))
            found.append(Fault(kind="leak", text=f"images that {text}: {len(groups)}", lines=lines, grave=grave))
    return found


def _near_copies(looked: Sequence[CheckedRow]) -> list[Fault]:
    """Images of two splits that are nearly one, whole copies aside."""
    if len(looked) > MAX_COMPARED:
        text = f"near copies were not looked for among {len(looked)} images, only whole ones"
        return [Fault(kind="leak", text=text, grave=False)]
    bits = np.array([np.frombuffer(item.print_bits, np.uint8) for item in looked], np.uint8).reshape(len(looked), -1)
    counts = np.array([bin(value).count("1") for value in range(256)], np.uint8)
    lines: set[int] = set()
    pairs = 0
    for index, item in enumerate(looked):
        apart = counts[bits[index + 1 :] ^ bits[index]].sum(1, dtype=np.int32)
        for other in np.flatnonzero(apart <= NEAR_BITS) + index + 1:
            near = looked[int(other)]
            if near.row.split != item.row.split and near.sha256 != item.sha256:
                pairs += 1
                lines |= {item.row.line, near.row.line}
    if not pairs:
        return []
    text = f"pairs of nearly equal images in two splits: {pairs}"
    return [Fault(kind="leak", text=text, lines=tuple(sorted(lines)), grave=False)]


def _label_faults(looked: Sequence[CheckedRow]) -> list[Fault]:
    by_pixels: dict[str, set[str]] = {}
    for item in looked:
        if item.sha256 and item.row.label:
            by_pixels.setdefault(item.sha256, set()).add(item.row.label)
    twice = {key for key, labels in by_pixels.items() if len(labels) > 1}
    found = []
    if twice:
        lines = tuple(item.row.line for item in looked if item.sha256 in twice)
        found.append(Fault(kind="label", text=f"images that stand under two labels: {len(twice)}", lines=lines))
    known = {item.row.label for item in looked if item.row.split == "train" and item.row.label}
    strange = sorted({item.row.label for item in looked if item.row.label} - known) if known else []
    if strange:
        lines = tuple(item.row.line for item in looked if item.row.label in strange)
        text = f"labels that training never sees: {', '.join(strange[:6])}"
        found.append(Fault(kind="label", text=text, lines=lines))
    folded: dict[str, set[str]] = {}
    for label in {item.row.label for item in looked}:
        folded.setdefault("".join(label.casefold().split()), set()).add(label)
    for same in (sorted(labels) for labels in folded.values() if len(labels) > 1):
        found.append(Fault(kind="label", text=f"labels that differ in spelling alone: {', '.join(same)}", grave=False))
    return found


def _spacing_faults(looked: Sequence[CheckedRow]) -> list[Fault]:
    found = []
    low, high = LIKELY_SPACING_MM
    odd = [item for item in looked if any(text.startswith(UNLIKELY) for text in item.doubts)]
    if odd:
        text = f"images with pixels outside {low:g} to {high:g} mm: {len(odd)}; is pixel_size_mm in mm?"
        found.append(Fault(kind="spacing", text=text, lines=tuple(item.row.line for item in odd)))
    known = [item for item in looked if item.size]
    without = [item for item in known if item.spacing_mm is None and item not in odd]
    if without and len(without) < len(known):
        text = f"images without spacing: {len(without)} of {len(known)}; readings in mm leave them out"
        lines = tuple(item.row.line for item in without)
        found.append(Fault(kind="spacing", text=text, lines=lines, grave=False))
    skewed = [item for item in known if item.spacing_mm and not 0.5 < item.spacing_mm[0] / item.spacing_mm[1] < 2.0]
    if skewed:
        text = f"images with pixels more than twice as long as wide: {len(skewed)}; are orig_w and orig_h swapped?"
        found.append(Fault(kind="spacing", text=text, lines=tuple(item.row.line for item in skewed), grave=False))
    return found


__all__ = [
    "DOUBTFUL",
    "MAX_COMPARED",
    "NEAR_BITS",
    "PRINT_COLS",
    "PRINT_ROWS",
    "CheckedRow",
    "DataReport",
    "Fault",
    "ShownRow",
    "SplitCount",
    "Track",
    "check_folder_data",
    "fingerprint_bits",
]
