"""TransKD for an isotropic ViT.

Cross selective fusion, hierarchical context loss, patch-embedding alignment.

After Liu et al. (arXiv 2202.13393), re-implemented from methods.md 4; no code copied. There four stages differ in
size; here the "stages" are blocks 4, 6, 8 and 12 on one grid, so fusion needs no up-sampling (our choice), and there is
one patch embedding (weight .1). The source's GL-Mixer mixes the embeddings of its fourth stage; a ViT has one
embedding, so here it mixes the tokens after block 12 (our choice). All of it exists in training only.

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
    """Fuses one stage with what came from deeper stages.

    By a softmax over the two, channel by channel.
    """

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
        """A stage's map and the deeper fused map -> two maps.

        They are the map at the teacher's width and the fused map.
        """
        # (B, MID, h, w)
        x = self.enter(stage_BChw)
        if deeper_BChw is None:
            return self.leave(x), x
        # (B, REDUCED, 1, 1): what both maps hold on average
        u = self.squeeze((x + deeper_BChw).mean((2, 3), keepdim=True))
        # one image has no batch statistics at 1x1
        v = F.relu(self.norm(u) if len(u) > 1 or not self.training else u)
        # (2, B, MID, 1, 1), softmax over the two: the shares add to 1 in each channel
        weights = torch.stack([conv(v) for conv in self.choose]).softmax(0)
        fused = weights[0] * x + weights[1] * deeper_BChw
        return self.leave(fused), fused


class GlobalLocalMixer(nn.Module):
    """GL-Mixer: attention over all tokens, and a gated convolution along them.

    The two are weighed by two learned numbers.

    ``w_a MHSA(e) + w_c [conv(e) * sigmoid(conv(e))]``; the source leaves both numbers unset, here they start at 1.
    """

    def __init__(self, student_width: int, teacher_width: int, heads: int = 4) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(student_width, heads, batch_first=True)
        self.value = nn.Conv1d(student_width, student_width, 3, padding=1)
        self.gate = nn.Conv1d(student_width, student_width, 3, padding=1)
        self.weights = nn.Parameter(torch.ones(2))
        self.align = nn.Linear(student_width, teacher_width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        """Student's tokens -> mixed tokens at the teacher's width."""
        # (B, D, N): tokens as a sequence, row by row
        along = tokens_BND.transpose(1, 2)
        # gated convolution over three neighbours, back to (B, N, D)
        local = (self.value(along) * torch.sigmoid(self.gate(along))).transpose(1, 2)
        # (B, N, D)
        whole = self.attend(tokens_BND, tokens_BND, tokens_BND, need_weights=False)[0]
        mixed: Tensor = self.align(self.weights[0] * whole + self.weights[1] * local)
        return mixed


class EmbeddingAssistant(nn.Module):
    """EA: an overlapping patch embedding at the teacher's width.

    It stands beside the aligned embedding of the student.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.align = nn.Linear(student_width, teacher_width)
        self.embed = nn.Conv2d(3, teacher_width, 28, 16, padding=6)
        self.weights = nn.Parameter(torch.full((2,), PATCH_WEIGHT))

    def forward(self, patches_BND: Tensor, image_NCHW: Tensor) -> Tensor:
        """Student's patch embedding and image -> ``w_p PEA + w_e EA``.

        BND at the teacher's width.
        """
        # kernel 28, stride 16, padding 6: the same grid, neighbours overlap by 12 pixels -> (B, N, D')
        extra = self.embed(image_NCHW).flatten(2).transpose(1, 2)
        joined: Tensor = self.weights[0] * self.align(patches_BND) + self.weights[1] * extra
        return joined


class TransKd(nn.Module):
    """The distillation terms of TransKD.

    Fused stages against the teacher's, and patch embeddings.
    """

    def __init__(self, student_width: int, teacher_width: int, stages: int) -> None:
        super().__init__()
        self.fusions = nn.ModuleList(
            SelectiveFusion(student_width, teacher_width, deepest=index == stages - 1) for index in range(stages)
        )
        self.align = nn.Linear(student_width, teacher_width)

    def fuse(self, stages_BChw: list[Tensor]) -> list[Tensor]:
        """Maps of the stages -> maps at the teacher's width, in the same order.

        Shallow stages come first.
        """
        found: list[Tensor] = []
        deeper: Tensor | None = None
        # from the deepest stage up: each hands its fused map to the one before
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
    """Mean squared distance of maps and of their pooled forms.

    Weights 1, 1/2, 1/4, 1/8, divided by their sum.

    A pool that is no smaller than the map is left out, and the weight is halved after each that is used.

    Args:
        student_BChw: at the teacher's width.
        teacher_BChw: of the same shape.
    """
    loss, total, weight = F.mse_loss(student_BChw, teacher_BChw), 1.0, 1.0
    for side in POOLS:
        if side >= student_BChw.shape[-2]:
            continue
        weight /= 2
        # (B, C, side, side)
        mine, theirs = (F.adaptive_avg_pool2d(x, side) for x in (student_BChw, teacher_BChw))
        loss, total = loss + weight * F.mse_loss(mine, theirs), total + weight
    return loss / total


__all__ = [
    "MID",
    "PATCH_WEIGHT",
    "POOLS",
    "REDUCED",
    "EmbeddingAssistant",
    "GlobalLocalMixer",
    "SelectiveFusion",
    "TransKd",
    "context_loss",
]
