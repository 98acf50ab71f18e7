"""What a task means to a training: its pictures in memory, its loss, and the score that picks the best weights.

Pictures and masks are kept as bytes in the model's input geometry (9 MB for 700 pictures of 112). Validation runs in
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

from tinyusfm_edge.evaluation.metrics import balanced_accuracy
from tinyusfm_edge.training.adapt_config import AdaptConfig
from tinyusfm_edge.training.data import Sample, read_table, resize_mask, stack_frames, to_arrays
from tinyusfm_edge.training.losses import class_loss, mask_loss
from tinyusfm_edge.training.synthetic import synthesise
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.preprocess import preprocess
from tinyusfm_runtime.spec import PreprocessSpec

SYNTHETIC_SEED = 7
"""Keeps the choice of pictures for synthesis apart from every other use of a run's seed."""
PHANTOM_TRAIN_SEED = 1_000_000
"""First phantom seed of training; golden, demo and test phantoms use seeds below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Pictures of one origin.

    Attributes:
        images_SHW: uint8.
        targets: masks SHW uint8 0/1, or classes S int64.
    """

    images_SHW: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.images_SHW)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """What a run trains and validates on.

    Attributes:
        train: labelled pictures.
        val: of the validation split.
        phantoms: synthetic training pictures, or None.
        held: synthetic pictures kept for evaluation, or None.
        negatives: training pictures of something else, with empty masks, or None.
        negatives_val: of the validation splits, or None.
        transfer: pictures without labels for distillation, or None; their targets are not looked at.
        labels: names of the outputs.
        num_groups: patients among the labelled training pictures.
    """

    train: Pool
    val: Pool
    phantoms: Pool | None
    held: Pool | None
    negatives: Pool | None
    negatives_val: Pool | None
    transfer: Pool | None
    labels: tuple[str, ...]
    num_groups: int

    def counts(self) -> dict[str, int]:
        """Pictures and patients, for a run's settings."""
        return {
            "train": len(self.train),
            "train_groups": self.num_groups,
            "val": len(self.val),
            "phantoms": 0 if self.phantoms is None else len(self.phantoms),
            "negatives": 0 if self.negatives is None else len(self.negatives),
            "transfer": 0 if self.transfer is None else len(self.transfer),
        }


def class_names(folder: Path) -> tuple[str, ...]:
    """Classes of a table: the labels of its training split, sorted.

    Raises:
        InputError: fewer than two.
    """
    names = tuple(sorted({sample.label for sample in read_table(folder, "train", need="label")}))
    if len(names) < 2:
        raise InputError(f"{folder} has one label, {names[0]!r}: a classifier needs two classes")
    return names


def load_task(
    folder: Path, spec: PreprocessSpec, config: AdaptConfig, labels: tuple[str, ...], negatives: Sequence[Path] = ()
) -> TaskData:
    """Reads training and validation data.

    Args:
        folder: holds ``split.csv``.
        spec: the model's preprocessing.
        config: labels' share, phantoms, task.
        labels: names of the outputs.
        negatives: folders with a ``split.csv`` of pictures that hold nothing to segment.

    Raises:
        InputError: unusable data, a validation class that training has not, or negatives without a share of the batch
            or the reverse.
    """
    if bool(negatives) != (config.negative_share > 0.0):
        raise InputError("negatives and their share of a batch belong together: give both, or neither")
    need: Literal["mask", "label"] = "mask" if config.student.task == "segment" else "label"
    train = read_table(folder, "train", need=need, share=config.labels, share_seed=config.labels_seed)
    val = read_table(folder, "val", need=need)
    phantoms, held = _phantoms(spec, config) if config.phantom_share > 0.0 else (None, None)
    pool = _pool(train, spec, config, labels)
    transfer = _transfer(folder, {sample.id for sample in train}, pool, spec, config) if config.transfer_share else None
    return TaskData(
        train=pool,
        val=_pool(val, spec, config, labels),
        phantoms=phantoms,
        held=held,
        negatives=_negatives(negatives, "train", spec) if negatives else None,
        negatives_val=_negatives(negatives, "val", spec) if negatives else None,
        transfer=transfer,
        labels=labels,
        num_groups=len({sample.group for sample in train}),
    )


def _pool(samples: Sequence[Sample], spec: PreprocessSpec, config: AdaptConfig, labels: tuple[str, ...]) -> Pool:
    if config.student.task == "segment":
        images, masks = to_arrays(list(samples), spec)
        return Pool(images_SHW=torch.from_numpy(images), targets=torch.from_numpy(masks))
    images = stack_frames([sample.frame for sample in samples], spec)
    return Pool(images_SHW=torch.from_numpy(images), targets=torch.from_numpy(class_indices(samples, labels)))


def _negatives(folders: Sequence[Path], split: str, spec: PreprocessSpec) -> Pool:
    """Pictures of other things, whatever they are labelled, with empty masks."""
    samples = [sample for folder in folders for sample in read_table(folder, split, need="label")]
    images = torch.from_numpy(stack_frames([sample.frame for sample in samples], spec))
    return Pool(images_SHW=images, targets=torch.zeros_like(images))


def _transfer(folder: Path, taken: set[str], train: Pool, spec: PreprocessSpec, config: AdaptConfig) -> Pool:
    """The rest of the training split without its labels, and synthetic pictures made of the labelled ones."""
    need: Literal["mask", "label"] = "mask" if config.student.task == "segment" else "label"
    rest = [sample for sample in read_table(folder, "train", need=need) if sample.id not in taken]
    images = [preprocess(sample.frame, spec)[0][0, 0] for sample in rest]
    rng = np.random.default_rng([config.seed, SYNTHETIC_SEED])
    for seed in range(config.num_synthetic):
        own, style = (train.images_SHW[int(index)].numpy() for index in rng.integers(0, len(train), 2))
        images.append(synthesise(own, np.zeros_like(own), style, seed)[0])
    if not images:
        raise InputError("the transfer set is empty: all labels are used and num_synthetic is 0")
    stacked = torch.from_numpy(np.stack(images))
    empty = torch.zeros_like(stacked) if need == "mask" else torch.zeros(len(stacked), dtype=torch.int64)
    return Pool(images_SHW=stacked, targets=empty)


def class_indices(samples: Sequence[Sample], labels: tuple[str, ...]) -> np.ndarray:
    """Classes of samples as int64 S.

    Raises:
        InputError: a label that is not among the names.
    """
    known = {name: index for index, name in enumerate(labels)}
    unknown = sorted({sample.label for sample in samples} - set(known))
    if unknown:
        raise InputError(f"label {unknown[0]!r} is not among the model's: {', '.join(labels)}")
    return np.array([known[sample.label] for sample in samples], np.int64)


def _phantoms(spec: PreprocessSpec, config: AdaptConfig) -> tuple[Pool, Pool]:
    drawn = [make_phantom(PHANTOM_TRAIN_SEED + i) for i in range(config.num_phantoms)]
    images = torch.from_numpy(stack_frames([p.frame for p in drawn], spec))
    masks = torch.from_numpy(np.stack([resize_mask(p.mask_HW, p.frame, spec) for p in drawn]))
    cut = config.held_phantoms
    return Pool(images_SHW=images[cut:], targets=masks[cut:]), Pool(images_SHW=images[:cut], targets=masks[:cut])


class TaskLoss(nn.Module):
    """The supervised loss of a task; holds the class weights."""

    weights_K: Tensor | None

    def __init__(self, config: AdaptConfig, data: TaskData) -> None:
        super().__init__()
        self.segment, self.smoothing = config.student.task == "segment", config.smoothing
        self.exits_kl = config.exits_kl
        weights = None
        if not self.segment and config.balance:
            counts = torch.bincount(data.train.targets, minlength=len(data.labels)).clamp(min=1).float()
            weights = counts.sum() / (len(counts) * counts)
        self.register_buffer("weights_K", weights)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of one answer: logits B1HW and masks B1HW, or logits BK and classes B."""
        if self.segment:
            return mask_loss(logits.float(), target)
        return class_loss(logits.float(), target, self.weights_K, self.smoothing)


def normalise(image_B1HW: Tensor, spec: PreprocessSpec) -> Tensor:
    """Brightness codes 0..255 -> normalised three equal channels, as the float model takes them."""
    mean = torch.tensor(spec.mean, device=image_B1HW.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=image_B1HW.device).view(1, 3, 1, 1)
    return (image_B1HW / 255.0 - mean) / std


@torch.no_grad()
def predict(model: nn.Module, images_SHW: Tensor, spec: PreprocessSpec, *, batch: int = 16) -> Tensor:
    """Logits of pictures, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    parts = [images_SHW[start : start + batch, None].to(device) for start in range(0, len(images_SHW), batch)]
    return torch.cat([model(normalise(part.float(), spec)).float().cpu() for part in parts])


def score(model: nn.Module, pool: Pool, spec: PreprocessSpec, *, segment: bool) -> dict[str, float]:
    """Validation scores; ``rank`` picks the best weights.

    Returns:
        ``dice`` (mean over pictures, two empty masks agree), or ``balanced_accuracy`` and ``nll`` (natural log); and
        ``rank``: Dice, or balanced accuracy with a thousandth of the likelihood for the many ties of a small split.
    """
    logits = predict(model, pool.images_SHW, spec)
    if segment:
        found, truth = (logits > 0).flatten(1), pool.targets.flatten(1) > 0
        both, total = (found & truth).sum(1).double(), (found.sum(1) + truth.sum(1)).double()
        dice = float(torch.where(total > 0, 2 * both / total.clamp(min=1), torch.ones_like(both)).mean())
        return {"dice": dice, "rank": dice}
    right = balanced_accuracy(logits.numpy(), pool.targets.numpy())
    nll = float(F.cross_entropy(logits, pool.targets))
    return {"balanced_accuracy": right, "nll": nll, "rank": right - 1e-3 * nll}


__all__ = [
    "PHANTOM_TRAIN_SEED",
    "SYNTHETIC_SEED",
    "Pool",
    "TaskData",
    "TaskLoss",
    "class_indices",
    "class_names",
    "load_task",
    "normalise",
    "predict",
    "score",
]
