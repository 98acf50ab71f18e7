"""A small labelled table made of phantoms, and one thread: small nets are fastest on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.one_thread import one_thread
from tests.tables import phantom_table

SPLITS = {"train": range(500, 524), "val": range(524, 528), "test": range(528, 532)}
"""Split -> phantom seeds."""

__all__ = ["one_thread"]


@pytest.fixture(scope="session")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``split.csv``, 32 phantom images and masks; two images per patient. Do not change it, copy it."""

    def patient(seed: int, split: str) -> dict[str, str]:
        return {"group": f"{split}{(seed - SPLITS[split].start) // 2}"}

    return phantom_table(tmp_path_factory.mktemp("table"), SPLITS, cells=patient)
