"""The one table of images, ``split.csv`` (file,label,mask,split,group,...).

Rows, spacing, flags, seeded splits.

Everything that reads a data folder reads it here: calibration, training, evaluation. A row names its image, and
may name a mask, a label, a split, a patient (``group``), the pixel size of the original and two flags:
``near_duplicate`` and ``label_conflict``. What people write differently (splits in capitals, semicolons, code pages,
backslashes) is understood by table_text.py and table_paths.py. It does not decode anything and does not know torch or
OpenCV.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tinyusfm_calibration.table_paths import FileFinder
from tinyusfm_calibration.table_text import MAX_TABLE_BYTES, TableText, missing_columns, number, read_text
from tinyusfm_runtime.errors import InputError

TABLE = "split.csv"
"""Name of the table in a data folder."""
SPLITS = ("train", "val", "test")
"""Splits as they are called here."""
SPLIT_WORDS = {
    "train": frozenset({"train", "training", "trn", "tr"}),
    "val": frozenset({"val", "valid", "validation", "validate", "dev", "development", "tune", "tuning", "va", "vl"}),
    "test": frozenset({"test", "testing", "tst", "te", "ts", "holdout", "heldout"}),
}
"""What people call them; case, blanks and a word ``set`` behind are left out of account."""
NOTHING = frozenset({"", "nan", "none", "null", "n/a", "na", "-"})
"""Cells of the column mask that name no mask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a table.

    Attributes:
        id: ``FOLDER/FILE``, unique over several folders; ``FOLDER/FILE#N`` for frame N of a cine or video.
        path: the image, cine or video.
        label: class name, or empty.
        mask: mask image, or None.
        split: ``train``, ``val``, ``test``, empty, or what else the table says.
        group: ``FOLDER/GROUP``: patient or examination; the file itself where the table names none.
        source: the folder's name.
        near_duplicate: another row shows nearly the same image, and this one is the spare.
        label_conflict: the same image stands in the table under two labels.
        columns: every column as text; ``file`` and ``mask`` as the folder spells them.
        frame: number of the frame of a cine or video that is meant, or None.
        line: of the table, from 1; 0 without one.
        respelt: the folder spells the file otherwise than the table.
        place: where a file without a table stands, such as ``hc: file 3 of 12``, for messages.
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
    frame: int | None = None
    line: int = 0
    respelt: bool = False
    place: str = ""

    @property
    def name(self) -> str:
        """A name for logs: the first 12 hex digits of the id's sha256.

        File names may name patients.
        """
        return hashlib.sha256(self.id.encode()).hexdigest()[:12]

    @property
    def where(self) -> str:
        """Where it stands, for messages: table and line, else the place in its folder.

        No file name.
        """
        return f"{self.source}/{TABLE} line {self.line}" if self.line else self.place or f"{self.source}/{self.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TableOptions:
    """How a table is read where it is not written as ours are.

    Attributes:
        columns: ours -> theirs, for other names of columns.
        follow_links: links inside the folder may lead out of it.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    follow_links: bool = False


def find_table(folder: Path) -> Path | None:
    """The table of a folder: ``split.csv`` in whatever case, or None.

    Raises:
        InputError: two of them.
    """
    plain = folder / TABLE
    if plain.is_file():
        return plain
    try:
        found = [path for path in folder.iterdir() if path.name.lower() in (TABLE, "split.tsv", "split.txt")]
    except OSError:
        return None
    if len(found) > 1:
        raise InputError(f"{folder.name} has {' and '.join(sorted(path.name for path in found))}: leave one, {TABLE}")
    return found[0] if found else None


def need_table(folder: Path) -> Path:
    """The table of a folder.

    Raises:
        InputError: why there is none: no such folder, a file, a table of another name, a table further down or up.
    """
    if not folder.exists():
        raise InputError(f"{folder} does not exist: give a folder with a {TABLE}")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: give the folder that holds {TABLE}")
    if (table := find_table(folder)) is not None:
        return table
    raise InputError(f"{folder} has no {TABLE}{_clue(folder)}")


def _clue(folder: Path) -> str:
    """What a folder without a table holds instead."""
    try:
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        return f" that can be read: {error.strerror}"
    tables = [n for n in names if n.lower().endswith((".csv", ".tsv", ".xlsx", ".xls", ".ods", ".parquet"))]
    if tables:
        return f"; it holds {', '.join(tables[:3])}: save the table as {TABLE}, columns file,label,mask,split,group"
    below = sorted(path.parent.name for path in folder.glob(f"*/{TABLE}"))
    if below:
        return f", but {', '.join(f'{folder.name}/{name}' for name in below[:3])} has one: give that folder"
    if (folder.parent / TABLE).is_file():
        return f", but the folder above it, {folder.parent.name or folder.parent}, has one: give that folder"
    return ": write a table with the columns file,label,mask,split,group,... (one line per image)"


def read_table_text(folder: Path, required: Iterable[str], options: TableOptions | None = None) -> TableText:
    """Reads a folder's table as text, with the columns that are needed.

    Args:
        folder: holds ``split.csv``.
        required: columns that must be there.
        options: how it is read.

    Raises:
        InputError: no table, not readable, or a column missing.
    """
    chosen = options or TableOptions()
    path = need_table(folder)
    finder = FileFinder(folder, follow_links=chosen.follow_links)
    found = read_text(path, finder.exists, chosen.columns)
    missing = [name for name in required if name not in found.columns]
    if missing:
        raise missing_columns(path, found.columns, missing)
    return found


def read_table_rows(
    folder: Path, required: Iterable[str] = ("file",), options: TableOptions | None = None
) -> list[Row]:
    """Reads a folder's table as rows with their flags.

    Args:
        folder: holds ``split.csv``.
        required: columns that must be there.
        options: how it is read.

    Returns:
        Rows in table order, flagged ones included.

    Raises:
        InputError: an unusable table, a file named outside its folder, a flag that is neither 0 nor 1, or a file named
            twice.
    """
    chosen = options or TableOptions()
    text = read_table_text(folder, {"file", *required}, chosen)
    finder = FileFinder(folder, follow_links=chosen.follow_links)
    found = [_row(folder, finder, line, cells) for line, cells in text.rows]
    first: dict[str, int] = {}
    for row in found:
        if row.id in first:
            raise InputError(f"{row.where} names the file of line {first[row.id]} again: leave one")
        first[row.id] = row.line
    return found


def _row(folder: Path, finder: FileFinder, line: int, cells: Mapping[str, str]) -> Row:
    source = folder_name(folder)
    where = f"{source}/{TABLE} line {line}"
    if not cells["file"]:
        raise InputError(f"{where} names no file")
    file = finder.find(cells["file"], where)
    typed = cells.get("mask") or ""
    mask = None if typed.lower() in NOTHING else finder.find(typed, where)
    named = {**cells, "file": file.inside, "mask": "" if mask is None else mask.inside}
    split = canonical_split(cells.get("split") or "")
    return Row(
        id=f"{source}/{file.inside}",
        path=file.path,
        label="" if (cells.get("label") or "").casefold() == "nan" else cells.get("label") or "",
        mask=None if mask is None else mask.path,
        split=split,
        group=f"{source}/{_named_group(cells) or file.inside}",
        source=source,
        columns={**named, "split": split} if "split" in cells else named,
        frame=file.frame,
        line=line,
        respelt=file.respelt,
        near_duplicate=read_flag(cells.get("near_duplicate") or "0", f"{where}: near_duplicate"),
        label_conflict=read_flag(cells.get("label_conflict") or "0", f"{where}: label_conflict"),
    )


def _named_group(cells: Mapping[str, str]) -> str:
    """The patient that a row names; spreadsheets write ``nan`` where there is none."""
    typed = cells.get("group") or ""
    return "" if typed.casefold() in NOTHING else typed


def folder_name(folder: Path) -> str:
    """A folder's own name, for ``.`` and ``..`` as well."""
    return folder.name if folder.name not in ("", "..") else folder.resolve().name


def canonical_split(typed: str) -> str:
    """``train``, ``val`` or ``test`` for what people call them.

    Anything else as it is.
    """
    word = re.sub(r"(ing)?[\s_-]*(set|split|data)$", r"\1", typed.strip().casefold())
    word = re.sub(r"[\s_.-]", "", word)
    return next((split for split, words in SPLIT_WORDS.items() if word in words), typed.strip())


def read_flag(typed: str, what: str) -> bool:
    """A flag of a table.

    Raises:
        InputError: neither yes nor no.
    """
    word = typed.strip().casefold()
    if word in ("1", "1.0", "true", "yes", "y"):
        return True
    if word in ("", "0", "0.0", "false", "no", "n"):
        return False
    raise InputError(f"{what} must be 0 or 1, not {typed!r}")


def unused(rows: Sequence[Row], need: Literal["mask", "label"] | None = None) -> dict[str, int]:
    """Rows that no split takes, by why.

    Of those that one takes, the ones that lack what is needed.

    Args:
        rows: of a table, flagged ones left out.
        need: what a row must have to be used.
    """
    found: Counter[str] = Counter()
    for row in rows:
        if not row.split:
            found["no split is given"] += 1
        elif row.split not in SPLITS:
            found[f"split is {row.split!r}"] += 1
        elif need == "mask" and row.mask is None or need == "label" and not row.label:
            found[f"{row.split} without a {need}"] += 1
    return dict(found)


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


def spacing_mm(row: Mapping[str, str], rows: int, cols: int) -> tuple[float, float] | None:
    """(row, column) spacing of the stored image.

    The table's pixel size is that of the original.

    ``pixel_size_mm * orig / stored`` on each axis; a table without the original's size holds originals.

    Args:
        row: the table's columns ``pixel_size_mm``, ``orig_h`` and ``orig_w``.
        rows: rows of the stored image.
        cols: columns of the stored image.

    Returns:
        mm, or None where the table gives no pixel size.

    Raises:
        InputError: a cell is no number, or not above 0.
    """
    if not row.get("pixel_size_mm"):
        return None
    sizes = {"pixel_size_mm": row["pixel_size_mm"], "orig_h": row.get("orig_h"), "orig_w": row.get("orig_w")}
    found = {}
    for name, typed in sizes.items():
        try:
            found[name] = number(typed) if typed else float(rows if name == "orig_h" else cols)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if found[name] <= 0:
            raise InputError(f"{name}: {typed!r} is not above 0")
    size = found["pixel_size_mm"]
    return size * found["orig_h"] / rows, size * found["orig_w"] / cols


def _order(text: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()


def label_share(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """A share of the labelled rows, whole groups at a time, nested.

    For one seed, 10 % is inside 25 % is inside all.

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
    "NOTHING",
    "SPLITS",
    "SPLIT_WORDS",
    "TABLE",
    "Row",
    "TableOptions",
    "canonical_split",
    "clean",
    "find_table",
    "folder_name",
    "label_share",
    "need_table",
    "number",
    "read_flag",
    "read_table_rows",
    "read_table_text",
    "spacing_mm",
    "unused",
]
