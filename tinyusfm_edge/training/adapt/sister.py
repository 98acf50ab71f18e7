"""A trained student as the teacher of another.

Such as the published model of its fast twin.

Both cut an image into the same patches, so tokens correspond one to one. It does not know how the other learns.

Shapes: B batch, N tokens, D width; NCHW images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.models.student import TAPS, ClassificationStudent, FeatureStudent, SegmentationStudent, Student
from tinyusfm_runtime.errors import InputError


class SisterTeacher(nn.Module):
    """A student that teaches.

    Its logits, and its patch tokens after the tapped blocks.
    """

    def __init__(self, student: Student, image_hw: tuple[int, int]) -> None:
        super().__init__()
        if isinstance(student, FeatureStudent) or student.config.depth <= TAPS[-1]:
            raise InputError("a student that teaches has a head for the task and at least 12 blocks")
        self.student: SegmentationStudent | ClassificationStudent = student
        self.width, self.image_hw = student.config.width, image_hw

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Normalised image -> logits, at the learner's size."""
        return self.seen(image_NCHW)[0]

    def seen(self, image_NCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised image -> logits, and patch tokens BND on the learner's grid."""
        hw = self.student.config.input_hw
        image = image_NCHW
        if hw != self.image_hw:
            image = F.interpolate(image, size=hw, mode="bilinear", align_corners=False, antialias=True)
        # four of (B, 1 + N, D) on the teacher's own grid
        taps = self.student.backbone.taps(image)
        if isinstance(self.student, ClassificationStudent):
            return self.student.classify(taps[-1]), [self._regrid(tap[:, 1:]) for tap in taps]
        logits = self.student.decode(taps)
        if hw != self.image_hw:
            logits = F.interpolate(logits, size=self.image_hw, mode="bilinear", align_corners=False)
        return logits, [self._regrid(tap[:, 1:]) for tap in taps]

    def patches(self, image_NCHW: Tensor) -> Tensor:
        """Patch-embedding tokens BND on the learner's grid, before positions."""
        hw = self.student.config.input_hw
        image = F.interpolate(image_NCHW, size=hw, mode="bilinear", align_corners=False, antialias=True)
        return self._regrid(self.student.backbone.patch_embed(image))

    def _regrid(self, tokens_BND: Tensor) -> Tensor:
        mine, wanted = self.student.config.grid_hw, (self.image_hw[0] // 16, self.image_hw[1] // 16)
        if mine == wanted:
            return tokens_BND
        # (B, N, D) -> (B, D, h, w), resized, and back
        square = tokens_BND.transpose(1, 2).unflatten(2, mine)
        moved = F.interpolate(square, size=wanted, mode="bilinear", align_corners=False, antialias=True)
        return torch.flatten(moved, 2).transpose(1, 2)


__all__ = ["SisterTeacher"]
