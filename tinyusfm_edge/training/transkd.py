"""TransKD for an isotropic ViT: cross selective fusion, hierarchical context loss, patch-embedding alignment.

After Liu et al. (arXiv 2202.13393), re-implemented from methods.md 4; no code copied. There four stages differ in
size; here the "stages" are blocks 4, 6, 8 and 12 on one grid, so fusion needs no up-sampling (our choice), and there is
one patch embedding (weight .1). GL-Mixer and embedding assistant are left out: below .5 mIoU in the source. All of it
exists in training only.

Shapes: B batch, C channels, hw the token grid, N tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MID, REDUCED = 64, 32
"""Channels of the fusion and of its attention (m and len in the source)."""
POOLS = (4, 2, 1)
"""Sides of the pooled maps in the context loss."""
PATCH_WEIGHT = 0.1
"""Weight of the patch-embedding alignment: that of the source's first stage."""


class SelectiveFusion(nn.Module):
    """Fuses one stage with what came from deeper stages, by a softmax over the two, channel by channel."""

    def __init__(self, student_width: int, teacher_width: int, *, deepest: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(student_width, MID, 1, bias=False), nn.BatchNorm2d(MID))
        self.leave = nn.Sequential(
            nn.Conv2d(MID, teacher_width, 3, padding=1, bias=False), nn.BatchNorm2d(teacher_width)
        )
        self.deepest = deepest
        if not deepest:
            self.squeeze, self.norm = nn.Conv2d(MID, REDUCED, 1, bias=False), nn.BatchNorm2d(REDUCED)
            self.choose = nn.ModuleList(nn.Conv2d(REDUCED, MID, 1) for _ in range(2))

    def forward(self, stage_BChw: Tensor, deeper_BChw: Tensor | None) -> tuple[Tensor, Tensor]:
        """A stage's map and the fused map of the deeper one -> map at the teacher's width, fused map."""
        x = self.enter(stage_BChw)
        if deeper_BChw is None:
            return self.leave(x), x
        u = self.squeeze((x + deeper_BChw).mean((2, 3), keepdim=True))
        # one picture has no batch statistics at 1x1
        v = F.relu(self.norm(u) if len(u) > 1 or not self.training else u)
        weights = torch.stack([conv(v) for conv in self.choose]).softmax(0)
        fused = weights[0] * x + weights[1] * deeper_BChw
        return self.leave(fused), fused


class TransKd(nn.Module):
    """The distillation terms: fused stages against the teacher's, and patch embeddings."""

    def __init__(self, student_width: int, teacher_width: int, stages: int) -> None:
        super().__init__()
        self.fusions = nn.ModuleList(
            SelectiveFusion(student_width, teacher_width, deepest=index == stages - 1) for index in range(stages)
        )
        self.align = nn.Linear(student_width, teacher_width)

    def fuse(self, stages_BChw: list[Tensor]) -> list[Tensor]:
        """Maps of the stages, shallow first -> maps at the teacher's width, in the same order."""
        found: list[Tensor] = []
        deeper: Tensor | None = None
        for fusion, stage in zip(reversed(list(self.fusions)), reversed(stages_BChw), strict=True):
            out, deeper = fusion(stage, deeper)
            found.append(out)
        return found[::-1]

    def context(self, stages_BChw: list[Tensor], teacher_BChw: list[Tensor]) -> Tensor:
        """Hierarchical context loss of all stages."""
        pairs = zip(self.fuse(stages_BChw), teacher_BChw, strict=True)
        return torch.stack([context_loss(mine, theirs.detach()) for mine, theirs in pairs]).sum()

    def patches(self, student_BND: Tensor, teacher_BND: Tensor) -> Tensor:
        """Weighted mean squared distance of aligned patch embeddings."""
        return PATCH_WEIGHT * F.mse_loss(self.align(student_BND), teacher_BND.detach())


def context_loss(student_BChw: Tensor, teacher_BChw: Tensor) -> Tensor:
    """Mean squared distance of maps and of their pooled forms, weights 1, 1/2, 1/4, 1/8, divided by their sum.

    Args:
        student_BChw: at the teacher's width.
        teacher_BChw: of the same shape.
    """
    loss, total = F.mse_loss(student_BChw, teacher_BChw), 1.0
    for number, side in enumerate(POOLS, 1):
        if side >= student_BChw.shape[-2]:
            continue
        weight = 0.5**number
        mine, theirs = (F.adaptive_avg_pool2d(x, side) for x in (student_BChw, teacher_BChw))
        loss, total = loss + weight * F.mse_loss(mine, theirs), total + weight
    return loss / total


__all__ = ["MID", "PATCH_WEIGHT", "POOLS", "REDUCED", "SelectiveFusion", "TransKd", "context_loss"]
