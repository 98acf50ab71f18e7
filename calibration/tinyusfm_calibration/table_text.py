"""The text of a table as people save it.

Encoding, separator, names of columns, cells.

Spreadsheets write UTF-8 with and without a byte order mark, UTF-16, the code page of their country, commas, semicolons
and tabs. All of it is read; what had to be guessed is a note. Among code pages the one counts under which the named
files exist. It knows neither splits nor masks.
"""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyusfm_runtime.errors import InputError

MAX_TABLE_BYTES = 1 << 30
"""A table of 2.2 million rows has about 300 MB."""
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
"""What may stand between cells, and its name."""
CODE_PAGES = ("cp1252", "cp1250", "cp1251", "mac_roman", "cp850", "gb18030", "shift_jis", "euc_kr", "latin-1")
"""Tried in this order on text that is not UTF-8; the first is that of western Windows."""
_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
KNOWN_NAMES = {
    "file": ("image", "filename", "file_name", "path", "image_path", "img", "image", "frame", "image_file"),
    "mask": ("annotation", "segmentation", "mask_path", "seg", "mask_file", "ground_truth", "gt", "label_path"),
    "label": ("class", "classname", "class_name", "category", "diagnosis", "target"),
    "split": ("fold", "set", "subset", "partition", "phase", "usage"),
    "group": ("patient", "patient_id", "subject", "subject_id", "case", "case_id", "study", "pid"),
    "pixel_size_mm": ("pixel_size", "spacing", "spacing_mm", "pixel_size(mm)", "mm_per_pixel"),
}
"""Names that other tables give the columns; suggested in messages, never taken unasked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableText:
    """A table's cells as text.

    Attributes:
        columns: names in order, lower case.
        rows: line number in the file (from 1), and the cells by column, blanks around them taken off.
        encoding: how the bytes were read.
        separator: what stands between cells.
        notes: what was guessed, one line each.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[int, Mapping[str, str]], ...]
    encoding: str
    separator: str
    notes: tuple[str, ...] = ()


def read_text(
    path: Path, exists: Callable[[str], bool] = lambda name: False, columns: Mapping[str, str] | None = None
) -> TableText:
    """Reads a table.

    Args:
        path: the file.
        exists: whether a named file is there; decides between code pages.
        columns: ours -> theirs, for a table with other names of columns.

    Raises:
        InputError: not readable, too large, no head, a column named twice, or a row longer or shorter than the head.
    """
    raw = _read(path)
    texts = _decodings(path, raw)
    encoding, first = texts[0]
    best, notes = _parse(path, first, columns or {}), []
    if len(texts) > 1:
        # one after the other: nine readings of a large table would not fit
        hits = least = _hits(best, exists)
        for name, text in texts[1:]:
            found = _parse(path, text, columns or {})
            here, least = _hits(found, exists), min(least, _hits(found, exists))
            if here > hits:
                best, encoding, hits = found, name, here
        sure = hits > least
        why = "the named files exist so" if sure else "a guess: save it as UTF-8"
        notes.append(f"{path.name} is not UTF-8, read as {encoding} ({why})")
    return TableText(
        columns=best.columns, rows=best.rows, encoding=encoding, separator=best.separator, notes=tuple(notes)
    )


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_TABLE_BYTES:
            raise InputError(f"{path.name} has {size} bytes: that is no table of frames")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _decodings(path: Path, raw: bytes) -> list[tuple[str, str]]:
    """(encoding, text) of every reading that fits.

    Only one where the bytes say it themselves.
    """
    if raw[:4] == b"PK\x03\x04" or raw[:8] == b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1":
        raise InputError(f"{path.name} is a spreadsheet's own file: save it as CSV (UTF-8)")
    named = next((encoding for mark, encoding in _MARKS.items() if raw.startswith(mark)), None)
    if named is None and raw[:2000].count(0) > len(raw[:2000]) // 4:
        named = "utf-16-le" if raw[1:2] == b"\0" else "utf-16-be"
    found = []
    for encoding in (named,) if named else ("utf-8",):
        try:
            return [(encoding, raw.decode(encoding))]
        except UnicodeDecodeError as error:
            if named:
                raise InputError(f"{path.name} begins as {named} and is not: save it as CSV (UTF-8)") from error
    for encoding in CODE_PAGES:
        try:
            found.append((encoding, raw.decode(encoding)))
        except UnicodeDecodeError:
            continue
    return found


def _hits(text: TableText, exists: Callable[[str], bool]) -> int:
    """How many of the named files with unusual letters are there.

    At most 200 are looked for.
    """
    named = [row.get("file", "") for _, row in text.rows]
    return sum(exists(name) for name in [name for name in named if not name.isascii()][:200])


def _parse(path: Path, text: str, columns: Mapping[str, str]) -> TableText:
    skipped = 0
    first = text.partition("\n")[0].strip()
    if first.lower().startswith("sep=") and len(first) == 5:
        text, skipped = text.partition("\n")[2], 1
    separator = first[4] if skipped else _separator(text)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        lines = [(reader.line_num + skipped, cells) for cells in reader]
    except csv.Error as error:
        raise InputError(f"{path.name} is no table: {error}") from error
    lines = [(number, [_clean(cell) for cell in cells]) for number, cells in lines]
    lines = [(number, cells) for number, cells in lines if any(cells)]
    comments = 0
    # a line of words in front of the head, as some programs write it
    while len(lines) > 1 and lines[0][1][0].startswith("#") and sum(map(bool, lines[0][1])) < 2:
        lines, comments = lines[1:], comments + 1
    if not lines:
        raise InputError(f"{path.name} is empty: its first line names the columns file,label,mask,split,group,...")
    head = _head(path, lines[0][1], columns)
    rows = tuple((number, _row(path, head, number, cells)) for number, cells in lines[1:])
    return TableText(columns=tuple(filter(None, head)), rows=rows, encoding="", separator=SEPARATORS[separator])


def _separator(text: str) -> str:
    """The separator that parts the head into most cells."""
    head = next((line for line in text.splitlines() if any(mark in line for mark in SEPARATORS)), "")
    return max(SEPARATORS, key=head.count)


def _clean(cell: str) -> str:
    """A cell without blanks, hard blanks and marks around it."""
    return cell.strip().strip("\ufeff\u200b\u00a0\0 ").strip()


def _head(path: Path, cells: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    theirs = {_name(there): ours for ours, there in columns.items()}
    head = [_name(cell) for cell in cells]
    if unknown := sorted(set(theirs) - set(head)):
        raise InputError(f"{path.name} has no column {unknown[0]!r}; it has {', '.join(filter(None, head))}")
    # a column that gives its name to another loses it
    head = [theirs.get(name, f"{name} (own)" if name in columns and name not in theirs else name) for name in head]
    twice = sorted({name for name in head if name and head.count(name) > 1})
    if twice:
        raise InputError(f"{path.name} names the column {twice[0]!r} twice: leave one")
    return head


def _name(cell: str) -> str:
    return "_".join(unicodedata.normalize("NFC", cell).lower().lstrip("#").split())


def _row(path: Path, head: Sequence[str], number: int, cells: Sequence[str]) -> dict[str, str]:
    spare = cells[len(head) :]
    if len(cells) < len(head) or any(spare):
        more = "more" if len(cells) > len(head) else "fewer"
        raise InputError(f"{path.name} line {number} has {more} cells ({len(cells)}) than the head ({len(head)})")
    # pandas writes the numbers of the rows in front, without a name
    unnamed = [cell for name, cell in list(zip(head, cells, strict=False))[not head[0] :] if not name and cell]
    if unnamed:
        raise InputError(f"{path.name} line {number} has a cell under a column without a name")
    return {name: cell for name, cell in zip(head, cells, strict=False) if name}


def missing_columns(path: Path, columns: Sequence[str], missing: Sequence[str]) -> InputError:
    """The error for a table without columns that are needed.

    What is missing, what is there, and how to mend it.

    Args:
        path: the table.
        columns: those it has.
        missing: those it lacks.
    """
    pairs = {ours: next((name for name in KNOWN_NAMES.get(ours, ()) if name in columns), "...") for ours in missing}
    option = ",".join(f"{ours}={theirs}" for ours, theirs in pairs.items())
    return InputError(
        f"{path.parent.name}/{path.name} lacks the columns {', '.join(sorted(missing))}; "
        f"it has {', '.join(columns) or 'none'}: rename them, or give --columns {option}"
    )


def number(text: str) -> float:
    """A number as tables hold it: decimal point or comma, ``mm`` behind it allowed.

    Raises:
        InputError: no number, not finite, or a point and a comma in one.
    """
    plain = text.strip().removesuffix("mm").strip()
    if "," in plain:
        if "." in plain or plain.count(",") > 1:
            raise InputError(f"{text!r} is no number: leave the separator of thousands out")
        plain = plain.replace(",", ".")
    try:
        value = float(plain)
    except ValueError as error:
        raise InputError(f"{text!r} is no number") from error
    if value != value or value in (float("inf"), float("-inf")) or "_" in plain:
        raise InputError(f"{text!r} is no number that can be used")
    return value


__all__ = [
    "CODE_PAGES",
    "KNOWN_NAMES",
    "MAX_TABLE_BYTES",
    "SEPARATORS",
    "TableText",
    "missing_columns",
    "number",
    "read_text",
]
