"""Teacher format DINOv2: ViT-S/B/L with 14-pixel patches and LayerScale.

UltraDINO-style with 16-pixel ones.

Names are timm's (``vit_small_patch14_dinov2``) or Meta's (the same but for ``register_tokens`` and ``mask_token``). The
position table is resampled to the image. UltraDINO takes one channel (methods.md 6): it is given the mean of three.

It does not know training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tinyusfm_edge.models.encoder import EncoderBlock, EncoderPatches, EncoderShape, blocks_after, resize_positions
from tinyusfm_edge.models.state_dict import WRAPPERS, find_tensors
from tinyusfm_edge.models.weights_file import WeightsFile, read_weights_file
from tinyusfm_runtime.errors import CheckpointError, InputError

_S, _B, _L = (384, 12, 6), (768, 12, 12), (1024, 24, 16)
_META = {"dinov2_vits14": _S, "dinov2_vitb14": _B, "dinov2_vitl14": _L}
_ULTRA = {"ultradino_vits16": _S, "ultradino_vitb16": _B, "ultradino_vitl16": _L}

VARIANTS = {
    **{
        name: EncoderShape(width=w, depth=d, heads=h, patch=14, grid=37, scale="timm")
        for name, (w, d, h) in _META.items()
    },
    **{
        f"{name}_reg4": EncoderShape(width=w, depth=d, heads=h, patch=14, grid=37, scale="timm", registers=4)
        for name, (w, d, h) in _META.items()
    },
    **{
        name: EncoderShape(width=w, depth=d, heads=h, patch=16, grid=14, scale="timm", registers=4, channels=1)
        for name, (w, d, h) in _ULTRA.items()
    },
}
"""Name -> shape; table sizes 518/14 and 224/16."""
_RENAMED = {"register_tokens": "reg_token"}
_SPARE = ("mask_token", "head.")


class Dinov2(nn.Module):
    """A frozen DINOv2 encoder."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.width, self.depth, self.patch = shape.width, shape.depth, shape.patch
        self.channels, self.registers = shape.channels, shape.registers
        self.patch_embed = EncoderPatches(shape)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.grid**2 + 1, shape.width))
        if shape.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, shape.registers, shape.width))
        self.blocks = nn.ModuleList(EncoderBlock(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)

    def sequence(self, image_NCHW: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """All tokens after the named blocks (from 1): class, registers, patches.

        Raises:
            InputError: the image does not consist of whole patches.
        """
        if image_NCHW.shape[-1] % self.patch or image_NCHW.shape[-2] % self.patch:
            raise InputError(f"the teacher takes images of whole {self.patch}-pixel patches")
        if self.channels == 1:
            image_NCHW = image_NCHW.mean(1, keepdim=True)
        x = self.patch_embed(image_NCHW)
        grid = (image_NCHW.shape[-2] // self.patch, image_NCHW.shape[-1] // self.patch)
        # Meta's hub turns antialiasing on for the networks with registers only (interpolate_antialias)
        table = resize_positions(self.pos_embed, grid, 1, antialias=self.registers > 0)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + table
        if self.registers:
            x = torch.cat([x[:, :1], self.reg_token.expand(len(x), -1, -1), x[:, 1:]], 1)
        return blocks_after(self.blocks, x, layers)

    @torch.no_grad()
    def tokens(self, image_NCHW: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Patch tokens NPD after the named blocks, counted from 1."""
        return [x[:, 1 + self.registers :] for x in self.sequence(image_NCHW, layers)]


def load(variant: str, weights: Path) -> Dinov2:
    """Loads a DINOv2 encoder.

    Args:
        variant: a name in ``VARIANTS``.
        weights: state dict under timm's or Meta's names, any float type.

    Returns:
        The frozen encoder in float32.

    Raises:
        CheckpointError: unusable, or a tensor is missing, of another shape, or left over.
    """
    file = read_weights_file(weights)
    named = {_RENAMED.get(k, k): v for k, v in bare_tensors(file).items() if not k.startswith(_SPARE)}
    net = Dinov2(VARIANTS[variant])
    fill(net, named, f"{weights} as {variant}")
    return net


def bare_tensors(file: WeightsFile) -> dict[str, Tensor]:
    """A teacher file's tensors, names without the wrappers of training code.

    Args:
        file: as it was read; of several models the one named ``teacher`` is taken.

    Raises:
        CheckpointError: no tensors, or several models of which none is named so.
    """
    try:
        _, tensors = find_tensors(file.content, "teacher" if "teacher" in file.content else None)
    except CheckpointError as error:
        what = str(error).partition(": choose")[0]
        raise CheckpointError(f"{file.path}: {what}: save the one that teaches alone, as a plain state dict") from error
    return {_bare(name): tensor for name, tensor in tensors.items()}


def _bare(name: str) -> str:
    parts = name.split(".")
    while parts and parts[0] in (*WRAPPERS, "encoder"):
        parts = parts[1:]
    return ".".join(parts)


def fill(net: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Fills a frozen model; every tensor must be there, with its shape, and no other.

    Args:
        net: filled in place, then frozen and in evaluation mode.
        tensors: by the net's names.
        what: for messages.

    Raises:
        CheckpointError: naming what does not fit; positions first.
    """
    wanted = net.state_dict()
    wrong = [k for k, v in wanted.items() if k not in tensors or tensors[k].shape != v.shape]
    spare = sorted(set(tensors) - set(wanted))
    if wrong or spare:
        wrong.sort(key=lambda name: "pos" not in name)
        shown = "; ".join(f"{k} is {tuple(tensors[k].shape) if k in tensors else 'missing'}" for k in wrong[:3])
        raise CheckpointError(
            f"{what}: {len(wrong)} of {len(wanted)} tensors do not fit ({shown or 'none'}), "
            f"{len(spare)} have no place ({', '.join(spare[:3]) or 'none'}): it is another model"
        )
    net.load_state_dict({k: v.float() for k, v in tensors.items()})
    net.requires_grad_(False).eval()


__all__ = ["VARIANTS", "Dinov2", "bare_tensors", "fill", "load"]
