"""Teacher format plain ViT: MAE and what came of it (USF-MAE, UltraFedFM), DINO.

Absolute positions, no LayerScale.

Names are timm's. A decoder, heads and mask tokens in the file are left out; everything of the encoder must be there,
the position table above all (MAE's fixed sine table stands in its files like any other). ``fc_norm`` serves where a
fine-tuned file has it in place of ``norm``; the tokens given are those before it.

It does not know training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tinyusfm_edge.models.encoder import EncoderBlock, EncoderPatches, EncoderShape, blocks_after, resize_positions
from tinyusfm_edge.models.teachers.dinov2 import bare_tensors, fill
from tinyusfm_edge.models.weights_file import read_weights_file
from tinyusfm_runtime.errors import InputError

_S = EncoderShape(width=384, depth=12, heads=6, patch=16, grid=14)
_B = EncoderShape(width=768, depth=12, heads=12, patch=16, grid=14)
_L = EncoderShape(width=1024, depth=24, heads=16, patch=16, grid=14)

VARIANTS = {
    "mae_vitb16": _B,
    "mae_vitl16": _L,
    "usf_mae_vitb16": _B,
    "ultrafedfm_vitb16": _B,
    "dino_vits16": _S,
    "dino_vitb16": _B,
}
"""Name -> shape."""
_SPARE = ("decoder_", "mask_token", "head.", "head_", "fc_norm.")


class PlainVit(nn.Module):
    """A frozen plain ViT encoder."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.width, self.depth, self.patch = shape.width, shape.depth, shape.patch
        self.patch_embed = EncoderPatches(shape)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.grid**2 + 1, shape.width))
        self.blocks = nn.ModuleList(EncoderBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)

    def sequence(self, image_NCHW: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """All tokens after the named blocks (from 1), class token first.

        Raises:
            InputError: the image does not consist of whole patches.
        """
        if image_NCHW.shape[-1] % self.patch or image_NCHW.shape[-2] % self.patch:
            raise InputError(f"the teacher takes images of whole {self.patch}-pixel patches")
        x = self.patch_embed(image_NCHW)
        grid = (image_NCHW.shape[-2] // self.patch, image_NCHW.shape[-1] // self.patch)
        table = resize_positions(self.pos_embed, grid, 1, antialias=True)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + table
        return blocks_after(self.blocks, x, layers)

    @torch.no_grad()
    def tokens(self, image_NCHW: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Patch tokens NPD after the named blocks, counted from 1."""
        return [x[:, 1:] for x in self.sequence(image_NCHW, layers)]


def load(variant: str, weights: Path) -> PlainVit:
    """Loads a plain ViT encoder.

    Args:
        variant: a name in ``VARIANTS``.
        weights: state dict under timm's names, alone or under ``model``, ``state_dict`` or ``teacher``.

    Returns:
        The frozen encoder in float32.

    Raises:
        CheckpointError: unusable, or a tensor of the encoder is missing, of another shape, or left over.
    """
    file = read_weights_file(weights)
    named = bare_tensors(file)
    for kind in ("weight", "bias"):
        if f"norm.{kind}" not in named and f"fc_norm.{kind}" in named:
            named[f"norm.{kind}"] = named[f"fc_norm.{kind}"]
    net = PlainVit(VARIANTS[variant])
    fill(net, {k: v for k, v in named.items() if not k.startswith(_SPARE)}, f"{weights} as {variant}")
    return net


__all__ = ["VARIANTS", "PlainVit", "load"]
