"""A bank of features for a model that cannot be imported here.

The images go out, its features come back.

``write_images`` writes the fixed views of a pool as plain ``.npy`` files for somebody else's environment;
``write_features`` fills the same bank with one of our teachers; ``ForeignBank`` reads what came back, on the student's
grid and normalised, and refuses a bank that belongs to other images or views.

It does not know losses or the student. Shapes: E entries (images x variants), P patches, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyusfm_edge.data.images import ImagePool
from tinyusfm_edge.data.room import take_room
from tinyusfm_edge.models.teachers.feature_bank import BANK_VERSION, FeatureBankTeacher, read_note
from tinyusfm_edge.training.pretrain.standard import Standard, measure_standards
from tinyusfm_edge.training.pretrain.teacher_bank import TeacherFeatures, draw_entries, plain_norm, regrid
from tinyusfm_edge.training.pretrain.views import ViewConfig, masked
from tinyusfm_runtime.atomic import rename_file, write_file
from tinyusfm_runtime.errors import InputError, OutputError

Track = Callable[[Iterable[int], str, int], Iterable[int]]


def bank_note(pool: ImagePool, view: ViewConfig, views: Sequence[str], variants: int, seed: int) -> dict[str, Any]:
    """What a bank says of itself, as plain data."""
    return {
        "version": BANK_VERSION,
        "pool": pool.fingerprint,
        "entries": len(pool) * variants,
        "variants": variants,
        "seed": seed,
        "views": list(views),
        "view": json.loads(json.dumps(asdict(view))),
    }


def write_images(
    folder: Path,
    pool: ImagePool,
    view: ViewConfig,
    *,
    views: Sequence[str],
    variants: int,
    seed: int,
    batch: int = 64,
    track: Track = lambda items, _label, _total: items,
) -> None:
    """Writes ``bank.json`` and ``images-VIEW.npy`` (uint8, E x S x S).

    Args:
        folder: of the bank; features of an earlier bank in it are refused.
        pool: images.
        view: view settings.
        views: kinds of views.
        variants: fixed views an image.
        seed: of the views.
        batch: images at a time.
        track: wraps the batches, for a progress bar.

    Raises:
        InputError: the folder holds another bank.
        OutputError: no room or no permission.
    """
    if variants < 1:
        raise InputError("a bank needs fixed views: set variants to 1 or more (4 to 8 are usual)")
    note = bank_note(pool, view, views, variants, seed)
    if (folder / "bank.json").is_file() and read_note(folder) != note:
        raise InputError(f"{folder} holds a bank of other images or views: name another folder")
    entries, size = note["entries"], view.image_size
    try:
        folder.mkdir(parents=True, exist_ok=True)
        maps = {
            kind: np.lib.format.open_memmap(
                folder / f"images-{kind}.npy", "w+", dtype=np.uint8, shape=(entries, size, size)
            )
            for kind in views
        }
        for kind in views:
            take_room(folder / f"images-{kind}.npy")
        starts = range(0, entries, batch)
        for start in track(starts, "images of the bank", len(starts)):
            chosen = range(start, min(start + batch, entries))
            drawn = draw_entries(pool, chosen, variants, seed, view)
            for kind, target in maps.items():
                # (B, 1, H, W) 0..1 -> (B, H, W) codes
                codes = (masked(drawn, kind, view.mask)[:, 0] * 255).round().to(torch.uint8)
                target[start : chosen.stop] = codes.numpy()
        for target in maps.values():
            target.flush()
        write_file(folder / "bank.json", (json.dumps(note, indent=1) + "\n").encode())
    except OSError as error:
        raise OutputError(f"cannot write the bank {folder}: {error.strerror or error}") from error


def write_features(
    folder: Path,
    features: TeacherFeatures,
    *,
    batch: int = 32,
    track: Track = lambda items, _label, _total: items,
) -> None:
    """Fills a bank with one of our teachers, from the very images in it.

    Args:
        folder: a bank with its images.
        features: teacher, layers and grid.
        batch: images at a time.
        track: wraps the batches, for a progress bar.

    Raises:
        CheckpointError: no bank there.
        OutputError: no room or no permission.
    """
    note = read_note(folder)
    grid, entries = features.config.grid, int(note["entries"])
    try:
        for kind in note["views"]:
            images = np.load(folder / f"images-{kind}.npy", mmap_mode="r", allow_pickle=False)
            hidden = [folder / f".features-{kind}-{n}.npy" for n in range(1, len(features.layers) + 1)]
            shape = (entries, grid, grid, features.width)
            maps = [np.lib.format.open_memmap(path, "w+", dtype=np.float16, shape=shape) for path in hidden]
            for path in hidden:
                take_room(path)
            starts = range(0, entries, batch)
            for start in track(starts, f"features of the {kind} view", len(starts)):
                # (B, H, W) codes -> (B, 1, H, W) 0..1
                codes = torch.from_numpy(np.array(images[start : start + batch]))
                for target, tokens in zip(maps, features(codes[:, None].float() / 255), strict=True):
                    # (B, P, D) -> (B, grid, grid, D), row by row
                    target[start : start + batch] = tokens.unflatten(1, (grid, grid)).numpy()
            for target, path in zip(maps, hidden, strict=True):
                target.flush()
                rename_file(path, folder / path.name[1:])
    except OSError as error:
        raise OutputError(f"cannot write features into {folder}: {error.strerror or error}") from error


class ForeignBank:
    """Features of a bank on the student's grid."""

    def __init__(self, teacher: FeatureBankTeacher, views: Sequence[str], stages: int, grid: int) -> None:
        self.teacher, self.views, self.grid = teacher, tuple(views), grid
        if teacher.depth != stages:
            raise InputError(
                f"the bank holds {teacher.depth} stages and {stages} layers of the student learn: name as many layers"
            )
        self.widths = teacher.widths
        self.entries = teacher.entries

    def read(self, entries: Sequence[int]) -> dict[str, list[Tensor]]:
        """View -> normalised tokens of each stage, BPD.

        For entries ``image * variants + variant``.
        """
        index = np.asarray(entries)
        found: dict[str, list[Tensor]] = {}
        for kind in self.views:
            found[kind] = []
            for stage in range(1, self.teacher.depth + 1):
                # (B, h, w, D) -> (B, h w, D) -> the student's grid -> normed
                maps = torch.from_numpy(np.array(self.teacher.stages[kind, stage][index], np.float32))
                found[kind].append(plain_norm(regrid(maps.flatten(1, 2), self.grid)))
        return found

    def standards(self) -> list[Standard]:
        """Mean and standard deviation of each stage's channels.

        Over the clean views, or over the first kind there is.
        """
        kind = "clean" if "clean" in self.views else self.views[0]
        only = ForeignBank(self.teacher, (kind,), self.teacher.depth, self.grid)
        return measure_standards(
            only.read(range(start, min(start + 64, self.entries)))[kind] for start in range(0, self.entries, 64)
        )


def open_foreign(
    teacher: FeatureBankTeacher,
    pool: ImagePool,
    view: ViewConfig,
    *,
    views: Sequence[str],
    variants: int,
    seed: int,
    stages: int,
) -> ForeignBank:
    """Opens a bank for a run.

    Args:
        teacher: the bank.
        pool: images of the run.
        view: view settings of the run.
        views: kinds of views needed.
        variants: fixed views an image.
        seed: of the views.
        stages: layers of the student that learn.

    Raises:
        InputError: the bank belongs to other images, views or stages.
    """
    wanted = bank_note(pool, view, views, variants, seed)
    differ = [key for key in wanted if key != "views" and teacher.note.get(key) != wanted[key]]
    if differ:
        raise InputError(f"the bank {teacher.folder} was written for another {', '.join(differ)}: write it again")
    missing = set(views) - set(teacher.note["views"])
    if missing:
        raise InputError(f"the bank {teacher.folder} has no {', '.join(sorted(missing))} view")
    return ForeignBank(teacher, views, stages, view.image_size // 16)


__all__ = ["ForeignBank", "Track", "bank_note", "open_foreign", "write_features", "write_images"]
