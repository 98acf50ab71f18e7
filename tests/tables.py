"""Folders of images with a ``split.csv``: the one place where tests write, read and change such tables."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from tinyusfm_runtime.overlay import encode_png
from tinyusfm_runtime.phantom import make_phantom

TABLE = "split.csv"
Row = dict[str, str]


def write_raw(folder: Path, content: str | bytes) -> Path:
    """Puts any text or bytes where the table is looked for, and gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TABLE
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(folder: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Writes a table; the columns are those of the first row. Gives the folder."""
    kept = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / TABLE).open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(kept[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    return folder


def read_rows(folder: Path) -> list[Row]:
    """The rows of a folder's table."""
    with (folder / TABLE).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def change_rows(folder: Path, cells: Callable[[int, Row], Mapping[str, object]]) -> Path:
    """Rewrites a table with other or further cells; ``cells`` gets each row's number and the row."""
    return write_rows(folder, [{**row, **cells(number, row)} for number, row in enumerate(read_rows(folder))])


def phantom_table(
    folder: Path,
    splits: Mapping[str, Iterable[int]],
    *,
    height: int = 120,
    width: int = 160,
    masks: bool = True,
    above: np.ndarray | None = None,
    cells: Callable[[int, str], Mapping[str, object]] = lambda seed, split: {},
) -> Path:
    """Fills a folder with phantoms, their masks and a table.

    The table is like that of HC18: pixel size, sides and circumference are those of an original twice as large. Smaller
    images than the default have pixels of more than 1 mm, which readers take for a mistake.

    Args:
        folder: where to; made if it is missing.
        splits: split -> seeds of its phantoms; a file is named by its seed.
        height: rows of an image.
        width: columns of an image.
        masks: False for a table without masks.
        above: rows that stand above every phantom, such as a banner; then no sizes are written.
        cells: (seed, split) -> cells other than the usual ones, or further ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for split, seeds in splits.items():
        for seed in seeds:
            phantom = make_phantom(seed, height=height, width=width)
            pixels, spacing = phantom.frame.pixels, phantom.frame.spacing_mm
            assert spacing is not None
            (folder / f"{seed}.png").write_bytes(encode_png(pixels if above is None else np.vstack([above, pixels])))
            if masks:
                (folder / f"{seed}_mask.png").write_bytes(encode_png(phantom.mask_HW * np.uint8(255)))
            named: dict[str, object] = {"file": f"{seed}.png", "label": "head"}
            named |= {"mask": f"{seed}_mask.png"} if masks else {}
            named |= {"split": split, "group": str(seed)}
            if above is None:
                named |= {
                    "pixel_size_mm": repr(spacing[1] / 2), "head_circumference_mm": repr(phantom.hc_mm),
                    "orig_w": 2 * width, "orig_h": 2 * height,
                }  # fmt: skip
            rows.append({**named, **cells(seed, split)})
    return write_rows(folder, rows)
