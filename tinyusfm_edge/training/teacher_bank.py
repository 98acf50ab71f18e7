"""Teacher features: computed as they are needed, or kept in a memory-mapped bank for a fixed set of views.

A bank holds float16 patch tokens of every picture under a few fixed views (4 to 8), on the student's patch grid, after
a LayerNorm without parameters; a CPU then trains without running the teacher. It belongs to one pool, one teacher, one
set of view settings and one seed, all hashed into its name. Writing it can be killed and goes on where it was.

It does not know the student or losses.

Shapes: B batch, P patches on the student's grid, D teacher width, E entries (pictures x variants).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyusfm_edge.models.checkpoint import write_atomically
from tinyusfm_edge.models.teachers import Teacher
from tinyusfm_edge.training.loop import stable_seed
from tinyusfm_edge.training.masking import PATCH
from tinyusfm_edge.training.pictures import Pool
from tinyusfm_edge.training.views import ViewConfig, Views, as_input, draw_views, masked
from tinyusfm_runtime.errors import InputError, OutputError

BANK_VERSION = 2
"""Version of a bank's ``bank.json``."""


def plain_norm(tokens_BPD: Tensor) -> Tensor:
    """LayerNorm without parameters: raw ViT tokens have a few huge channels, which alone would decide every cosine."""
    return F.layer_norm(tokens_BPD.float(), tokens_BPD.shape[-1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """Which features.

    Attributes:
        layers: the student's blocks, from 1; a deeper teacher gives the blocks at the same share of its depth.
        student_depth: blocks of the student.
        teacher_size: side of the picture the teacher sees, pixels, a multiple of its patch; 0 takes the multiple
            nearest to the student's.
        grid: patches a side of the student.
    """

    layers: tuple[int, ...]
    student_depth: int
    teacher_size: int
    grid: int


class TeacherFeatures:
    """A teacher on the student's grid."""

    def __init__(self, teacher: Teacher, config: FeatureConfig) -> None:
        self.teacher, self.config = teacher, config
        wanted = config.teacher_size or max(1, round(config.grid * PATCH / teacher.patch)) * teacher.patch
        if wanted % teacher.patch:
            raise InputError(f"teacher_size {wanted} must be a multiple of the teacher's {teacher.patch}-pixel patches")
        self.size = wanted
        self.layers = tuple(max(1, round(n * teacher.depth / config.student_depth)) for n in config.layers)

    @property
    def width(self) -> int:
        """Width of the teacher's tokens."""
        return self.teacher.width

    @torch.no_grad()
    def __call__(self, image_B1HW: Tensor) -> list[Tensor]:
        """Normalised tokens BPD of each layer for pictures 0..1 of the student's size."""
        if image_B1HW.shape[-1] != self.size:
            image_B1HW = F.interpolate(
                image_B1HW, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True
            ).clamp(0, 1)
        found = self.teacher.tokens(as_input(image_B1HW), self.layers)
        return [plain_norm(regrid(tokens, self.config.grid)) for tokens in found]

    def to(self, device: torch.device) -> None:
        """Moves the teacher."""
        if isinstance(self.teacher, torch.nn.Module):
            self.teacher.to(device)


def regrid(tokens_BPD: Tensor, grid: int) -> Tensor:
    """Tokens on another square grid, antialiased bilinear: 16x16 patches of 14 pixels become 14x14 of 16.

    Args:
        tokens_BPD: tokens, row by row.
        grid: patches a side wanted.

    Returns:
        Tokens on that grid; the same ones if it is the same.
    """
    old = round(tokens_BPD.shape[1] ** 0.5)
    if old * old != tokens_BPD.shape[1]:
        raise InputError(f"{tokens_BPD.shape[1]} teacher tokens are no square grid")
    if old == grid:
        return tokens_BPD
    square = tokens_BPD.float().transpose(1, 2).unflatten(2, (old, old))
    square = F.interpolate(square, size=(grid, grid), mode="bilinear", align_corners=False, antialias=True)
    return square.flatten(2).transpose(1, 2)


def variant_seed(identity: str, variant: int, seed: int) -> int:
    """Seed of one of a picture's fixed views."""
    return stable_seed("view", seed, identity, variant)


class FeatureBank:
    """Memory-mapped features of fixed views; one file a view and layer."""

    def __init__(self, folder: Path, views: Sequence[str], layers: Sequence[int], shape: tuple[int, int, int]) -> None:
        self.folder, self.views, self.layers, self.shape = folder, tuple(views), tuple(layers), shape
        self.maps = {
            (view, layer): np.memmap(folder / f"{view}-{layer:02d}.f16", np.float16, "r", shape=shape)
            for view in views
            for layer in layers
        }

    @property
    def width(self) -> int:
        """Width of the teacher's tokens."""
        return self.shape[2]

    def read(self, entries: Sequence[int]) -> dict[str, list[Tensor]]:
        """View -> tokens of each layer, BPD float16, for entries ``picture * variants + variant``."""
        index = np.asarray(entries)
        return {
            view: [torch.from_numpy(np.ascontiguousarray(self.maps[view, layer][index])) for layer in self.layers]
            for view in self.views
        }


def bank_key(pool: Pool, view: ViewConfig, features: TeacherFeatures, identity: Mapping[str, Any]) -> str:
    """Hash of everything the features depend on.

    Args:
        pool: pictures.
        view: view settings.
        features: teacher and grid.
        identity: the teacher's name and sha256, the number of variants and the seed.
    """
    parts = {
        "version": BANK_VERSION,
        "pool": pool.fingerprint,
        "view": asdict(view),
        "layers": features.layers,
        "size": features.size,
        "grid": features.config.grid,
        **identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_bank(
    cache: Path,
    pool: Pool,
    view: ViewConfig,
    features: TeacherFeatures,
    *,
    views: Sequence[str],
    variants: int,
    seed: int,
    teacher: Mapping[str, Any],
    batch: int = 32,
    track: Callable[[Iterable[int], str, int], Iterable[int]] = lambda items, _label, _total: items,
) -> FeatureBank:
    """Opens a bank, computing first what is missing of it.

    Args:
        cache: folder that holds banks.
        pool: pictures.
        view: view settings.
        features: teacher and grid.
        views: kinds of views needed.
        variants: fixed views a picture.
        seed: of the views.
        teacher: its name and sha256.
        batch: pictures at a time.
        track: wraps the batches, for a progress bar.

    Returns:
        The bank.

    Raises:
        OutputError: no room or no permission.
    """
    key = bank_key(pool, view, features, {"variants": variants, "seed": seed, **teacher})
    folder = cache / f"bank-{key}"
    entries = len(pool) * variants
    shape = (entries, features.config.grid**2, features.width)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note = {"version": BANK_VERSION, "shape": shape, "variants": variants, "seed": seed, **teacher}
        write_atomically(folder / "bank.json", json.dumps(note, indent=1).encode())
        for kind in views:
            _complete(folder, kind, pool, view, features, shape, variants, seed, batch, track)
    except OSError as error:
        raise OutputError(f"cannot write the teacher's features to {folder}: {error.strerror or error}") from error
    return FeatureBank(folder, views, features.layers, shape)


def _complete(
    folder: Path,
    kind: str,
    pool: Pool,
    view: ViewConfig,
    features: TeacherFeatures,
    shape: tuple[int, int, int],
    variants: int,
    seed: int,
    batch: int,
    track: Callable[[Iterable[int], str, int], Iterable[int]],
) -> None:
    """Computes what is missing of one kind of view; progress is written down after every few batches."""
    done_path = folder / f"{kind}.json"
    done = json.loads(done_path.read_text(encoding="utf-8"))["entries"] if done_path.is_file() else 0
    if done >= shape[0]:
        return
    maps = []
    for layer in features.layers:
        path = folder / f"{kind}-{layer:02d}.f16"
        fresh = done == 0 or not path.is_file()
        maps.append(np.memmap(path, np.float16, "w+" if fresh else "r+", shape=shape))
    starts = range(done, shape[0], batch)
    for count, start in enumerate(track(starts, f"teacher features, {kind} view", len(starts)), 1):
        entries = range(start, min(start + batch, shape[0]))
        drawn = draw_entries(pool, entries, variants, seed, view)
        for target, tokens in zip(maps, features(masked(drawn, kind, view.mask)), strict=True):
            target[start : entries.stop] = tokens.cpu().numpy()
        if count % 16 == 0 or entries.stop == shape[0]:
            for target in maps:
                target.flush()
            write_atomically(done_path, json.dumps({"entries": entries.stop}).encode())


def draw_entries(pool: Pool, entries: Sequence[int], variants: int, seed: int, view: ViewConfig) -> Views:
    """The fixed views of bank entries.

    Args:
        pool: pictures.
        entries: ``picture * variants + variant``.
        variants: fixed views a picture.
        seed: of the views.
        view: view settings.
    """
    pixels = [pool.pixels_NSS[entry // variants] for entry in entries]
    seeds = [variant_seed(pool.ids[entry // variants], entry % variants, seed) for entry in entries]
    return draw_views(pixels, seeds, view)


__all__ = [
    "BANK_VERSION",
    "FeatureBank",
    "FeatureConfig",
    "TeacherFeatures",
    "bank_key",
    "draw_entries",
    "plain_norm",
    "regrid",
    "variant_seed",
    "write_bank",
]
