"""Settings of a transfer set.

It knows neither models nor files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tinyusfm_edge.training.trainer.loop import Precision, TrainerConfig, natural_precision
from tinyusfm_runtime.errors import InputError

METHODS = ("diffusion", "warp")
"""Generators there are."""
LEAST_SAMPLES = 16
"""Samples below which a Frechet distance says nothing."""
MOST_SAMPLES = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionConfig:
    """The diffusion model: sizes, training, sampling (our choice; methods.md 5).

    Attributes:
        fold: side of the squares of pixels that become channels; 2 makes every layer four times cheaper.
        width: channels of the first level; the next have 2 and 3 times as many.
        depth: residual blocks a level.
        levels: of the U-Net, each at half the size of the one before.
        noise_levels: of the diffusion.
        steps: optimiser steps.
        batch: pairs per step.
        learning_rate: peak.
        warmup: steps of linear warm-up, then cosine.
        ema: decay of the weights' moving average, which samples.
        checkpoint_every: steps between checkpoints.
        precision: ``fp32``, ``bf16``, or ``natural``: what the machine computes in.
        sampling_steps: network passes a sample takes.
    """

    fold: int = 2
    width: int = 64
    depth: int = 2
    levels: int = 3
    noise_levels: int = 1000
    steps: int = 20_000
    batch: int = 32
    learning_rate: float = 2e-4
    warmup: int = 200
    ema: float = 0.999
    checkpoint_every: int = 100
    precision: Literal["fp32", "bf16", "natural"] = "natural"
    sampling_steps: int = 50

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a count below 1, a width that is no multiple of 8, or more sampling steps than noise levels.
        """
        if min(self.fold, self.depth, self.levels, self.noise_levels, self.sampling_steps) < 1:
            raise InputError("fold, depth, levels, noise_levels and sampling_steps must be at least 1")
        if self.width < 8 or self.width % 8:
            raise InputError(f"width {self.width} must be a multiple of 8")
        if self.sampling_steps > self.noise_levels:
            raise InputError("sampling_steps must not be above noise_levels")

    def loop(self, seed: int) -> TrainerConfig:
        """Settings of the training loop."""
        precision: Precision = natural_precision() if self.precision == "natural" else self.precision
        return TrainerConfig(
            steps=self.steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            final_learning_rate=0.1 * self.learning_rate,
            warmup=self.warmup,
            clip=1.0,
            precision=precision,
            seed=seed,
            checkpoint_every=self.checkpoint_every,
            ema=self.ema,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeConfig:
    """When a set may be used.

    Attributes:
        teacher_size: side of the images that the teacher sees, pixels; rounded to whole patches.
        near: share of validation frames that are closer to training than what counts as a copy, (0, 1): the distance
            below which a sample is refused is this quantile of theirs.
        most_near: largest share of samples that may be refused, [0, 1).
    """

    teacher_size: int = 112
    near: float = 0.02
    most_near: float = 0.1

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a share out of its range.
        """
        if not 0 < self.near < 1 or not 0 <= self.most_near < 1 or self.teacher_size < 1:
            raise InputError("near lies in (0, 1), most_near in [0, 1), teacher_size is at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """A transfer set.

    Attributes:
        method: one of ``METHODS``.
        count: pairs that are wanted, ``LEAST_SAMPLES`` to ``MOST_SAMPLES``.
        image_size: rows and columns of a pair.
        seed: of everything.
        piece: pairs that are sampled and kept at a time.
        diffusion: of the method of that name.
        judge: when it may be used.
    """

    method: Literal["diffusion", "warp"] = "diffusion"
    count: int = 500
    image_size: int = 64
    seed: int = 0
    piece: int = 16
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a count out of its range, or a size that the U-Net cannot halve.
        """
        if self.method not in METHODS:
            raise InputError(f"method {self.method!r}: use {', '.join(METHODS)}")
        if not LEAST_SAMPLES <= self.count <= MOST_SAMPLES or self.piece < 1:
            raise InputError(f"count must be {LEAST_SAMPLES} to {MOST_SAMPLES}, piece at least 1")
        unit = self.diffusion.fold * 2 ** (self.diffusion.levels - 1)
        if self.image_size < 16 or self.image_size % unit:
            raise InputError(f"image_size {self.image_size} must be at least 16 and a multiple of {unit}")


__all__ = ["LEAST_SAMPLES", "METHODS", "MOST_SAMPLES", "DiffusionConfig", "JudgeConfig", "TransferConfig"]
