"""Frames as a teacher sees them: the mean patch token of its last block.

Channels are standardised over the training frames: a few channels of a teacher hold most of the energy.

Shapes: N frames, SS rows and columns, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tinyusfm_edge.models.teachers import Teacher
from tinyusfm_edge.training.pretrain.views import as_input
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
BATCH = 32
"""Frames at a time."""


def untracked(items: Iterable[Any], _label: str, _total: int) -> Iterable[Any]:
    """Items without a progress bar."""
    return items


@torch.no_grad()
def pooled_features(teacher: Teacher, images_NSS: np.ndarray, size: int, track: Track = untracked) -> np.ndarray:
    """Mean patch token of every frame after the last block.

    Args:
        teacher: frozen.
        images_NSS: uint8.
        size: side of what the teacher sees, rounded to whole patches of it.
        track: wraps the batches for a progress bar.

    Returns:
        float64 ND, not standardised.

    Raises:
        InputError: no frame.
    """
    if not len(images_NSS):
        raise InputError("there is no frame to look at")
    side = max(1, round(size / teacher.patch)) * teacher.patch
    starts = range(0, len(images_NSS), BATCH)
    found = []
    for start in track(starts, "teacher's features", len(starts)):
        part = torch.from_numpy(np.ascontiguousarray(images_NSS[start : start + BATCH]))[:, None].float() / 255
        shown = F.interpolate(part, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        tokens = teacher.tokens(as_input(shown.clamp(0, 1)), (teacher.depth,))[0]
        found.append(tokens.float().mean(1).double().numpy())
    return np.concatenate(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureScale:
    """Mean and standard deviation of each feature over the training frames.

    Attributes:
        mean_D: float64.
        sd_D: float64, at least a thousandth of the median one.
    """

    mean_D: np.ndarray
    sd_D: np.ndarray

    @classmethod
    def of(cls, features_ND: np.ndarray) -> FeatureScale:
        """That of some frames."""
        sd = features_ND.std(0)
        return cls(mean_D=features_ND.mean(0), sd_D=np.maximum(sd, max(1e-3 * float(np.median(wide(sd))), 1e-12)))

    def __call__(self, features_ND: np.ndarray) -> np.ndarray:
        """Features in standard deviations from the mean."""
        return (features_ND - self.mean_D) / self.sd_D


__all__ = ["BATCH", "FeatureScale", "Track", "pooled_features", "untracked"]
