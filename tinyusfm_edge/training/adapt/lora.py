"""A foundation model as a teacher for one task (methods.md 5).

LoRA on q and v of every block, a head, the base frozen.

The packed qkv projection is first split into three linears, exactly, because low-rank updates go to q and v alone; peft
then injects the adapters, and ``merge_adapters`` folds them back: W += (alpha / r) B A. With rank 0 only the head
learns.
The image is resized so that the teacher's patches fall on the student's grid: tokens correspond one to one.

It does not know data or how the teacher is trained (adapt.py trains it like a student).

Shapes: B batch, N tokens, D width; NCHW images.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.models.encoder import EncoderAttention
from tinyusfm_edge.models.student import TAPS, FpnHead, Neck
from tinyusfm_edge.models.teachers.dinov2 import Dinov2
from tinyusfm_edge.models.teachers.usfm_beit import UsfmBeit
from tinyusfm_edge.models.teachers.vit_plain import PlainVit
from tinyusfm_runtime.errors import InputError, MissingExtra

Encoder = Dinov2 | PlainVit | UsfmBeit
"""Encoders whose attentions can be adapted."""
LAYERS = tuple(index + 1 for index in TAPS)
"""Blocks of teacher and student, from 1, whose tokens are compared: those the mask head taps."""


class SplitAttention(nn.Module):
    """An ``EncoderAttention`` with q, k and v as three linears; the same answer."""

    def __init__(self, packed: EncoderAttention) -> None:
        super().__init__()
        self.heads, self.proj = packed.heads, packed.proj
        width = packed.proj.in_features
        bias: Tensor | None = packed.qkv.bias
        if bias is None:
            # no bias on the keys in this format: zeros
            bias = torch.cat([packed.q_bias, torch.zeros_like(packed.v_bias), packed.v_bias])
        # rows 0 .. D - 1 queries, D .. 2 D - 1 keys, the rest values
        parts = [_linear(packed.qkv.weight[at : at + width], bias[at : at + width]) for at in (0, width, 2 * width)]
        self.q, self.k, self.v = parts

    def forward(self, x_BND: Tensor, bias_HNN: Tensor | None = None) -> Tensor:
        """Tokens -> attended tokens; ``bias_HNN`` is added to the scaled products."""
        # split into heads: (B, N, D) -> (B, H, N, D/H)
        b, n, d = x_BND.shape
        q, k, v = (
            linear(x_BND).reshape(b, n, self.heads, d // self.heads).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        # (H, N, N), added to the scaled products of every image
        mask = None if bias_HNN is None else bias_HNN.to(x_BND.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        # (B, H, N, D/H) -> (B, N, D)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.data.copy_(weight)
    made.bias.data.copy_(bias)
    return made


class TaskTeacher(nn.Module):
    """An encoder with a task head.

    The student's own mask head at the teacher's width, or mean token and linear.
    """

    def __init__(self, encoder: Encoder, *, task: str, outputs: int, image_hw: tuple[int, int], rank: int) -> None:
        super().__init__()
        self.encoder = split_attention(encoder)
        self.width, self.image_hw = encoder.width, image_hw
        self.grid_hw = (image_hw[0] // 16, image_hw[1] // 16)
        self.registers, self.channels = getattr(encoder, "registers", 0), getattr(encoder, "channels", 3)
        self.segment = task == "segment"
        self.encoder.requires_grad_(False)
        if rank:
            inject_adapters(self.encoder, rank)
        if self.segment:
            self.neck, self.head = Neck(encoder.width), FpnHead(encoder.width, outputs)
        else:
            self.norm, self.classifier = nn.LayerNorm(encoder.width), nn.Linear(encoder.width, outputs)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Normalised image -> logits, B1HW at the image's size or BK."""
        return self.seen(image_NCHW)[0]

    def seen(self, image_NCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised image -> logits, and patch tokens BND on the student's grid.

        The tokens are those after ``LAYERS``.
        """
        # without class token and registers: (B, N, D)
        tokens = [x[:, 1 + self.registers :] for x in self.encoder.sequence(self._resized(image_NCHW), self.layers)]
        if not self.segment:
            return self.classifier(self.norm(tokens[-1].mean(1))), tokens
        # (B, D, h, w), as the student's own neck and head take them
        maps = [x.transpose(1, 2).unflatten(2, self.grid_hw) for x in tokens]
        logits = self.head(self.neck(maps))
        return F.interpolate(logits, size=self.image_hw, mode="bilinear", align_corners=False), tokens

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks at the same share of the encoder's depth as ``LAYERS``.

        ``LAYERS`` counts a student's twelve blocks.
        """
        return tuple(max(1, round(layer * self.encoder.depth / LAYERS[-1])) for layer in LAYERS)

    def _resized(self, image_NCHW: Tensor) -> Tensor:
        """The image, resized so that the teacher's grid is the student's.

        The teacher sees exactly one patch for each of the student's.
        """
        # 14-pixel patches see a smaller image, so that the grids agree
        size = (self.grid_hw[0] * self.encoder.patch, self.grid_hw[1] * self.encoder.patch)
        return F.interpolate(image_NCHW, size=size, mode="bilinear", align_corners=False, antialias=True)

    def patches(self, image_NCHW: Tensor) -> Tensor:
        """Patch-embedding tokens BND on the student's grid, before positions."""
        image = self._resized(image_NCHW)
        if self.channels == 1:
            image = image.mean(1, keepdim=True)
        return self.encoder.patch_embed(image)


def split_attention(encoder: Encoder) -> Encoder:
    """A copy of an encoder whose attentions are split into q, k and v."""
    net = copy.deepcopy(encoder)
    for block in net.blocks:
        block.attn = SplitAttention(block.attn)  # type: ignore[arg-type]
    return net


def inject_adapters(encoder: nn.Module, rank: int) -> None:
    """Puts LoRA on q and v of every block, in place (methods.md 5).

    alpha 2 r, no dropout, A normal, B zero.

    Raises:
        InputError: a rank below 1.
        MissingExtra: peft is not installed.
    """
    if rank < 1:
        raise InputError(f"LoRA needs a rank of at least 1, not {rank}")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtra("a LoRA teacher", "peft", "train") from error
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        bias="none",
        # keys and the output projection stay as they are (methods.md 5)
        target_modules=r".*blocks\.\d+\.attn\.[qv]",
        init_lora_weights="gaussian",
    )
    inject_adapter_in_model(config, encoder)


def merge_adapters(encoder: nn.Module) -> nn.Module:
    """A copy with the adapters folded into plain linears.

    The same answer up to rounding.

    Args:
        encoder: with or without adapters.
    """
    net = copy.deepcopy(encoder)
    for parent, name, layer in list(_adapted(net)):
        layer.merge()
        setattr(parent, name, layer.get_base_layer())
    return net


def _adapted(net: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    for parent in net.modules():
        for name, child in parent.named_children():
            if hasattr(child, "get_base_layer") and hasattr(child, "merge"):
                yield parent, name, child


__all__ = ["LAYERS", "Encoder", "SplitAttention", "TaskTeacher", "inject_adapters", "merge_adapters", "split_attention"]
