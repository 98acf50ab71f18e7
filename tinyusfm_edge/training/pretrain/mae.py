"""The plain baseline: a masked autoencoder without a teacher.

MAE, in MAE-Lite's shape for small models (methods.md 1.9).

The encoder sees a quarter of the patches; a one-block decoder of width 96 with fixed sine-cosine positions rebuilds the
others; the loss is the squared error over hidden patches, each normalised. Re-implemented from the description.

It does not know data or teachers.

Shapes: B batch, P patches, V visible patches, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyusfm_edge.models.student import Block, FeatureStudent, build_student
from tinyusfm_edge.training.pretrain.config import DistillConfig
from tinyusfm_edge.training.pretrain.distill import GREY_MEAN, GREY_STD
from tinyusfm_edge.training.pretrain.masking import PATCH
from tinyusfm_edge.training.pretrain.views import as_input


def sine_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D sine positions, 1PD.

    Vaswani et al. 2017; half of the channels for rows, half for columns.
    """
    # (width / 4,) frequencies; sine and cosine of rows, then of columns, make the width
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    # (grid, width / 4)
    place = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    # (grid, width / 2)
    line = torch.cat([place.sin(), place.cos()], 1)
    # the same for every column, (grid, grid, width / 2)
    rows = line[:, None].expand(grid, grid, -1)
    cols = line[None].expand(grid, grid, -1)
    return torch.cat([rows, cols], 2).reshape(1, grid * grid, width).float()


def patches_of(image_B1HW: Tensor) -> Tensor:
    """Grey images as patches of 256 pixels, row by row, BPD."""
    b, _, h, w = image_B1HW.shape
    # (B, h, 16, w, 16) -> (B, h, w, 16, 16) -> (B, P, 256)
    cut = image_B1HW.reshape(b, h // PATCH, PATCH, w // PATCH, PATCH)
    return cut.permute(0, 1, 3, 2, 4).reshape(b, -1, PATCH * PATCH)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rebuilt:
    """Hidden patches, rebuilt.

    Attributes:
        decoded_BPD: inputs of the last layer.
        rebuilt_BPK: its outputs, 256 pixels a patch.
        target_BPK: what they should be.
    """

    decoded_BPD: Tensor
    rebuilt_BPK: Tensor
    target_BPK: Tensor


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
        self.positions: Tensor
        self.register_buffer("positions", sine_positions(student.backbone.grid_hw[0], mae.width), persistent=False)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of a batch.

        ``image`` is B1HW in 0..1, ``order`` BP, a random order of the patches.
        """
        found = self.predict(batch["image"], batch["order"])
        loss = (found.rebuilt_BPK.float() - found.target_BPK).square().mean()
        return loss, {"rebuild_mae": loss.detach()}

    def predict(self, image_B1HW: Tensor, order_BP: Tensor) -> Rebuilt:
        """Rebuilds the hidden patches.

        Args:
            image_B1HW: brightness 0..1.
            order_BP: an order of the patches; its head is seen, its tail hidden.
        """
        backbone, mae = self.student.backbone, self.config.mae
        count = order_BP.shape[1]
        # (B, V) seen and (B, P - V) hidden patches
        kept, gone = order_BP.split([seen := max(1, round(count * (1 - mae.ratio))), count - seen], 1)
        # (B, 1 + P, D), positions already added, so patches may be dropped in any order
        x = backbone.embed(as_input(image_B1HW))
        # (B, 1 + V, D): the encoder sees a quarter of the patches at a ratio of 0.75
        x = torch.cat([x[:, :1], _take(x[:, 1:], kept)], 1)
        for block in backbone.blocks:
            x = block(x)
        # (B, V, decoder's width), without the class token
        shown = self.embed(backbone.norm(x)[:, 1:])
        # (B, P - V, width): one learned vector for every hidden patch
        hidden = self.mask_token.to(shown.dtype).expand(len(shown), count - seen, -1)
        # argsort of an order is its inverse: tokens go back to their places, then get positions
        y = _take(torch.cat([shown, hidden], 1), order_BP.argsort(1)) + self.positions
        for block in self.blocks:
            y = block(y)
        # only hidden patches are rebuilt and compared
        decoded = _take(self.norm(y), gone)
        target = _take(patches_of((image_B1HW - GREY_MEAN) / GREY_STD), gone)
        if mae.norm_pixels:
            # each patch by its own mean and deviation (He et al. 2022, normalised pixels)
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return Rebuilt(decoded_BPD=decoded, rebuilt_BPK=self.head(decoded), target_BPK=target)


def _take(tokens_BPD: Tensor, index_BV: Tensor) -> Tensor:
    return tokens_BPD.gather(1, index_BV[..., None].expand(-1, -1, tokens_BPD.shape[-1]))


__all__ = ["MaeObjective", "Rebuilt", "patches_of", "sine_positions"]
