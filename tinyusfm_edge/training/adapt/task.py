"""What a task means to a training.

Its images in memory, its loss, and the score that picks the best weights.

Images and masks are kept as bytes in the model's input geometry (9 MB for 700 images of 112). Validation runs in
evaluation mode, so that batch statistics never see it (methods.md 1.7, defect 3). The test split is not read here.

Shapes: S samples, B batch, K classes, HW rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.data.frames import read_row
from tinyusfm_edge.data.reading import AS_IT_IS, Reading, make_reading
from tinyusfm_edge.data.table import (
    Sample,
    check_masks,
    class_indices,
    read_frames,
    read_table,
    resize_mask,
    soft_masks,
    split_rows,
    stack_frames,
)
from tinyusfm_edge.evaluation.metrics import balanced_accuracy
from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.losses import class_loss, mask_loss
from tinyusfm_edge.training.adapt.synthetic import synthesise
from tinyusfm_export.verify.reference import normalise
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.spec import PreprocessSpec

SYNTHETIC_SEED = 7
"""Keeps the choice of images for synthesis apart from every other use of a run's seed."""
HALF = 128
"""Code from which a pixel of a mask counts as inside."""
PHANTOM_TRAIN_SEED = 1_000_000
"""First phantom seed of training; golden, demo and test phantoms use seeds below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnlabelledPool:
    """Images of one origin.

    Attributes:
        images_SHW: uint8.
        targets: masks SHW uint8, the share of a pixel as 0..255, or classes S int64.
        small: bool S, heads below the recipe's size, or None.
    """

    images_SHW: Tensor
    targets: Tensor
    small: Tensor | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images_SHW)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """What a run trains and validates on.

    Attributes:
        train: labelled images.
        val: of the validation split.
        phantoms: synthetic training images, or None.
        held: synthetic images kept for evaluation, or None.
        negatives: training images of something else, with empty masks, or None.
        negatives_val: of the validation splits, or None.
        transfer: images without labels for distillation, or None; their targets are not looked at.
        labels: names of the outputs.
        num_groups: patients among the labelled training images.
    """

    train: UnlabelledPool
    val: UnlabelledPool
    phantoms: UnlabelledPool | None
    held: UnlabelledPool | None
    negatives: UnlabelledPool | None
    negatives_val: UnlabelledPool | None
    transfer: UnlabelledPool | None
    labels: tuple[str, ...]
    num_groups: int

    def counts(self) -> dict[str, int]:
        """Images and patients, for a run's settings."""
        return {
            "train": len(self.train),
            "train_groups": self.num_groups,
            "val": len(self.val),
            "phantoms": 0 if self.phantoms is None else len(self.phantoms),
            "negatives": 0 if self.negatives is None else len(self.negatives),
            "transfer": 0 if self.transfer is None else len(self.transfer),
        }


def class_names(folder: Path, reading: Reading = AS_IT_IS) -> tuple[str, ...]:
    """Classes of a table: the labels of its training split, sorted. No image is read.

    Raises:
        InputError: fewer than two.
    """
    names = tuple(sorted({row.label for row in split_rows(folder, "train", "label", reading)}))
    if len(names) < 2:
        raise InputError(f"{folder} has one label, {names[0]!r}: a classifier needs two classes")
    return names


def load_split(
    folder: Path,
    split: str,
    spec: PreprocessSpec,
    config: AdaptConfig,
    labels: tuple[str, ...],
    *,
    limit: int | None = None,
) -> UnlabelledPool:
    """Labelled images of one split, by the recipe's share of labels for training.

    Args:
        folder: holds ``split.csv``.
        split: ``train`` or ``val``.
        spec: the model's preprocessing.
        config: task, masks, share of the labels.
        labels: names of the outputs.
        limit: at most so many, the first of the table.

    Raises:
        InputError: unusable data.
    """
    need: Literal["mask", "label"] = "mask" if config.student.task == "segment" else "label"
    share = config.labels if split == "train" else 1.0
    reading = make_reading(**config.reading)
    samples = read_table(
        folder, split, need=need, share=share, share_seed=config.labels_seed, limit=limit, reading=reading
    )
    return _pool(samples, spec, config, labels)


def load_task(
    folder: Path,
    spec: PreprocessSpec,
    config: AdaptConfig,
    labels: tuple[str, ...],
    negatives: Sequence[Path] = (),
    unlabelled: Sequence[Path] = (),
) -> TaskData:
    """Reads training and validation data.

    Args:
        folder: holds ``split.csv``.
        spec: the model's preprocessing.
        config: labels' share, phantoms, task.
        labels: names of the outputs.
        negatives: folders with a ``split.csv`` of images that hold nothing to segment.
        unlabelled: folders with a ``split.csv`` whose training images join the transfer set.

    Raises:
        InputError: unusable data, a validation class that training has not, or negatives without a share of the batch
            or the reverse.
    """
    if bool(negatives) != (config.negative_share > 0.0):
        raise InputError("negatives and their share of a batch belong together: give both, or neither")
    need: Literal["mask", "label"] = "mask" if config.student.task == "segment" else "label"
    reading = make_reading(**config.reading)
    train = read_table(folder, "train", need=need, share=config.labels, share_seed=config.labels_seed, reading=reading)
    val = read_table(folder, "val", need=need, reading=reading)
    if need == "mask":
        check_masks([*train, *val], f"{folder.name}, training and validation")
    phantoms, held = _phantoms(spec, config) if config.phantom_share > 0.0 else (None, None)
    pool = _pool(train, spec, config, labels)
    if unlabelled and not config.transfer_share:
        raise InputError("unlabelled images are for a transfer set: give --transfer-share")
    taken = {sample.id for sample in train}
    transfer = _transfer(folder, taken, pool, spec, config, unlabelled) if config.transfer_share else None
    return TaskData(
        train=pool,
        val=_pool(val, spec, config, labels),
        phantoms=phantoms,
        held=held,
        negatives=_negatives(negatives, "train", spec, reading) if negatives else None,
        negatives_val=_negatives(negatives, "val", spec, reading) if negatives else None,
        transfer=transfer,
        labels=labels,
        num_groups=len({sample.group for sample in train}),
    )


def _pool(
    samples: Sequence[Sample], spec: PreprocessSpec, config: AdaptConfig, labels: tuple[str, ...]
) -> UnlabelledPool:
    if config.student.task == "segment":
        images = stack_frames([sample.frame for sample in samples], spec)
        masks = soft_masks(samples, spec, from_ellipse=config.masks == "ellipse")
        small = torch.tensor([s.hc_mm is not None and s.hc_mm < config.small_mm for s in samples])
        return UnlabelledPool(images_SHW=torch.from_numpy(images), targets=torch.from_numpy(masks), small=small)
    images = stack_frames([sample.frame for sample in samples], spec)
    return UnlabelledPool(images_SHW=torch.from_numpy(images), targets=torch.from_numpy(class_indices(samples, labels)))


def _negatives(folders: Sequence[Path], split: str, spec: PreprocessSpec, reading: Reading) -> UnlabelledPool:
    """Images of other things, whatever they are labelled, with empty masks."""
    samples = [sample for folder in folders for sample in read_table(folder, split, need="label", reading=reading)]
    images = torch.from_numpy(stack_frames([sample.frame for sample in samples], spec))
    return UnlabelledPool(images_SHW=images, targets=torch.zeros_like(images))


def _transfer(
    folder: Path,
    taken: set[str],
    train: UnlabelledPool,
    spec: PreprocessSpec,
    config: AdaptConfig,
    unlabelled: Sequence[Path],
) -> UnlabelledPool:
    """Images without labels to transfer on.

    The rest of the training split, other images, and synthetic ones made of the labelled.
    """
    need: Literal["mask", "label"] = "mask" if config.student.task == "segment" else "label"
    reading = make_reading(**config.reading)
    rest = [row for row in split_rows(folder, "train", need, reading) if row.columns["file"] not in taken]
    frames = [read_row(row, reading).frame for row in rest]
    frames += [frame for other in unlabelled for frame in read_frames(other, "train", reading)]
    images = [preprocess(frame, spec)[0][0, 0] for frame in frames]
    rng = np.random.default_rng([config.seed, SYNTHETIC_SEED])
    for seed in range(config.num_synthetic):
        own, style = (train.images_SHW[int(index)].numpy() for index in rng.integers(0, len(train), 2))
        images.append(synthesise(own, np.zeros_like(own), style, seed)[0])
    if not images:
        raise InputError("the transfer set is empty: all labels are used and num_synthetic is 0")
    stacked = torch.from_numpy(np.stack(images))
    empty = torch.zeros_like(stacked) if need == "mask" else torch.zeros(len(stacked), dtype=torch.int64)
    return UnlabelledPool(images_SHW=stacked, targets=empty)


def _phantoms(spec: PreprocessSpec, config: AdaptConfig) -> tuple[UnlabelledPool, UnlabelledPool]:
    drawn = [make_phantom(PHANTOM_TRAIN_SEED + i) for i in range(config.num_phantoms)]
    images = torch.from_numpy(stack_frames([p.frame for p in drawn], spec))
    masks = torch.from_numpy(np.stack([resize_mask(p.mask_HW, p.frame, spec) * np.uint8(255) for p in drawn]))
    cut = config.held_phantoms
    return UnlabelledPool(images_SHW=images[cut:], targets=masks[cut:]), UnlabelledPool(
        images_SHW=images[:cut], targets=masks[:cut]
    )


class TaskLoss(nn.Module):
    """The supervised loss of a task; holds the class weights."""

    weights_K: Tensor | None

    def __init__(self, config: AdaptConfig, data: TaskData) -> None:
        super().__init__()
        self.segment, self.smoothing = config.student.task == "segment", config.smoothing
        self.exits_kl, self.border = config.exits_kl, config.border
        self.deep, self.drop_tokens = config.deep, config.drop_tokens
        weights = None
        if not self.segment and config.balance:
            counts = torch.bincount(data.train.targets, minlength=len(data.labels)).clamp(min=1).float()
            weights = counts.sum() / (len(counts) * counts)
        self.register_buffer("weights_K", weights)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of one answer: logits B1HW and masks B1HW, or logits BK and classes B."""
        if self.segment:
            return mask_loss(logits.float(), target, self.border)
        return class_loss(logits.float(), target, self.weights_K, self.smoothing)


@torch.no_grad()
def predict(model: nn.Module, images_SHW: Tensor, spec: PreprocessSpec, *, batch: int = 16) -> Tensor:
    """Logits of images, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    parts = [images_SHW[start : start + batch, None].to(device) for start in range(0, len(images_SHW), batch)]
    return torch.cat([model(normalise(part.float(), spec)).float().cpu() for part in parts])


def score(model: nn.Module, pool: UnlabelledPool, spec: PreprocessSpec, *, segment: bool) -> dict[str, float]:
    """Validation scores; ``rank`` picks the best weights.

    Returns:
        ``dice`` (mean over images, two empty masks agree), or ``balanced_accuracy`` and ``nll`` (natural log); and
        ``rank``: Dice, or balanced accuracy with a thousandth of the likelihood for the many ties of a small split.
    """
    logits = predict(model, pool.images_SHW, spec)
    if segment:
        found, truth = (logits > 0).flatten(1), pool.targets.flatten(1) >= HALF
        both, total = (found & truth).sum(1).double(), (found.sum(1) + truth.sum(1)).double()
        dice = float(torch.where(total > 0, 2 * both / total.clamp(min=1), torch.ones_like(both)).mean())
        return {"dice": dice, "rank": dice}
    right = balanced_accuracy(logits.numpy(), pool.targets.numpy())
    nll = float(F.cross_entropy(logits, pool.targets))
    return {"balanced_accuracy": right, "nll": nll, "rank": right - 1e-3 * nll}


__all__ = [
    "HALF",
    "PHANTOM_TRAIN_SEED",
    "SYNTHETIC_SEED",
    "TaskData",
    "TaskLoss",
    "UnlabelledPool",
    "class_names",
    "load_split",
    "load_task",
    "predict",
    "score",
]
