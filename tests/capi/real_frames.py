"""Real frames for the comparison of both runtimes: heads as they are stored, and every n-th frame of real cines."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from tests.capi.binding import Frame as GivenFrame
from tests.capi.binding import Library
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.images.decode import read_image
from tinyusfm_runtime.sources import open_source

CLIPS = (
    "cardiac-0011_320.mp4", "lung_320.mp4", "sonosite-anon-eye1-video.mp4", "US1_J2KR.dcm", "examples_ybr_color.dcm",
    "BoneUltrasound_L14.igs.mha",
)  # fmt: skip
STEP = 7
"""Every n-th frame of a cine is taken."""


def real_frames(shared: Path, heads: int, from_each_clip: int) -> Iterator[Frame]:
    """Heads of HC18 with their spacing, then frames of cines.

    Args:
        shared: the folder of shared data.
        heads: how many of the heads.
        from_each_clip: how many of each cine at most.
    """
    with (shared / "data" / "hc18" / "split.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    for number, row in enumerate(rows[:: max(1, len(rows) // heads)][:heads]):
        image = read_image((shared / "data" / "hc18" / row["file"]).read_bytes())
        grey = np.ascontiguousarray(image.pixels if image.pixels.ndim == 2 else image.pixels[:, :, 0])
        mm = float(row["pixel_size_mm"])
        yield Frame(pixels=grey, spacing_mm=(mm, mm), seq=number)
    for number, name in enumerate(CLIPS):
        path = shared / "data" / "clips" / name
        if not path.exists():
            continue
        with open_source(str(path)) as source:
            for frame in islice(source, 0, STEP * from_each_clip, STEP):
                yield replace(frame, seq=1000 * (number + 1) + frame.seq)


def given(library: Library, frame: Frame) -> GivenFrame:
    """The same frame for the C library, read in place where its pixels lie next to one another."""
    pixels = frame.pixels
    inner = (1,) if pixels.ndim == 2 else (pixels.shape[2], 1)
    if pixels.strides[1:] != inner:
        pixels = np.ascontiguousarray(pixels)
    fields = {} if frame.spacing_mm is None else dict(
        zip(("spacing_row_mm", "spacing_column_mm"), frame.spacing_mm, strict=True)
    )  # fmt: skip
    kind = PixelFormat(frame.pixel_format).value
    limited = frame.video_range is VideoRange.LIMITED
    return library.frame(pixels, kind, seq=frame.seq, limited_range=limited, **fields)
