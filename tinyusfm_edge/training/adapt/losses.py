"""Losses of task adaptation.

Masks, classes, and what a student learns from a teacher's logits and features.

Each is a plain function of tensors. Weights between them are the recipe's (adapt.py). Formulas: soft Dice after
Milletari et al. 2016; distillation of logits after Hinton et al. 2015 with the T^2 factor; features by cosine
(methods.md 5).

Shapes: B batch, K classes, N tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BORDER = 3
"""Pixels on each side of a mask's border that count as border."""


def soft_dice_loss(logits_B1HW: Tensor, target_B1HW: Tensor) -> Tensor:
    """1 - soft Dice per sample, mean over the batch.

    Milletari et al. 2016, with squared denominators dropped.
    """
    # (B, H W) each; + 1 above and below keeps an empty mask that is found empty at a loss of 0
    p = torch.sigmoid(logits_B1HW).flatten(1)
    t = target_B1HW.flatten(1)
    return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()


def mask_loss(logits_B1HW: Tensor, target_B1HW: Tensor, border: float = 0.0) -> Tensor:
    """Binary cross-entropy plus soft Dice.

    Args:
        logits_B1HW: one logit a pixel.
        target_B1HW: 0..1.
        border: by how much more a pixel within ``BORDER`` pixels of the mask's border weighs in the cross-entropy.
    """
    weight = 1.0 + border * border_of(target_B1HW) if border else None
    entropy = F.binary_cross_entropy_with_logits(logits_B1HW, target_B1HW, weight=weight)
    if weight is not None:
        # a border weight moves the loss to the border, not its size
        entropy = entropy / weight.mean()
    return entropy + soft_dice_loss(logits_B1HW, target_B1HW)


def border_of(mask_B1HW: Tensor) -> Tensor:
    """Where a mask of 0..1 changes within ``BORDER`` pixels, 0..1."""
    side = 2 * BORDER + 1
    # dilation and erosion by a square of 7 pixels; they differ near a border only
    most, least = F.max_pool2d(mask_B1HW, side, 1, BORDER), -F.max_pool2d(-mask_B1HW, side, 1, BORDER)
    return most - least


def class_loss(logits_BK: Tensor, target_B: Tensor, weights_K: Tensor | None, smoothing: float) -> Tensor:
    """Cross-entropy.

    Args:
        logits_BK: one logit a class.
        target_B: true classes, int64.
        weights_K: of the classes, or None for equal ones.
        smoothing: share of the target spread over all classes, 0..1.
    """
    return F.cross_entropy(logits_BK, target_B, weight=weights_K, label_smoothing=smoothing)


def logit_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of tempered answers, mean over samples (and pixels).

    One channel is a Bernoulli answer (sigmoid), several are a categorical one (softmax over axis 1).

    Args:
        student: logits BK or BKHW.
        teacher: logits of the same shape, detached.
        temperature: T, more than 0.
    """
    s, t = student / temperature, teacher.detach() / temperature
    if student.shape[1] == 1:
        # (B, 1, H, W): KL of two Bernoulli answers; logsigmoid stays finite where a logarithm would not
        p = torch.sigmoid(t)
        kl = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    else:
        # (B, K[, H, W]) -> summed over K
        log_t = F.log_softmax(t, 1)
        kl = (log_t.exp() * (log_t - F.log_softmax(s, 1))).sum(1)
    # gradients shrink with T^2 (Hinton et al. 2015): taken back here
    return temperature**2 * kl.mean()


def feature_distillation(student_BND: Tensor, teacher_BND: Tensor) -> Tensor:
    """1 - cosine of corresponding tokens, mean (methods.md 5).

    Args:
        student_BND: projected to the teacher's width.
        teacher_BND: detached here.
    """
    return (1 - F.cosine_similarity(student_BND, teacher_BND.detach(), dim=-1)).mean()


__all__ = [
    "BORDER",
    "border_of",
    "class_loss",
    "feature_distillation",
    "logit_distillation",
    "mask_loss",
    "soft_dice_loss",
]
