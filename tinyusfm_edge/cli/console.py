"""What the commands print with.

Plain tables that fit the terminal, one-line notes, JSON files.

Standard output carries results, standard error everything else. ``voice`` says how much is said; progress.py shows what
takes long. It does not know any command.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, TextIO

import typer

from tinyusfm_edge.cli.progress import Item as Item
from tinyusfm_edge.cli.progress import progress as progress
from tinyusfm_edge.cli.progress import track as track
from tinyusfm_edge.cli.voice import voice as voice
from tinyusfm_edge.data.reading import numbers
from tinyusfm_runtime.atomic import check_writable as check_writable
from tinyusfm_runtime.errors import InputError

COLUMN_GAP = "  "
LEAST_COLUMN = 8
"""Letters below which a column is not narrowed."""
_GOOD, _BAD, _DOUBT = "32", "31", "33"
_COLOURED = (
    (re.compile(r"\b(passed|holds|verified)\b"), _GOOD),
    (re.compile(r"\b(MISSED|FAILED|BROKEN|UNVERIFIED|DRIFTED|MEND|WORSE|missed|error(?=:))\b"), _BAD),
    (re.compile(r"\b(warning(?=:)|doubt\w*)\b"), _DOUBT),
)
MOST = 2**31 - 1
"""Largest count that an option takes."""
INCOMPLETE = 4
"""Exit code: done, with incomplete or doubtful input; results are kept."""
FIRST_WORD_S, NEXT_WORD_S = 2.0, 5.0
"""When opening a bundle says for the first time how far it is, and how often then, s."""


def version() -> str:
    """Version of the installed distribution, or of the checkout."""
    try:
        return metadata.version("tinyusfm-edge")
    except metadata.PackageNotFoundError:
        return "from a checkout"


def say(text: str = "") -> None:
    """Prints a line of result, at once."""
    stream = sys.stderr if voice.results_aside else sys.stdout
    print(_coloured(text, stream), file=stream, flush=True)


def say_json(text: str) -> None:
    """Prints JSON on standard output, whatever else is printed."""
    print(text, flush=True)


def note(text: str) -> None:
    """Prints a line that is not a result; with ``-q`` only errors and warnings."""
    if not voice.quiet or text.startswith(("error:", "warning:")):
        print(_coloured(text, sys.stderr), file=sys.stderr)


def show_log(name: str) -> None:
    """Prints what a logger says, once each, as notes.

    Args:
        name: of the logger.
    """
    logger = logging.getLogger(name)
    logger.handlers = [_Notes()]
    logger.setLevel(logging.INFO)


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a line that was not printed before."""
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            note(f"note: {text}")


def notes(lines: Iterable[str]) -> None:
    """Prints what a user should know, one note per line."""
    for line in lines:
        note(f"note: {line}")


def next_step(*words: object, indent: int = 13) -> None:
    """Prints the command to type next, as it is typed.

    Args:
        *words: behind ``tinyusfm-edge``; each is quoted where a shell needs it.
        indent: width of the labels above it.
    """
    import shlex

    if not voice.quiet:
        say(f"{'next':<{indent}}tinyusfm-edge {' '.join(shlex.quote(str(word)) for word in words)}")


def has_colour(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours.

    ``NO_COLOR`` (no-color.org) switches them off.
    """
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def _coloured(text: str, stream: TextIO) -> str:
    if not has_colour(stream):
        return text
    for pattern, code in _COLOURED:
        text = pattern.sub(lambda found, code=code: f"\x1b[{code}m{found.group(0)}\x1b[0m", text)  # type: ignore[misc]
    return text


def width() -> int | None:
    """Columns that a line may have: those of the terminal or of ``COLUMNS``.

    None where neither is known.
    """
    if os.environ.get("COLUMNS", "").isdigit() or sys.stdout.isatty():
        return shutil.get_terminal_size().columns
    return None


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, columns: int | None = None) -> str:
    """Aligned columns, numbers to the right, two spaces between.

    Long cells are broken where the terminal ends.

    Args:
        header: names of the columns.
        rows: cells.
        columns: letters that a line may have; None takes those of the terminal.

    Returns:
        Lines joined by newlines.
    """
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) and len(cells) > 1 for i in range(len(header))]
    widths = _narrowed(cells, numeric, columns if columns is not None else width())
    shown = [cells[0], ["-" * wide for wide in widths], *cells[1:]]
    return "\n".join(line for row in shown for line in _lines_of(row, widths, numeric))


def _narrowed(cells: Sequence[Sequence[str]], numeric: Sequence[bool], most: int | None) -> list[int]:
    """Widths of the columns.

    As wide as their cells, the widest ones of words narrower until a line fits.
    """
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    if most is None:
        return widths
    least = [w if right else min(w, LEAST_COLUMN) for w, right in zip(widths, numeric, strict=True)]
    while sum(widths) + len(COLUMN_GAP) * (len(widths) - 1) > most:
        slack = [wide - floor for wide, floor in zip(widths, least, strict=True)]
        if max(slack) <= 0:
            break
        index = max((i for i, free in enumerate(slack) if free > 0), key=lambda i: widths[i])
        widths[index] -= 1
    return widths


def _lines_of(row: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> list[str]:
    """One row as lines; a cell that is too long goes on in the next one."""
    parts = [
        [cell] if len(cell) <= wide else textwrap.wrap(cell, wide, break_on_hyphens=False) or [""]
        for cell, wide in zip(row, widths, strict=True)
    ]
    lines = []
    for number in range(max(len(part) for part in parts)):
        texts = [part[number] if number < len(part) else "" for part in parts]
        padded = (t.rjust(w) if right else t.ljust(w) for t, w, right in zip(texts, widths, numeric, strict=True))
        lines.append(COLUMN_GAP.join(padded).rstrip())
    return lines


def end_with_doubts() -> NoReturn:
    """Ends a command that is done although its input was doubtful.

    Raises:
        typer.Exit: with INCOMPLETE.
    """
    note(f"note: the results are kept; the exit code is {INCOMPLETE} because of the doubts above")
    raise typer.Exit(INCOMPLETE)


class Opening:
    """Says how far the check of a bundle on a new machine is.

    A line now and then, where that takes long.

    Args:
        clock: seconds, rising; for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next_s = clock() + FIRST_WORD_S

    def __call__(self, what: str, share: float) -> None:
        """Takes what is done and its share, as ``Session.open(progress=)`` gives it."""
        if self._clock() >= self._next_s and share < 1.0:
            self._next_s = self._clock() + NEXT_WORD_S
            note(f"note: {what}: {share:.0%} of the golden frames, once for this machine")


def write_json(location: str, data: Any, what: str) -> None:
    """Writes JSON to a file, whole or not at all; ``-`` is standard output.

    Args:
        location: path or ``-``.
        data: plain data.
        what: what it is, for messages.

    Raises:
        OutputError: it cannot be written.
    """
    text = json.dumps(data, indent=1, sort_keys=True)
    if location == "-":
        say_json(text)
    else:
        write_file(location, (text + "\n").encode(), what)


def write_file(location: str | Path, content: bytes, what: str) -> None:
    """Writes a file, whole or not at all; a pipe or a device is written through.

    Raises:
        OutputError: it cannot be written.
    """
    from tinyusfm_runtime import atomic

    atomic.write_file(location, content, what)


def crop(text: str | None) -> tuple[int, int, int, int] | str | None:
    """Reads ``--crop``: ROW,COL,HEIGHT,WIDTH in pixels, ``region``, or nothing.

    Raises:
        InputError: something else.
    """
    if text is None or text == "region":
        return text
    words = "--crop ROW,COL,HEIGHT,WIDTH in whole pixels, or region"
    row, col, height, width = numbers(text, 4, words)
    if any(value != int(value) or abs(value) > 1e6 for value in (row, col, height, width)):
        raise InputError(f"{words}: not {text!r}")
    return int(row), int(col), int(height), int(width)


def _is_number(cell: str) -> bool:
    stripped = cell.strip().rstrip("%").replace(" MB", "").replace(" ms", "")
    if stripped in ("", "-"):
        return True
    try:
        float(stripped)
    except ValueError:
        return False
    return True
