"""Plain supervised training of a segmentation student on a labelled table and phantoms.

``python -m tinyusfm_edge.training.supervised --data DIR --out runs/fetal-head`` trains, writes a checkpoint every
evaluation and resumes from it to the same weights as an uninterrupted run. The best weights by validation Dice (moving
average of the weights) are kept apart. It does not know export, packaging or the test split.

Recipe (our choice, since the official one is tuned to a pre-trained start): AdamW 0.9/0.999, weight decay 0.05 on
matrices only, linear warm-up and cosine decay to 1 %, BCE + soft Dice, bfloat16 autocast, EMA of the weights.

Shapes: B batch, 1HW pictures and masks.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyusfm_edge.models.checkpoint import load_weights
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.training.augment import AugmentConfig, augment
from tinyusfm_edge.training.data import read_table, resize_mask, to_arrays
from tinyusfm_runtime.errors import EdgeError, InputError
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.preprocess import preprocess
from tinyusfm_runtime.spec import PreprocessSpec

RUN_VERSION = 1
"""Version of a run's ``config.json`` and ``checkpoint.pt``."""
PHANTOM_TRAIN_SEED = 1_000_000
"""First phantom seed of training; golden, demo and test phantoms use seeds below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SupervisedConfig:
    """Settings of one run.

    Attributes:
        steps: optimiser steps.
        batch: samples a step.
        learning_rate: peak learning rate.
        weight_decay: on tensors of two or more axes.
        warmup: steps of linear warm-up.
        phantom_share: fraction of phantoms in a batch, 0..1.
        num_phantoms: distinct phantoms drawn before training.
        held_phantoms: of them, kept for evaluation.
        ema: decay of the weights' moving average, per step.
        evaluate_every: steps between evaluations and checkpoints.
        seed: of everything.
        student: architecture.
        augment: ranges.
        polish_from: step from which the ranges of the augmentation are halved, or None.
    """

    steps: int = 5000
    batch: int = 16
    learning_rate: float = 6e-4
    weight_decay: float = 0.05
    warmup: int = 250
    phantom_share: float = 0.1875
    num_phantoms: int = 600
    held_phantoms: int = 48
    ema: float = 0.998
    evaluate_every: int = 250
    seed: int = 42
    student: StudentConfig = field(default_factory=lambda: StudentConfig(drop_path=0.05))
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    polish_from: int | None = None

    def __post_init__(self) -> None:
        """Checks what would otherwise fail late.

        Raises:
            InputError: no steps, no batch, a share outside 0..1, or no phantoms left to train on.
        """
        if min(self.steps, self.batch, self.evaluate_every) < 1 or not 0.0 <= self.phantom_share < 1.0:
            raise InputError("steps, batch and evaluate_every must be at least 1, phantom_share in [0, 1)")
        if not 0 < self.held_phantoms < self.num_phantoms:
            raise InputError(
                f"{self.held_phantoms} of {self.num_phantoms} phantoms held: some must be left for training"
            )
        if self.student.task != "segment" or self.student.outputs != 1:
            raise InputError("this recipe trains binary segmentation only")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SupervisedConfig:
        """Reads settings, such as a run's ``config.json``; what is not named keeps its default.

        Raises:
            InputError: unknown keys, another version or impossible values.
        """
        values = {key: value for key, value in data.items() if key not in ("version", "init")}
        if data.get("version", RUN_VERSION) != RUN_VERSION:
            raise InputError(f"run settings of version {data['version']!r}; this release reads {RUN_VERSION}")
        try:
            start = cls()
            student = {**start.student.to_json(), **values.pop("student", {})}
            changes = values.pop("augment", {})
            pairs: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()
            }
            return cls(student=StudentConfig.from_json(student), augment=AugmentConfig(**pairs), **values)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"run settings are not usable: {error}") from error


def normalise(image_B1HW: Tensor, spec: PreprocessSpec) -> Tensor:
    """Brightness codes 0..255 -> normalised three equal channels, as the float model takes them."""
    mean = torch.tensor(spec.mean).view(1, 3, 1, 1)
    std = torch.tensor(spec.std).view(1, 3, 1, 1)
    return (image_B1HW / 255.0 - mean) / std


def soft_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - soft Dice per sample, mean over the batch (Milletari et al. 2016, with squared denominators dropped)."""
    p = torch.sigmoid(logits).flatten(1)
    t = target.flatten(1)
    return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()


def train(data: Path, out: Path, config: SupervisedConfig, *, init: Path | None = None) -> None:
    """Runs or resumes a training.

    Args:
        data: folder with ``split.csv``.
        out: folder of the run; a checkpoint in it is resumed.
        config: settings; must equal the run's when resuming.
        init: weights to start from, or None for random ones.

    Raises:
        InputError: unusable data, or the folder holds a run with other settings.
        CheckpointError: unusable start weights.
    """
    spec = PreprocessSpec(height=config.student.image_size, width=config.student.image_size)
    run = _Run(config)
    start = None
    if init is not None:
        report = load_weights(run.model, init, resize_positions=True)
        run.average.load_state_dict(run.model.state_dict())
        start = {"sha256": report.sha256, "missing": len(report.missing_heads)}
    _settle(out, config, start)
    pools = [torch.from_numpy(a) for a in _load_pools(data, spec, config)]
    checkpoint = out / "checkpoint.pt"
    if checkpoint.is_file():
        run.load(torch.load(checkpoint, weights_only=True))
    best, started = run.best, time.monotonic()
    while run.step < config.steps:
        loss = run.advance(pools, spec)
        if run.step % 50 == 0:
            rate = 50 * config.batch / (time.monotonic() - started)
            started = time.monotonic()
            print(f"step {run.step} loss {loss:.4f} {rate:.1f} images/s", flush=True)
        if run.step % config.evaluate_every == 0 or run.step == config.steps:
            dice = evaluate(run.average, pools[4], pools[5], spec)
            phantom = evaluate(run.average, pools[6], pools[7], spec)
            print(f"step {run.step} val dice {dice:.4f} phantom dice {phantom:.4f}", flush=True)
            if dice > best:
                best = run.best = dice
                save_file(_plain_state(run.average), out / "best.safetensors")
            torch.save(run.state(), out / "checkpoint.tmp")
            (out / "checkpoint.tmp").replace(checkpoint)
            started = time.monotonic()
    save_file(_plain_state(run.average), out / "last.safetensors")


def _settle(out: Path, config: SupervisedConfig, start: dict[str, object] | None) -> None:
    """Writes the run's settings, or checks that the run in the folder has the same."""
    text = json.dumps({"version": RUN_VERSION, **asdict(config), "init": start}, indent=1)
    path = out / "config.json"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{out} holds a run with other settings: resume it with the same ones or name another folder")
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.contiguous() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}


def _load_pools(data: Path, spec: PreprocessSpec, config: SupervisedConfig) -> list[np.ndarray]:
    train_images, train_masks = to_arrays(read_table(data, "train"), spec)
    val_images, val_masks = to_arrays(read_table(data, "val"), spec)
    phantoms = [make_phantom(PHANTOM_TRAIN_SEED + i) for i in range(config.num_phantoms)]
    images = np.stack([preprocess(p.frame, spec)[0][0, 0] for p in phantoms])
    masks = np.stack([resize_mask(p.mask_HW, p.frame, spec) for p in phantoms])
    held = config.held_phantoms
    return [train_images, train_masks, images[held:], masks[held:], val_images, val_masks, images[:held], masks[:held]]


class _Run:
    """Everything that moves during a training, so that it can be saved and resumed."""

    def __init__(self, config: SupervisedConfig) -> None:
        torch.manual_seed(config.seed)
        self.config, self.step, self.best = config, 0, 0.0
        self.model = build_student(config.student)
        self.average = copy.deepcopy(self.model).eval()
        decay = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.generator = torch.Generator().manual_seed(config.seed)

    def advance(self, pools: list[Tensor], spec: PreprocessSpec) -> float:
        """One optimiser step; returns the loss."""
        image, mask = self._batch(pools)
        polish = self.config.polish_from is not None and self.step >= self.config.polish_from
        ranges = self.config.augment.halved() if polish else self.config.augment
        image, mask = augment(image, mask, ranges, self.generator)
        rate = self._learning_rate()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(normalise(image * 255.0, spec))
        logits = logits.float()
        loss = F.binary_cross_entropy_with_logits(logits, mask) + soft_dice_loss(logits, mask)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        self._follow()
        return float(loss.detach())

    def _batch(self, pools: list[Tensor]) -> tuple[Tensor, Tensor]:
        num_phantoms = round(self.config.batch * self.config.phantom_share)
        parts = []
        for offset, count in ((0, self.config.batch - num_phantoms), (2, num_phantoms)):
            index = torch.randint(len(pools[offset]), (count,), generator=self.generator)
            parts.append((pools[offset][index], pools[offset + 1][index]))
        image = torch.cat([p[0] for p in parts])[:, None].float() / 255.0
        return image, torch.cat([p[1] for p in parts])[:, None].float()

    def _learning_rate(self) -> float:
        c = self.config
        if self.step < c.warmup:
            return c.learning_rate * (self.step + 1) / c.warmup
        progress = (self.step - c.warmup) / max(1, c.steps - c.warmup)
        return c.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        for mean, value in zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)

    def state(self) -> dict[str, object]:
        """Everything needed to go on."""
        return {
            "version": RUN_VERSION,
            "step": self.step,
            "best": self.best,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
        }

    def load(self, state: dict[str, object]) -> None:
        """Takes up a saved state.

        Raises:
            InputError: a checkpoint of another version.
        """
        if state.get("version") != RUN_VERSION:
            raise InputError(f"checkpoint version {state.get('version')!r} is not {RUN_VERSION}: start a new run")
        self.step, self.best = int(state["step"]), float(state["best"])  # type: ignore[call-overload,arg-type]
        self.model.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.average.load_state_dict(state["average"])  # type: ignore[arg-type]
        self.optimiser.load_state_dict(state["optimiser"])  # type: ignore[arg-type]
        self.generator.set_state(state["generator"])  # type: ignore[arg-type]
        torch.set_rng_state(state["torch"])  # type: ignore[arg-type]


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, masks: Tensor, spec: PreprocessSpec) -> float:
    """Mean Dice of the thresholded logits over uint8 pictures SHW and 0/1 masks SHW."""
    model.eval()
    scores = []
    for start in range(0, len(images), 16):
        logits = model(normalise(images[start : start + 16, None].float(), spec))
        predicted = (logits > 0).flatten(1)
        truth = masks[start : start + 16].flatten(1) > 0
        overlap = (predicted & truth).sum(1).float()
        scores.append((2 * overlap + 1e-6) / (predicted.sum(1) + truth.sum(1) + 1e-6))
    return float(torch.cat(scores).mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the recipe; returns the exit code."""
    parser = argparse.ArgumentParser(description="supervised training of a segmentation student")
    parser.add_argument("--data", type=Path, required=True, help="folder with split.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; a run in it is resumed")
    parser.add_argument("--config", type=Path, default=None, help="JSON of settings; the options below go before it")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--init", type=Path, default=None, help="weights to start from")
    parser.add_argument("--polish-from", type=int, default=None, help="step from which augmentation is halved")
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args(arguments)
    try:
        given = {name: getattr(options, name) for name in ("steps", "learning_rate", "seed", "polish_from")}
        settings = {**_read_settings(options.config), **{k: v for k, v in given.items() if v is not None}}
        config = SupervisedConfig.from_json(settings)
        train(options.data, options.out, config, init=options.init)
    except EdgeError as error:
        print(f"error: {error}")
        return error.exit_code
    return 0


def _read_settings(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"settings {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"settings {path} hold no table")
    return found


if __name__ == "__main__":
    raise SystemExit(main())

__all__ = [
    "PHANTOM_TRAIN_SEED",
    "RUN_VERSION",
    "SupervisedConfig",
    "evaluate",
    "main",
    "normalise",
    "soft_dice_loss",
    "train",
]
