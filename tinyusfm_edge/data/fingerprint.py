"""One hash for a set of images.

Of the bytes of its files, whatever they are called and in whatever order they come.

It does not decode anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from tinyusfm_calibration.tables import Row
from tinyusfm_edge.data.frames import file_sha256
from tinyusfm_edge.data.images import list_rows
from tinyusfm_edge.data.reading import AS_IT_IS, Reading


def images_sha256(places: Sequence[Path], splits: Sequence[str] = ("train",), reading: Reading = AS_IT_IS) -> str:
    """Hash of the images of folders or of a coreset.

    Args:
        places: as ``list_rows`` takes them.
        splits: taken from tables.
        reading: how the tables are read.

    Raises:
        InputError: nothing usable there, or a file cannot be read.
    """
    return rows_sha256(list_rows(places, splits, reading).rows)


def rows_sha256(rows: Iterable[Row]) -> str:
    """Hash of the images that rows name.

    It is sha256 over the sorted sha256 (hex) of the files, a line feed after each.

    Raises:
        InputError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for line in sorted({row.path: file_sha256(row) for row in rows}.values()):
        digest.update(f"{line}\n".encode("ascii"))
    return digest.hexdigest()


__all__ = ["images_sha256", "rows_sha256"]
