"""A small labelled table made of phantoms, and one thread: small nets are fastest on it."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import pytest

from tests.one_thread import one_thread
from tinyusfm_runtime.phantom import make_phantom

COLUMNS = ("file", "label", "mask", "split", "group", "pixel_size_mm", "head_circumference_mm", "orig_w", "orig_h")
SPLITS = {"train": 24, "val": 4, "test": 4}

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``split.csv``, 32 phantom pictures and masks; two pictures a patient. Do not change it, copy it."""
    folder = tmp_path_factory.mktemp("table")
    rows, seed = [], 500
    for split, count in SPLITS.items():
        for index in range(count):
            phantom = make_phantom(seed, height=96, width=128)
            cv2.imwrite(str(folder / f"{seed}.png"), phantom.frame.pixels)
            cv2.imwrite(str(folder / f"{seed}_mask.png"), phantom.mask_HW * 255)
            assert phantom.frame.spacing_mm is not None
            size = phantom.frame.spacing_mm[1] / 2  # the table speaks of an original twice as wide
            names = (f"{seed}.png", "head", f"{seed}_mask.png", split, f"{split}{index // 2}")
            rows.append((*names, repr(size), repr(phantom.hc_mm), "256", "192"))
            seed += 1
    with (folder / "split.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return folder
