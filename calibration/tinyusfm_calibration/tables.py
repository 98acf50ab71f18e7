"""The one table of pictures, ``split.csv`` (file,label,mask,split,group,...): rows, spacing, flags, seeded splits.

Everything that reads a data folder reads it here: calibration, training, evaluation. A row names its picture, and
may name a mask, a label, a split, a patient (``group``), the pixel size of the original and two flags:
``near_duplicate`` and ``label_conflict``. It does not decode anything and does not know torch or OpenCV.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tinyusfm_runtime.errors import InputError

TABLE = "split.csv"
"""Name of the table in a data folder."""
MAX_TABLE_BYTES = 1 << 30
"""A table of 2.2 million rows has about 300 MB."""
SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}
"""Default shares of seeded splits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        id: ``FOLDER/FILE``, unique over several folders.
        path: the picture, cine or video.
        label: class name, or empty.
        mask: mask picture, or None.
        split: ``train``, ``val``, ``test`` or empty.
        group: ``FOLDER/GROUP``: patient or examination; the file itself where the table names none.
        source: the folder's name.
        near_duplicate: another row shows nearly the same picture, and this one is the spare.
        label_conflict: the same picture stands in the table under two labels.
        columns: every column as text.
    """

    id: str
    path: Path
    label: str = ""
    mask: Path | None = None
    split: str = ""
    group: str = ""
    source: str = ""
    near_duplicate: bool = False
    label_conflict: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A name for logs: the first 12 hex digits of the id's sha256, since file names may name patients."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:12]


def read_rows(folder: Path, required: Iterable[str] = ("file", "split")) -> list[dict[str, str]]:
    """Reads a folder's table as text.

    Args:
        folder: holds ``split.csv``.
        required: columns that must be there.

    Returns:
        One mapping a row, in table order.

    Raises:
        InputError: no table, not readable, a column missing, or a row longer or shorter than the head.
    """
    table = folder / TABLE
    try:
        if table.stat().st_size > MAX_TABLE_BYTES:
            raise InputError(f"{folder.name}/{TABLE} has {table.stat().st_size} bytes: that is no table of frames")
        text = table.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{folder} has no readable {TABLE}: give a folder with a table file,label,mask,split,group,..."
        ) from error
    missing = set(required) - set(reader.fieldnames or ())
    if missing:
        raise InputError(f"{folder.name}/{TABLE} lacks the columns {', '.join(sorted(missing))}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise InputError(f"{folder.name}/{TABLE} line {number} has more or fewer cells than the head")
    return rows


def read_table_rows(folder: Path) -> list[Row]:
    """Reads a folder's table as rows with their flags.

    Args:
        folder: holds ``split.csv``.

    Returns:
        Rows in table order, flagged ones included.

    Raises:
        InputError: an unusable table, a file named outside its folder, a flag that is neither 0 nor 1, or a file named
            twice.
    """
    root = folder.resolve()
    found = [_row(folder, root, number, row) for number, row in enumerate(read_rows(folder, ("file",)), 2)]
    if len({row.id for row in found}) != len(found):
        raise InputError(f"{folder.name}/{TABLE} names a file twice")
    return found


def _row(folder: Path, root: Path, number: int, row: Mapping[str, str]) -> Row:
    where = f"{folder.name}/{TABLE} line {number}"
    paths = {}
    for key in ("file", "mask"):
        typed = row.get(key) or ""
        path = folder / typed
        if typed and not path.resolve().is_relative_to(root):
            raise InputError(f"{where} names a file outside its folder")
        paths[key] = path if typed else None
    if paths["file"] is None:
        raise InputError(f"{where} names no file")
    flags = {}
    for key in ("near_duplicate", "label_conflict"):
        if (row.get(key) or "0") not in ("0", "1"):
            raise InputError(f"{where}: {key} must be 0 or 1")
        flags[key] = row.get(key) == "1"
    return Row(
        id=f"{folder.name}/{row['file']}",
        path=paths["file"],
        label=row.get("label") or "",
        mask=paths["mask"],
        split=row.get("split") or "",
        group=f"{folder.name}/{row.get('group') or row['file']}",
        source=folder.name,
        columns=dict(row),
        **flags,
    )


def clean(rows: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
    """Leaves out flagged rows.

    Args:
        rows: any rows.

    Returns:
        The others in order, and how many were left out for each flag.
    """
    counts = {
        "near_duplicate": sum(row.near_duplicate for row in rows),
        "label_conflict": sum(row.label_conflict and not row.near_duplicate for row in rows),
    }
    return [row for row in rows if not row.near_duplicate and not row.label_conflict], counts


def spacing_mm(
    row: Mapping[str, str], rows: int, cols: int, *, unusable: Literal["raise", "unknown"]
) -> tuple[float, float] | None:
    """(row, column) spacing of the stored picture; the table's pixel size is that of the original.

    ``pixel_size_mm * orig / stored`` on each axis; a table without the original's size holds originals.

    Args:
        row: the table's columns ``pixel_size_mm``, ``orig_h`` and ``orig_w``.
        rows: rows of the stored picture.
        cols: columns of the stored picture.
        unusable: what a cell that is no number means: an error, or an unknown spacing.

    Returns:
        mm, or None where the table gives no pixel size.

    Raises:
        InputError: a cell is no number and ``unusable`` is ``raise``.
    """
    if not row.get("pixel_size_mm"):
        return None
    try:
        size = float(row["pixel_size_mm"])
        return size * float(row.get("orig_h") or rows) / rows, size * float(row.get("orig_w") or cols) / cols
    except ValueError as error:
        if unusable == "unknown":
            return None
        raise InputError(f"a size in mm or pixels is no number: {error}") from error


def _order(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def split_by_group(rows: Sequence[Row], seed: int, shares: Mapping[str, float] | None = None) -> list[Row]:
    """Deals rows out to splits, whole groups at a time, the same way for a seed whatever the order of the rows.

    Groups come in the order of a seeded hash; each goes to the split that is furthest behind its share of the rows.

    Args:
        rows: any rows; their own splits are ignored.
        seed: of the order.
        shares: split -> share, summing to 1; train 0.7, val 0.15, test 0.15 by default.

    Returns:
        The rows in their order, with their splits.

    Raises:
        InputError: shares that are negative or do not sum to 1.
    """
    wanted = dict(shares or SHARES)
    if min(wanted.values()) < 0 or abs(sum(wanted.values()) - 1) > 1e-6:
        raise InputError(f"shares of splits must be positive and sum to 1, not {wanted}")
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.group] = sizes.get(row.group, 0) + 1
    held = dict.fromkeys(wanted, 0)
    chosen = {}
    for group in sorted(sizes, key=lambda name: _order(name, seed)):
        split = max(wanted, key=lambda name: wanted[name] * len(rows) - held[name])
        chosen[group] = split
        held[split] += sizes[group]
    return [replace(row, split=chosen[row.group]) for row in rows]


def label_share(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """A share of the labelled rows, whole groups at a time, nested: 10 % is inside 25 % is inside all, for one seed.

    Within each label (so that rare classes stay in), groups come in the order of a seeded hash until the share of that
    label's rows is reached; a label keeps at least one group.

    Args:
        rows: labelled rows of one split.
        share: of the rows, in (0, 1].
        seed: of the order.

    Returns:
        The chosen rows in their order.

    Raises:
        InputError: a share outside (0, 1].
    """
    if not 0.0 < share <= 1.0:
        raise InputError(f"a share of labels lies in (0, 1], not {share}")
    by_label: dict[str, dict[str, int]] = {}
    owner: dict[str, str] = {}
    for row in rows:
        # a patient with two labels counts under the one that came first in sorted order
        owner[row.group] = min(owner.get(row.group, row.label), row.label)
    for row in rows:
        groups = by_label.setdefault(owner[row.group], {})
        groups[row.group] = groups.get(row.group, 0) + 1
    chosen: set[str] = set()
    for groups in by_label.values():
        wanted, held = share * sum(groups.values()), 0
        for group in sorted(groups, key=lambda name: _order(name, seed)):
            if held and held >= wanted - 1e-9:
                break
            chosen.add(group)
            held += groups[group]
    return [row for row in rows if row.group in chosen]


__all__ = [
    "MAX_TABLE_BYTES",
    "SHARES",
    "TABLE",
    "Row",
    "clean",
    "label_share",
    "read_rows",
    "read_table_rows",
    "spacing_mm",
    "split_by_group",
]
