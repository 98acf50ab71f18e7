"""The plain baseline: a masked autoencoder without a teacher (MAE, in MAE-Lite's shape for small nets, methods.md 1.9).

The encoder sees a quarter of the patches; a one-block decoder of width 96 with fixed sine-cosine positions rebuilds the
others; the loss is the squared error over hidden patches, each normalised. Re-implemented from the description.

It does not know data or teachers.

Shapes: B batch, P patches, V visible patches, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinyusfm_edge.models.student import Block, FeatureStudent, build_student
from tinyusfm_edge.training.distill import GREY_MEAN, GREY_STD
from tinyusfm_edge.training.distill_config import DistillConfig
from tinyusfm_edge.training.masking import PATCH
from tinyusfm_edge.training.views import as_input


def sine_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D positions (Vaswani et al. 2017, half of the channels for rows, half for columns), 1PD."""
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    place = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([place.sin(), place.cos()], 1)
    rows = line[:, None].expand(grid, grid, -1)
    cols = line[None].expand(grid, grid, -1)
    return torch.cat([rows, cols], 2).reshape(1, grid * grid, width).float()


def patches_of(image_B1HW: Tensor) -> Tensor:
    """Grey pictures as patches of 256 pixels, row by row, BPD."""
    b, _, h, w = image_B1HW.shape
    cut = image_B1HW.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH)
    return cut.permute(0, 1, 3, 2, 4).reshape(b, -1, PATCH * PATCH)


class MaeObjective(nn.Module):
    """Student encoder, small decoder; ``forward`` gives the loss."""

    def __init__(self, config: DistillConfig) -> None:
        super().__init__()
        self.config = config
        student = build_student(config.built_student)
        assert isinstance(student, FeatureStudent)
        self.student = student
        width, mae = config.student.width, config.mae
        self.embed = nn.Linear(width, mae.width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, mae.width))
        self.blocks = nn.ModuleList(Block(mae.width, mae.heads, 0.0) for _ in range(mae.depth))
        self.norm = nn.LayerNorm(mae.width, eps=1e-6)
        self.head = nn.Linear(mae.width, PATCH * PATCH)
        self.register_buffer("positions", sine_positions(student.backbone.grid, mae.width), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of a batch: ``image`` B1HW 0..1, ``order`` BP, a random order of the patches."""
        image, order = batch["image"], batch["order"]
        backbone, mae = self.student.backbone, self.config.mae
        count = order.shape[1]
        kept = order[:, : max(1, round(count * (1 - mae.ratio)))]
        x = backbone.embed(as_input(image))
        x = torch.cat([x[:, :1], _take(x[:, 1:], kept)], 1)
        for block in backbone.blocks:
            x = block(x)
        seen = self.embed(backbone.norm(x)[:, 1:])
        hidden = self.mask_token.to(seen.dtype).expand(len(seen), count - seen.shape[1], -1)
        y = _take(torch.cat([seen, hidden], 1), order.argsort(1)) + self.positions
        for block in self.blocks:
            y = block(y)
        rebuilt = self.head(self.norm(y)).float()
        target = patches_of((image - GREY_MEAN) / GREY_STD)
        if mae.norm_pixels:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (rebuilt - target).square().mean(-1)
        loss = _take(error[..., None], order[:, kept.shape[1] :]).mean()
        return loss, {"rebuild_mae": loss.detach()}


def _take(tokens_BPD: Tensor, index_BV: Tensor) -> Tensor:
    return tokens_BPD.gather(1, index_BV[..., None].expand(-1, -1, tokens_BPD.shape[-1]))


__all__ = ["MaeObjective", "patches_of", "sine_positions"]
