"""Teacher format feature bank: features of a bank's views from elsewhere.

Any foreign model computed them, in its own environment.

``tinyusfm-edge bank`` writes a folder with ``bank.json`` and the very images a student will be shown
(``images-VIEW.npy``, uint8, one per view). Whoever owns the teacher (OpenUS with its CUDA scans, say) adds
``features-VIEW-N.npy`` for stages N = 1, 2, ...: float16 or float32, one row per image, ``E x h x w x D`` on any square
grid, each stage with its own width. Everything is memory-mapped and never unpickled. A bank answers for its own views
only: it cannot be shown another image.

It does not know training. Shapes: E entries, hw grid, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tinyusfm_runtime.errors import CheckpointError, InputError
from tinyusfm_runtime.strict_json import parse_json

VARIANTS = {"feature_bank": None}
"""Name -> nothing: the folder says the rest."""
BANK_VERSION = 1
"""Version of ``bank.json``."""


class FeatureBankTeacher:
    """A folder of features, as far as a teacher can be one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.note = read_note(folder)
        self.entries = int(self.note["entries"])
        self.depth = self._count()
        self.stages = {
            (view, stage): self._open(view, stage) for view in self.note["views"] for stage in range(1, self.depth + 1)
        }
        self.widths = tuple(int(self.stages[self.note["views"][0], s].shape[-1]) for s in range(1, self.depth + 1))
        self.width, self.patch = self.widths[-1], 16

    def _count(self) -> int:
        found = 0
        while (self.folder / f"features-{self.note['views'][0]}-{found + 1}.npy").is_file():
            found += 1
        if not found:
            raise CheckpointError(
                f"{self.folder} holds no features yet: run the teacher on images-VIEW.npy and save its maps as "
                f"features-{self.note['views'][0]}-1.npy and so on"
            )
        return found

    def _open(self, view: str, stage: int) -> np.ndarray:
        path = self.folder / f"features-{view}-{stage}.npy"
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be mapped: {error}") from error
        square = found.ndim == 4 and found.shape[1] == found.shape[2]
        if not square or found.dtype not in (np.float16, np.float32) or len(found) != self.entries:
            raise CheckpointError(
                f"{path} is {found.dtype} {found.shape}; wanted float16 or float32, {self.entries} x h x h x D"
            )
        return found

    def tokens(self, image_NCHW: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """A bank has no network.

        Raises:
            InputError: always.
        """
        raise InputError("a feature bank answers for its own views only: set the variants it was written with")


def read_note(folder: Path) -> dict[str, Any]:
    """Reads a bank's description.

    Args:
        folder: written by ``tinyusfm-edge bank``.

    Returns:
        Plain data: version, views, entries, variants, seed, pool, size and view settings.

    Raises:
        CheckpointError: no bank, or one of another version.
    """
    try:
        note = parse_json((folder / "bank.json").read_text(encoding="utf-8"))
        good = note["version"] == BANK_VERSION and note["views"] and note["entries"] > 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no feature bank: write one with tinyusfm-edge bank") from error
    if not good:
        raise CheckpointError(f"{folder} is a feature bank of version {note['version']!r} or an empty one")
    return dict(note)


def load(variant: str, weights: Path) -> FeatureBankTeacher:
    """Opens a bank.

    Args:
        variant: ``feature_bank``.
        weights: the bank's folder.

    Returns:
        The bank.

    Raises:
        CheckpointError: no bank, no features in it, or arrays that do not fit it.
    """
    return FeatureBankTeacher(weights)


__all__ = ["BANK_VERSION", "VARIANTS", "FeatureBankTeacher", "load", "read_note"]
