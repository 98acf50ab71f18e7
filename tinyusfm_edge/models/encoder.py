"""A pre-norm ViT encoder with what teachers need beyond the student's.

LayerScale, bias on q and v alone, relative positions.

Parameter names are timm's (``ls1.gamma``) or BEiT's (``gamma_1``, ``attn.q_bias``), so that official files fit as they
are. It does not know which checkpoint is loaded, or training.

Shapes: B batch, N tokens, D width, H heads; NCHW images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderShape:
    """Architecture of an encoder.

    Attributes:
        width: embedding width.
        depth: blocks.
        heads: attention heads.
        patch: rows and columns of a patch, pixels.
        grid: patches per side of the position table, or of the relative table's window.
        channels: of the image; 1 for UltraDINO, 3 else.
        registers: tokens between the class token and the patches that have no position (DINOv2 with registers).
        scale: no LayerScale, timm's names or BEiT's.
        bias: on q, k and v, or on q and v alone (BEiT).
        eps: of LayerNorm.
    """

    width: int
    depth: int
    heads: int
    patch: int
    grid: int
    channels: int = 3
    registers: int = 0
    scale: Literal["none", "timm", "beit"] = "none"
    bias: Literal["qkv", "qv"] = "qkv"
    eps: float = 1e-6


class EncoderAttention(nn.Module):
    """Multi-head self-attention with a packed projection.

    An additive bias is optional.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.heads, self.only_qv = shape.heads, shape.bias == "qv"
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=shape.bias == "qkv")
        if self.only_qv:
            self.q_bias = nn.Parameter(torch.zeros(shape.width))
            self.v_bias = nn.Parameter(torch.zeros(shape.width))
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, x_BND: Tensor, bias_HNN: Tensor | None = None) -> Tensor:
        """Tokens -> attended tokens; ``bias_HNN`` is added to the scaled products."""
        b, n, d = x_BND.shape
        bias: Tensor = self.qkv.bias
        if self.only_qv:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = (
            F.linear(x_BND, self.qkv.weight, bias).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        )
        mask = None if bias_HNN is None else bias_HNN.to(x_BND.dtype)
        out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class LayerScale(nn.Module):
    """A learned factor for each channel, under timm's name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens times gamma."""
        return x_BND * self.gamma


class EncoderMlp(nn.Module):
    """Two linears with GELU (erf) between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_BND: Tensor) -> Tensor:
        """Tokens -> tokens."""
        return self.fc2(F.gelu(self.fc1(x_BND)))


class EncoderBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.attn = EncoderAttention(shape)
        self.norm2 = nn.LayerNorm(shape.width, eps=shape.eps)
        self.mlp = EncoderMlp(shape.width)
        self.scale = shape.scale
        if shape.scale == "timm":
            self.ls1, self.ls2 = LayerScale(shape.width), LayerScale(shape.width)
        elif shape.scale == "beit":
            self.gamma_1 = nn.Parameter(torch.ones(shape.width))
            self.gamma_2 = nn.Parameter(torch.ones(shape.width))

    def forward(self, x_BND: Tensor, bias_HNN: Tensor | None = None) -> Tensor:
        """Tokens -> tokens."""
        attended = self.attn(self.norm1(x_BND), bias_HNN)
        x_BND = x_BND + (self.ls1(attended) if self.scale == "timm" else self._scaled(attended, "gamma_1"))
        mixed = self.mlp(self.norm2(x_BND))
        return x_BND + (self.ls2(mixed) if self.scale == "timm" else self._scaled(mixed, "gamma_2"))

    def _scaled(self, branch: Tensor, name: str) -> Tensor:
        return branch * getattr(self, name) if self.scale == "beit" else branch


class EncoderPatches(nn.Module):
    """Cuts an image into patches and embeds each."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.proj = nn.Conv2d(shape.channels, shape.width, shape.patch, shape.patch)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Image -> patch tokens, row by row."""
        return self.proj(image_NCHW).flatten(2).transpose(1, 2)


def blocks_after(blocks: Iterable[nn.Module], x_BND: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
    """Runs blocks one after another and keeps what some of them give.

    Args:
        blocks: in order.
        x_BND: tokens.
        layers: which blocks' outputs are kept, counted from 1; none behind the last of them is run.
    """
    found = []
    for number, block in enumerate(blocks, 1):
        x_BND = block(x_BND)
        if number in layers:
            found.append(x_BND)
        if number == max(layers):
            break
    return found


def resize_positions(table_1ND: Tensor, grid: int | tuple[int, int], prefix: int, *, antialias: bool) -> Tensor:
    """A position table for another number of patches, bicubic.

    Args:
        table_1ND: positions of ``prefix`` tokens and of a square of patches.
        grid: patches per side wanted, or rows and columns of them.
        prefix: tokens in front that keep their positions.
        antialias: as timm does it and DINOv2 with registers; DINOv2 without them was evaluated without.

    Returns:
        The table of ``prefix + rows * columns`` positions.
    """
    wanted = (grid, grid) if isinstance(grid, int) else grid
    old = round((table_1ND.shape[1] - prefix) ** 0.5)
    if (old, old) == wanted:
        return table_1ND
    square = table_1ND[:, prefix:].float().transpose(1, 2).unflatten(2, (old, old))
    square = F.interpolate(square, size=wanted, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([table_1ND[:, :prefix].float(), square.flatten(2).transpose(1, 2)], 1).to(table_1ND.dtype)


__all__ = [
    "EncoderAttention",
    "EncoderBlock",
    "EncoderMlp",
    "EncoderPatches",
    "EncoderShape",
    "LayerScale",
    "blocks_after",
    "resize_positions",
]
