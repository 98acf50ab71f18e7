"""Settings of a task adaptation: one frozen table.

It is written into every run and read back from it.

Where the source recipe is silent or tuned to another start, the value is our choice (methods.md 1.7, 4, 5); each is a
named field. It does not know data or training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tinyusfm_edge.models.student import StudentConfig
from tinyusfm_edge.training.adapt.augment import AugmentConfig
from tinyusfm_runtime.errors import InputError

KINDS = ("logits", "features", "csf", "patches", "glmixer", "assistant")
"""What can be distilled from an adapted teacher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptConfig:
    """Settings of one run.

    Attributes:
        steps: optimiser steps.
        batch: samples per step.
        learning_rate: peak learning rate of the last layer.
        layer_decay: factor on the learning rate from one layer to the one below, (0, 1]; 1 switches it off.
        weight_decay: on tensors of two or more axes.
        warmup: steps of linear warm-up.
        ema: decay of the weights' moving average, per step.
        clip: largest norm of the gradient.
        evaluate_every: steps between evaluations and checkpoints.
        seed: of everything but the choice of labels.
        labels: share of the labelled training images that is used, (0, 1].
        labels_seed: of the order in which patients enter that share.
        balance: weigh classes by the inverse of their frequency (classification).
        smoothing: label smoothing, 0..1 (classification).
        precision: ``fp32``, ``bf16`` for autocast, which a CPU without bf16 units only emulates, or ``natural``: what
            the machine computes in.
        phantom_share: fraction of synthetic fetal heads in a batch, 0..1 (segmentation).
        num_phantoms: distinct phantoms drawn before training, if any.
        held_phantoms: of them, kept for evaluation.
        masks: ``file`` learns the table's masks, ``ellipse`` those drawn from its ``ellipses.csv`` (segmentation).
        repeat_small: how many times an epoch a small head comes (segmentation with stated circumferences).
        small_mm: a head of a smaller circumference is small; 108 mm is the end of the first trimester.
        deep: weight of the losses of the head's maps at 1/4 and 1/8 of the image, each by a layer of its own that is
            thrown away (segmentation); 0 has none.
        border: by how much more a pixel at the mask's border weighs in the cross-entropy than one elsewhere.
        drop_tokens: largest share of patches that are left out of a training step, drawn for each batch; their features
            are 0. For a student that shall bear missing patches (segmentation).
        negative_share: fraction of a batch that holds nothing to segment, an empty mask, 0..1 (segmentation).
        reading: how files of the data are read, as it is typed (data/reading.py); empty where nothing was asked for.
        student: architecture.
        augment: ranges.
        polish_from: step from which the ranges of the augmentation are halved, or None.
        kd: what is distilled from an adapted teacher: ``logits``, ``features``, ``csf``, ``patches``,
            ``glmixer``, ``assistant``; none without one.
        temperature: of the logits' distillation.
        kd_logits: weight of the logits' term.
        kd_features: weight of the tokens' cosine term.
        kd_csf: weight of TransKD's fused context loss.
        lora_rank: of the teacher's adapters; 0 trains its head alone.
        teacher_steps: steps in which the teacher is adapted.
        teacher_learning_rate: its peak.
        teacher_margin: by how much the teacher's validation score must be above that of the student it is compared
            with; else it is refused.
        transfer_share: fraction of a batch that has no labels and feels the distillation terms alone, 0..1.
        num_synthetic: synthetic images in the transfer set, beside the unlabelled ones of the training split.
        exits_kl: weight of the early exits' KL to the last answer.
    """

    steps: int = 300
    batch: int = 16
    learning_rate: float = 6e-4
    layer_decay: float = 0.8
    weight_decay: float = 0.05
    warmup: int = 30
    ema: float = 0.998
    clip: float = 1.0
    evaluate_every: int = 50
    seed: int = 42
    labels: float = 1.0
    labels_seed: int = 0
    balance: bool = True
    smoothing: float = 0.05
    precision: Literal["fp32", "bf16", "natural"] = "fp32"
    phantom_share: float = 0.0
    num_phantoms: int = 600
    held_phantoms: int = 48
    masks: Literal["file", "ellipse"] = "file"
    repeat_small: int = 1
    small_mm: float = 108.0
    deep: float = 0.0
    border: float = 0.0
    drop_tokens: float = 0.0
    negative_share: float = 0.0
    reading: Mapping[str, Any] = field(default_factory=dict)
    student: StudentConfig = field(default_factory=lambda: StudentConfig(drop_path=0.05))
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    polish_from: int | None = None
    kd: tuple[str, ...] = ()
    temperature: float = 4.0
    kd_logits: float = 1.0
    kd_features: float = 0.5
    kd_csf: float = 1.0
    lora_rank: int = 4
    teacher_steps: int = 200
    teacher_learning_rate: float = 1e-3
    teacher_margin: float = 0.005
    transfer_share: float = 0.0
    num_synthetic: int = 500
    exits_kl: float = 0.5

    def __post_init__(self) -> None:
        """Checks what would otherwise fail late.

        Raises:
            InputError: a value out of its range, or a student that has no task.
        """
        if min(self.steps, self.batch, self.evaluate_every) < 1 or not 0.0 <= self.phantom_share < 1.0:
            raise InputError("steps, batch and evaluate_every must be at least 1, phantom_share in [0, 1)")
        if not 0.0 < self.layer_decay <= 1.0 or not 0.0 < self.labels <= 1.0:
            raise InputError("layer_decay and labels must lie in (0, 1]")
        if self.precision not in ("fp32", "bf16", "natural"):
            raise InputError(f"precision {self.precision!r} is unknown: use fp32, bf16 or natural")
        if self.phantom_share > 0.0 and not 0 < self.held_phantoms < self.num_phantoms:
            raise InputError(
                f"{self.held_phantoms} of {self.num_phantoms} phantoms held: some must be left for training"
            )
        if self.masks not in ("file", "ellipse") or self.repeat_small < 1 or min(self.deep, self.border) < 0:
            raise InputError("masks is file or ellipse, repeat_small at least 1, deep and border are not negative")
        if not 0.0 <= self.drop_tokens < 1.0:
            raise InputError(f"drop_tokens must lie in [0, 1), not {self.drop_tokens:g}")
        if self.student.task == "classify" and (self.deep or self.border or self.drop_tokens or self.repeat_small > 1):
            raise InputError("deep, border, drop_tokens and repeat_small are about masks, and this is a classifier")
        if not 0.0 <= self.negative_share < 1.0:
            raise InputError(f"negative_share must lie in [0, 1), not {self.negative_share:g}")
        if self.student.task == "classify" and self.negative_share > 0.0:
            raise InputError("negatives have an empty mask and no class: negative_share must be 0 for a classifier")
        if self.student.task == "features":
            raise InputError("a features student has no task to adapt to: use segment or classify")
        if self.student.task == "segment" and self.student.outputs != 1:
            raise InputError("segmentation is adapted to one mask: tables hold binary masks")
        if self.student.task == "classify" and self.phantom_share > 0.0:
            raise InputError("phantoms have masks and no class: phantom_share must be 0 for a classifier")
        self._check_distillation()

    def _check_distillation(self) -> None:
        unknown = sorted(set(self.kd) - set(KINDS))
        if unknown:
            raise InputError(f"distillation of {unknown[0]!r} is unknown: use some of {', '.join(KINDS)}")
        if min(self.temperature, self.teacher_learning_rate) <= 0 or self.teacher_steps < 1:
            raise InputError("temperature, teacher_learning_rate and teacher_steps must be above 0")
        if not 0.0 <= self.transfer_share < 1.0 or min(self.lora_rank, self.num_synthetic) < 0:
            raise InputError("transfer_share must lie in [0, 1), lora_rank and num_synthetic must not be negative")
        if self.transfer_share > 0.0 and not self.kd:
            raise InputError("a transfer set is for distillation: name what is distilled, or set transfer_share to 0")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"student": self.student.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdaptConfig:
        """Reads settings, such as the ``adapt`` table of a run's ``config.json``.

        What is not named keeps its default.

        Raises:
            InputError: unknown keys or impossible values.
        """
        values = dict(data)
        try:
            student = {**StudentConfig(drop_path=0.05).to_json(), **values.pop("student", {})}
            changes = values.pop("augment", {})
            pairs: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()
            }
            kd = tuple(values.pop("kd", ()))
            return cls(student=StudentConfig.from_json(student), augment=AugmentConfig(**pairs), kd=kd, **values)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"run settings are not usable: {error}") from error


__all__ = ["KINDS", "AdaptConfig"]
