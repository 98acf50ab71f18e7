"""Frames of cines without a head, as a folder for ``adapt --negatives``.

``python -m tinyusfm_edge.release.cines CLIPS OUT`` takes frames evenly spread over each cine of ``TAKEN`` and writes
them as PNG files with a ``split.csv``. Cines are few, so their frames stand in the table several times, or with
``--once`` one time each. It does not train.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tinyusfm_edge.data.frames import open_file
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import EdgeError, InputError, OutputError
from tinyusfm_runtime.overlay import encode_png

FRAMES = 30
"""Most frames that are taken of one cine."""
COLUMNS = ("file", "label", "mask", "split", "group", "licence")


@dataclass(frozen=True, slots=True)
class Cine:
    """A cine without a head.

    Attributes:
        file: its name in the folder of clips.
        split: ``train`` or ``val``.
        copies: how often each frame stands in the table.
        licence: of the file.
    """

    file: str
    split: str
    copies: int
    licence: str


_SONOCROP = ("cardiac-0012", "cardiac-0013", "cardiac-0014", "cardiac-0015", "echo-with-borders", "fast")
TAKEN = (
    *(Cine(f"{name}_320.mp4", "train", 2, "Apache-2.0") for name in _SONOCROP),
    Cine("heavy-borders_320.mp4", "val", 1, "Apache-2.0"),
    Cine("clarius-ocular-short.mp4", "train", 2, "Apache-2.0"),
    Cine("sonosite-anon-eye1-video.mp4", "train", 2, "Apache-2.0"),
    Cine("examples_ybr_color.dcm", "train", 8, "MIT"),
)
"""Others of the folder (cardiac-0011, ruq-simple, soft-tissue, low-frame-count) are kept for tests."""


def write_cines(clips: Path, out: Path, taken: Sequence[Cine] = TAKEN) -> int:
    """Writes the frames and their table.

    Args:
        clips: folder of the cines.
        out: folder to write; the table comes last.
        taken: which cines.

    Returns:
        Rows of the table.

    Raises:
        InputError: a cine is missing or cannot be decoded.
        MissingExtra: a library for a kind of file is missing.
        OutputError: no room or no permission.
    """
    rows: list[tuple[str, ...]] = []
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
    for cine in taken:
        if not (clips / cine.file).is_file():
            raise InputError(f"{clips} has no {cine.file}: give the folder that holds the cines")
        with open_file(clips / cine.file) as source:
            frames = [np.array(frame.pixels) for frame in source]
        for index in np.unique(np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)):
            content = encode_png(frames[index])
            for copy in range(cine.copies):
                name = f"images/{Path(cine.file).stem}_{index:03d}_{copy}.png"
                write_file(out / name, content)
                rows.append((name, "other", "", cine.split, Path(cine.file).stem, cine.licence))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([COLUMNS, *rows])
    write_file(out / "split.csv", table.getvalue().encode("utf-8"))
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="frames of cines without a head, for adapt --negatives")
    parser.add_argument("clips", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--once", action="store_true", help="each frame stands in the table one time")
    options = parser.parse_args(argv)
    try:
        taken = [replace(cine, copies=1) for cine in TAKEN] if options.once else TAKEN
        print(f"{write_cines(options.clips, options.out, taken)} rows in {options.out / 'split.csv'}")
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

__all__ = ["COLUMNS", "FRAMES", "TAKEN", "Cine", "write_cines"]
