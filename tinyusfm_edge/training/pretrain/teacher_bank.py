"""Teacher features: computed when needed, or kept in a bank.

The bank is memory-mapped and holds a fixed set of views.

A bank holds float16 patch tokens of every image under a few fixed views (4 to 8), on the student's patch grid, after
a LayerNorm without parameters, and each channel's mean and standard deviation over the pool; a CPU then trains without
running the teacher. It belongs to one pool, one teacher, one set of view settings and one seed, all hashed into its
name. Writing it can be killed and goes on where it was.

It does not know the student or losses.

Shapes: B batch, P patches on the student's grid, D teacher width, E entries (images x variants).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyusfm_edge.data.images import ImagePool
from tinyusfm_edge.data.room import take_room
from tinyusfm_edge.models.teachers import Teacher
from tinyusfm_edge.training.pretrain.masking import PATCH
from tinyusfm_edge.training.pretrain.relation import attention_logits
from tinyusfm_edge.training.pretrain.standard import Standard, measure_standards
from tinyusfm_edge.training.pretrain.views import ViewConfig, Views, as_input, draw_views, masked
from tinyusfm_edge.training.trainer.loop import stable_seed
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.strict_json import parse_json

BANK_VERSION = 2
"""Version of a bank's ``bank.json``."""
STANDARDS = "standards.npz"
"""Each channel's mean and standard deviation over a bank."""
POOL_SAMPLE = 256
"""Images that stand for a pool whose features are not kept."""


def plain_norm(tokens_BPD: Tensor) -> Tensor:
    """LayerNorm without parameters.

    Raw ViT tokens have a few huge channels, which alone would decide every cosine.
    """
    return F.layer_norm(tokens_BPD.float(), tokens_BPD.shape[-1:])


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """Which features.

    Attributes:
        layers: the student's blocks, from 1; a deeper teacher gives the blocks at the same share of its depth.
        student_depth: blocks of the student.
        teacher_size: side of the image the teacher sees, pixels, a multiple of its patch; 0 takes the multiple
            nearest to the student's.
        grid: patches per side of the student.
    """

    layers: tuple[int, ...]
    student_depth: int
    teacher_size: int
    grid: int


class TeacherFeatures:
    """A teacher on the student's grid."""

    def __init__(self, teacher: Teacher, config: FeatureConfig) -> None:
        self.teacher, self.config = teacher, config
        # the multiple of the teacher's patch that is nearest to one of its patches per student patch
        wanted = config.teacher_size or max(1, round(config.grid * PATCH / teacher.patch)) * teacher.patch
        if wanted % teacher.patch:
            raise InputError(f"teacher_size {wanted} must be a multiple of the teacher's {teacher.patch}-pixel patches")
        self.size = wanted
        # the student's block n of 12 is the teacher's at the same share of its depth
        self.layers = tuple(max(1, round(n * teacher.depth / config.student_depth)) for n in config.layers)

    @property
    def width(self) -> int:
        """Width of the teacher's tokens."""
        return self.teacher.width

    @torch.no_grad()
    def __call__(self, image_B1HW: Tensor) -> list[Tensor]:
        """Normalised tokens BPD of each layer for images 0..1 of the student's size."""
        if image_B1HW.shape[-1] != self.size:
            image_B1HW = F.interpolate(
                image_B1HW, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True
            ).clamp(0, 1)
        # per layer (B, teacher's patches, D)
        found = self.teacher.tokens(as_input(image_B1HW), self.layers)
        return [plain_norm(regrid(tokens, self.config.grid)) for tokens in found]

    @property
    def heads(self) -> int:
        """Attention heads of the teacher's last block.

        Raises:
            InputError: a teacher that has no blocks of ours.
        """
        return int(self._last_block().attn.heads)

    def _last_block(self) -> Any:
        blocks = getattr(self.teacher, "blocks", None)
        if blocks is None or not hasattr(self.teacher, "sequence"):
            raise InputError("relations need a teacher whose attention can be read: a DINOv2 or a plain ViT")
        return blocks[-1]

    def check_attention(self) -> None:
        """Refuses a teacher whose attention cannot be compared with the student's.

        Raises:
            InputError: the teacher's grid is not the student's, it has registers, or no blocks of ours.
        """
        self._last_block()
        teacher: Any = self.teacher
        side = self.config.grid * teacher.patch
        if side != self.size or getattr(teacher, "registers", 0):
            raise InputError(f"relations need equal grids: set teacher_size={side}, and a teacher without registers")

    @torch.no_grad()
    def attention(self, image_B1HW: Tensor) -> Tensor:
        """Attention logits BHNN of the teacher's last block.

        Class token and patches, on the student's grid.

        Raises:
            InputError: the teacher's grid is not the student's, or it has registers.
        """
        teacher: Any = self.teacher
        self.check_attention()
        side = self.size
        resized = F.interpolate(
            image_B1HW, size=(side, side), mode="bilinear", align_corners=False, antialias=True
        ).clamp(0, 1)
        # the input of the last block, (B, 1 + P, D)
        block, before = self._last_block(), teacher.sequence(as_input(resized), (teacher.depth - 1,))[0]
        return attention_logits(block.attn, block.norm1(before))

    def to(self, device: torch.device) -> None:
        """Moves the teacher."""
        if isinstance(self.teacher, torch.nn.Module):
            self.teacher.to(device)


def regrid(tokens_BPD: Tensor, grid: int) -> Tensor:
    """Tokens on another square grid, antialiased bilinear.

    16x16 patches of 14 pixels become 14x14 of 16.

    Args:
        tokens_BPD: tokens, row by row.
        grid: patches per side wanted.

    Returns:
        Tokens on that grid; the same ones if it is the same.
    """
    old = round(tokens_BPD.shape[1] ** 0.5)
    if old * old != tokens_BPD.shape[1]:
        raise InputError(f"{tokens_BPD.shape[1]} teacher tokens are no square grid")
    if old == grid:
        return tokens_BPD
    # (B, P, D) -> (B, D, old, old)
    square = tokens_BPD.float().transpose(1, 2).unflatten(2, (old, old))
    square = F.interpolate(square, size=(grid, grid), mode="bilinear", align_corners=False, antialias=True)
    # (B, D, grid, grid) -> (B, grid grid, D)
    return square.flatten(2).transpose(1, 2)


def variant_seed(identity: str, variant: int, seed: int) -> int:
    """Seed of one of an image's fixed views."""
    return stable_seed("view", seed, identity, variant)


class FeatureBank:
    """Memory-mapped features of fixed views; one file per view and layer."""

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
        """View -> tokens of each layer, BPD float16.

        For entries ``image * variants + variant``.
        """
        index = np.asarray(entries)
        return {
            view: [torch.from_numpy(np.ascontiguousarray(self.maps[view, layer][index])) for layer in self.layers]
            for view in self.views
        }

    def standards(self) -> list[Standard]:
        """Mean and standard deviation of each stage's channels.

        Over the clean views, or over the first kind there is.

        Measured once and kept beside the features.

        Raises:
            OutputError: no room or no permission.
        """
        path = self.folder / STANDARDS
        kind = "clean" if "clean" in self.views else self.views[0]
        names = [f"{kind}-{layer:02d}" for layer in self.layers]
        if path.is_file():
            with np.load(path, allow_pickle=False) as held:
                if all(f"{name}-{part}" in held for name in names for part in ("mean", "sd")):
                    return [_standard_of(held, name) for name in names]
        maps = [self.maps[kind, layer] for layer in self.layers]
        found = measure_standards(
            [torch.from_numpy(np.array(tokens[start : start + 256], np.float32)) for tokens in maps]
            for start in range(0, self.shape[0], 256)
        )
        arrays = {f"{name}-mean": standard.mean_D.numpy() for name, standard in zip(names, found, strict=True)}
        arrays |= {f"{name}-sd": standard.sd_D.numpy() for name, standard in zip(names, found, strict=True)}
        stream = io.BytesIO()
        np.savez(stream, **arrays)  # type: ignore[arg-type]
        write_file(path, stream.getvalue())
        return found


def _standard_of(held: Any, name: str) -> Standard:
    mean, sd = (torch.from_numpy(np.array(held[f"{name}-{part}"], np.float32)) for part in ("mean", "sd"))
    return Standard(mean_D=mean, sd_D=sd)


def pool_standards(pool: ImagePool, view: ViewConfig, features: TeacherFeatures, seed: int) -> list[Standard]:
    """Mean and standard deviation of each stage's channels without a bank.

    Over clean crops of part of the pool.

    Args:
        pool: images; up to ``POOL_SAMPLE`` of them are looked at, evenly spaced.
        view: view settings.
        features: teacher and grid.
        seed: of the crops.
    """
    chosen = np.unique(np.linspace(0, len(pool) - 1, min(len(pool), POOL_SAMPLE)).astype(int)).tolist()
    parts = [chosen[start : start + 32] for start in range(0, len(chosen), 32)]
    return measure_standards(
        [tokens.cpu() for tokens in features(draw_entries(pool, part, 1, seed, view).image_B1HW)] for part in parts
    )


def bank_key(pool: ImagePool, view: ViewConfig, features: TeacherFeatures, identity: Mapping[str, Any]) -> str:
    """Hash of everything the features depend on.

    Args:
        pool: images.
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
    pool: ImagePool,
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
        pool: images.
        view: view settings.
        features: teacher and grid.
        views: kinds of views needed.
        variants: fixed views an image.
        seed: of the views.
        teacher: its name and sha256.
        batch: images at a time.
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
        write_file(folder / "bank.json", json.dumps(note, indent=1).encode())
        for kind in views:
            _complete(folder, kind, pool, view, features, shape, variants, seed, batch, track)
    except OSError as error:
        raise OutputError(f"cannot write the teacher's features to {folder}: {error.strerror or error}") from error
    return FeatureBank(folder, views, features.layers, shape)


def _complete(
    folder: Path,
    kind: str,
    pool: ImagePool,
    view: ViewConfig,
    features: TeacherFeatures,
    shape: tuple[int, int, int],
    variants: int,
    seed: int,
    batch: int,
    track: Callable[[Iterable[int], str, int], Iterable[int]],
) -> None:
    """Computes what is missing of one kind of view.

    Progress is written down after every few batches.
    """
    done_path = folder / f"{kind}.json"
    done = parse_json(done_path.read_text(encoding="utf-8"))["entries"] if done_path.is_file() else 0
    if done >= shape[0]:
        return
    maps = []
    for layer in features.layers:
        path = folder / f"{kind}-{layer:02d}.f16"
        fresh = done == 0 or not path.is_file()
        maps.append(np.memmap(path, np.float16, "w+" if fresh else "r+", shape=shape))
        if fresh:  # a file that a stopped run has begun has its room, and keeps what is in it
            take_room(path)
    starts = range(done, shape[0], batch)
    for count, start in enumerate(track(starts, f"teacher features, {kind} view", len(starts)), 1):
        entries = range(start, min(start + batch, shape[0]))
        drawn = draw_entries(pool, entries, variants, seed, view)
        for target, tokens in zip(maps, features(masked(drawn, kind, view.mask)), strict=True):
            target[start : entries.stop] = tokens.cpu().numpy()
        if count % 16 == 0 or entries.stop == shape[0]:
            for target in maps:
                target.flush()
            write_file(done_path, json.dumps({"entries": entries.stop}).encode())


def draw_entries(pool: ImagePool, entries: Sequence[int], variants: int, seed: int, view: ViewConfig) -> Views:
    """The fixed views of bank entries.

    Args:
        pool: images.
        entries: ``image * variants + variant``.
        variants: fixed views an image.
        seed: of the views.
        view: view settings.
    """
    pixels = [pool.pixels_NSS[entry // variants] for entry in entries]
    seeds = [variant_seed(pool.ids[entry // variants], entry % variants, seed) for entry in entries]
    return draw_views(pixels, seeds, view)


__all__ = [
    "BANK_VERSION",
    "POOL_SAMPLE",
    "STANDARDS",
    "FeatureBank",
    "FeatureConfig",
    "TeacherFeatures",
    "bank_key",
    "draw_entries",
    "plain_norm",
    "pool_standards",
    "regrid",
    "variant_seed",
    "write_bank",
]
