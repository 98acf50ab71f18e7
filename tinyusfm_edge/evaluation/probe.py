"""The token probe: how well a mask can be read off frozen tokens.

A linear read-out of a backbone's tokens, without training the backbone.

Each patch's share of the mask is predicted from its token by ridge regression on training images and scored by R2 on
others. It takes seconds, and tells starts and losses apart before anything is adapted. It does not know how the
backbone was made.

Shapes: S images, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tinyusfm_edge.models.student import Student
from tinyusfm_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeScore:
    """What a block's tokens tell.

    Attributes:
        block: counted from 1.
        r2: share of the variance of the patches' coverage that is explained on held-out images; can be negative.
    """

    block: int
    r2: float


@torch.no_grad()
def block_tokens(student: Student, images_S3HW: Tensor, blocks: Sequence[int], *, batch: int = 16) -> list[Tensor]:
    """Patch tokens SPD after the named blocks, counted from 1, in evaluation mode."""
    student.eval()
    indices = tuple(sorted(block - 1 for block in blocks))
    parts = [
        student.backbone.taps(images_S3HW[start : start + batch], indices)
        for start in range(0, len(images_S3HW), batch)
    ]
    return [torch.cat([part[i][:, 1:] for part in parts]) for i in range(len(indices))]


def coverage(masks_SHW: Tensor, patch: int = 16) -> Tensor:
    """Share of each patch that lies in the mask, SP.

    Args:
        masks_SHW: 0..1.
        patch: side of a patch.
    """
    return F.avg_pool2d(masks_SHW[:, None].float(), patch).flatten(1)


def probe(
    student: Student,
    train: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    blocks: Sequence[int],
    *,
    penalty: float = 1.0,
) -> list[ProbeScore]:
    """Scores a student's blocks.

    Args:
        student: any.
        train: normalised images S3HW and masks SHW 0..1 to fit on.
        held: the same of other patients, to score on.
        blocks: counted from 1, rising.
        penalty: of the ridge, on standardised tokens.

    Raises:
        InputError: nothing to fit or to score on, or held-out masks that do not vary.
    """
    if not len(train[0]) or not len(held[0]):
        raise InputError("the probe needs images to fit on and others to score on")
    truth = [coverage(masks).flatten().double().numpy() for _, masks in (train, held)]
    if truth[1].var() == 0:
        raise InputError("the held-out masks are all alike: there is nothing to explain")
    found = []
    fitted, scored = (block_tokens(student, images, blocks) for images, _ in (train, held))
    for block, one, two in zip(sorted(blocks), fitted, scored, strict=True):
        a, b = (x.flatten(0, 1).double().numpy() for x in (one, two))
        mean, sd = a.mean(0), a.std(0) + 1e-6
        a, b = (a - mean) / sd, (b - mean) / sd
        weights = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ (truth[0] - truth[0].mean()))
        error = truth[1] - truth[0].mean() - b @ weights
        found.append(ProbeScore(block=block, r2=float(1 - np.mean(error**2) / truth[1].var())))
    return found


__all__ = ["ProbeScore", "block_tokens", "coverage", "probe"]
