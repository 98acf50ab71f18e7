"""What the commands print with: plain tables, one-line notes, JSON files, a progress bar where there is a terminal.

Standard output carries results, standard error everything else. It does not know any command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from tinyusfm_runtime.errors import InputError, OutputError

Item = TypeVar("Item")


def version() -> str:
    """Version of the installed distribution, or of the checkout."""
    try:
        return metadata.version("tinyusfm-edge")
    except metadata.PackageNotFoundError:
        return "from a checkout"


def say(text: str = "") -> None:
    """Prints a line of result, at once."""
    print(text, flush=True)


def note(text: str) -> None:
    """Prints a line that is not a result."""
    print(text, file=sys.stderr)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, numbers to the right, two spaces between.

    Args:
        header: names of the columns.
        rows: cells.

    Returns:
        Lines joined by newlines.
    """
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) and len(cells) > 1 for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in [lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def track(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a progress bar on standard error if that is a terminal and rich is installed."""
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track as rich_track
        except ImportError:
            pass
        else:
            yield from rich_track(items, label, total=total, console=Console(stderr=True), transient=True)
            return
    yield from items


@contextmanager
def progress() -> Iterator[Callable[[str, float], None]]:
    """Gives a function that is told what is being done and the share that is done.

    A bar on standard error if that is a terminal and rich is installed; nothing otherwise.
    """
    if sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ImportError:
            pass
        else:
            with Progress(console=Console(stderr=True), transient=True) as bar:
                line = bar.add_task("", total=1.0)
                yield lambda what, share: bar.update(line, description=what, completed=share)
            return
    yield lambda what, share: None


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
        say(text)
    else:
        write_file(location, (text + "\n").encode(), what)


def write_file(location: str | Path, content: bytes, what: str) -> None:
    """Writes a file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    from tinyusfm_runtime.sinks import PendingFile

    pending = PendingFile(location, what)
    try:
        pending.path.write_bytes(content)
    except OSError as error:
        raise pending.failed(error) from error
    pending.publish()


def check_writable(place: Path, what: str) -> None:
    """Looks whether something could be written there, before slow work starts; the writing itself may still fail.

    Args:
        place: what is to be written.
        what: what it is, for messages.

    Raises:
        OutputError: a file is in the way, or the nearest folder that exists may not be written to.
    """
    nearest = next(folder for folder in place.absolute().parents if os.path.lexists(folder))
    if not nearest.is_dir():
        raise OutputError(f"cannot write {what}: a part of its path is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write {what}: no permission in its folder")


def numbers(text: str, count: int, what: str) -> tuple[float, ...]:
    """Reads comma-separated numbers.

    Args:
        text: what was typed.
        count: how many there must be.
        what: name of the option and an example, for the message.

    Raises:
        InputError: others, or another count.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != count:
        raise InputError(f"{what}: {count} numbers with commas between them, not {text!r}")
    return values


def crop(text: str | None) -> tuple[int, int, int, int] | str | None:
    """Reads ``--crop``: ROW,COL,HEIGHT,WIDTH in pixels, ``region``, or nothing.

    Raises:
        InputError: something else.
    """
    if text is None or text == "region":
        return text
    row, col, height, width = numbers(text, 4, "--crop ROW,COL,HEIGHT,WIDTH or region")
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
