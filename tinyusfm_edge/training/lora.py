"""A foundation model as a teacher for one task: LoRA on q and v of every block, a head, the base frozen (methods.md 5).

The packed qkv projection is first split into three linears, exactly, because low-rank updates go to q and v alone; peft
then injects the adapters, and ``merge_adapters`` folds them back: W += (alpha / r) B A. With rank 0 only the head
learns.
The picture is resized so that the teacher's patches fall on the student's grid: tokens correspond one to one.

It does not know data or how the teacher is trained (adapt.py trains it like a student).

Shapes: B batch, N tokens, D width; NCHW pictures.
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
from tinyusfm_runtime.errors import InputError, MissingExtra

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
            bias = torch.cat([packed.q_bias, torch.zeros_like(packed.v_bias), packed.v_bias])
        parts = [_linear(packed.qkv.weight[at : at + width], bias[at : at + width]) for at in (0, width, 2 * width)]
        self.q, self.k, self.v = parts

    def forward(self, x_BND: Tensor, bias_HNN: Tensor | None = None) -> Tensor:
        """Tokens -> attended tokens; ``bias_HNN`` is added to the scaled products."""
        b, n, d = x_BND.shape
        q, k, v = (
            linear(x_BND).reshape(b, n, self.heads, d // self.heads).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        mask = None if bias_HNN is None else bias_HNN.to(x_BND.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    made.weight.data.copy_(weight)
    made.bias.data.copy_(bias)
    return made


class TaskTeacher(nn.Module):
    """An encoder with a task head: the student's own mask head at the teacher's width, or mean token and linear."""

    def __init__(self, encoder: Dinov2, *, task: str, outputs: int, image_size: int, rank: int) -> None:
        super().__init__()
        self.encoder = split_attention(encoder)
        self.width, self.grid, self.image_size = encoder.width, image_size // 16, image_size
        self.segment = task == "segment"
        self.encoder.requires_grad_(False)
        if rank:
            inject_adapters(self.encoder, rank)
        if self.segment:
            self.neck, self.head = Neck(encoder.width), FpnHead(encoder.width, outputs)
        else:
            self.norm, self.classifier = nn.LayerNorm(encoder.width), nn.Linear(encoder.width, outputs)

    def forward(self, image_NCHW: Tensor) -> Tensor:
        """Normalised picture -> logits, B1HW at the picture's size or BK."""
        return self.seen(image_NCHW)[0]

    def seen(self, image_NCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Normalised picture -> logits, and patch tokens BND on the student's grid after ``LAYERS``."""
        side = self.grid * self.encoder.patch
        picture = F.interpolate(image_NCHW, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        skip = 1 + self.encoder.registers
        tokens = [x[:, skip:] for x in self.encoder.sequence(picture, LAYERS)]
        if not self.segment:
            return self.classifier(self.norm(tokens[-1].mean(1))), tokens
        maps = [x.transpose(1, 2).unflatten(2, (self.grid, self.grid)) for x in tokens]
        logits = self.head(self.neck(maps))
        size = (self.image_size, self.image_size)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False), tokens

    def patches(self, image_NCHW: Tensor) -> Tensor:
        """Patch-embedding tokens BND on the student's grid, before positions."""
        side = self.grid * self.encoder.patch
        picture = F.interpolate(image_NCHW, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        if self.encoder.channels == 1:
            picture = picture.mean(1, keepdim=True)
        return self.encoder.patch_embed(picture)


def split_attention(encoder: Dinov2) -> Dinov2:
    """A copy of an encoder whose attentions are split into q, k and v."""
    net = copy.deepcopy(encoder)
    for block in net.blocks:
        block.attn = SplitAttention(block.attn)  # type: ignore[arg-type]
    return net


def inject_adapters(encoder: nn.Module, rank: int) -> None:
    """Puts LoRA on q and v of every block, in place: alpha 2 r, no dropout, A normal, B zero (methods.md 5).

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
        target_modules=r".*blocks\.\d+\.attn\.[qv]",
        init_lora_weights="gaussian",
    )
    inject_adapter_in_model(config, encoder)


def merge_adapters(encoder: nn.Module) -> nn.Module:
    """A copy with the adapters folded into plain linears; the same answer up to rounding.

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


__all__ = ["LAYERS", "SplitAttention", "TaskTeacher", "inject_adapters", "merge_adapters", "split_attention"]
