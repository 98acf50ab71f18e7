"""Start weights for a student, selected out of a larger ViT.

Weight selection (Xu et al. 2023, arXiv 2311.18823).

A student trained from scratch on a few hundred images starts far away. Taking every second channel of a DINOv2
ViT-S/14 (width 384, 6 heads of 64, 12 blocks) fills a TinyUSFM (192, 12 heads of 16) without any training: uniform
selection of embedding, hidden and head channels, layer scale folded into the projections, the patch kernel
resampled 14 -> 16 and the position table 37 -> 14. A student with 3 heads of 64 takes every second head whole.
Linear weights are scaled by sqrt(2) because half as many inputs are summed. What is published: uniform selection.
Our choices: the split of one teacher head into two student heads, the scaling, and the two resamplings.

``tinyusfm-edge select --teacher-weights F --out init.safetensors``

It does not know training or tasks.

Shapes: D embedding channels, H hidden channels.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyusfm_edge.models.checkpoint import save_student
from tinyusfm_edge.models.state_dict import find_tensors
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.models.weights_file import read_weights_file
from tinyusfm_runtime.errors import CheckpointError
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

TEACHER_WIDTH = 384
"""Embedding channels of the teacher."""
TEACHER_HEADS = 6
"""Attention heads of the teacher, 64 channels each."""
TEACHER_GRID = 37
"""Rows and columns of its position table (518 / 14)."""


def select_weights(teacher: dict[str, Tensor], config: StudentConfig) -> dict[str, Tensor]:
    """Selects a student's backbone weights out of a DINOv2 ViT-S/14.

    Args:
        teacher: state dict with timm's names for vit_small_patch14_dinov2.
        config: a student of width 192, 12 blocks, and 12 heads of 16 or 3 of 64.

    Returns:
        State dict entries prefixed ``backbone.``, float32.

    Raises:
        CheckpointError: the teacher is not that network, or the student not this shape.
    """
    if (config.width, config.depth) != (192, 12) or config.heads not in (12, 3):
        raise CheckpointError("weight selection is for students of width 192, 12 blocks, and 12 or 3 heads")
    try:
        if tuple(teacher["pos_embed"].shape) != (1, TEACHER_GRID**2 + 1, TEACHER_WIDTH):
            raise CheckpointError(f"teacher position table {tuple(teacher['pos_embed'].shape)} is not ViT-S/14's")
        t = {key: value.float() for key, value in teacher.items()}
        out = _select_stem(t, config) | {"norm.weight": t["norm.weight"][::2], "norm.bias": t["norm.bias"][::2]}
        for index in range(config.depth):
            out |= _select_block(t, f"blocks.{index}.", config.heads)
    except KeyError as error:
        raise CheckpointError(f"teacher file lacks {error}: expected timm's vit_small_patch14_dinov2") from error
    return {f"backbone.{key}": value.clone().contiguous() for key, value in out.items()}


def _select_stem(t: dict[str, Tensor], config: StudentConfig) -> dict[str, Tensor]:
    table = t["pos_embed"][:, 1:, ::2].unflatten(1, (TEACHER_GRID, TEACHER_GRID)).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=config.grid_hw, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    kernel = F.interpolate(t["patch_embed.proj.weight"][::2], size=(16, 16), mode="bicubic") * (14 / 16) ** 2
    return {
        "cls_token": t["cls_token"][..., ::2],
        "pos_embed": torch.cat([t["pos_embed"][:, :1, ::2], table], 1),
        "patch_embed.proj.weight": kernel,
        "patch_embed.proj.bias": t["patch_embed.proj.bias"][::2],
    }


def _head_channels(heads: int) -> Tensor:
    """Which of the teacher's attention channels a student's heads take, in order."""
    if heads == TEACHER_HEADS // 2:
        # every second head, whole: its attention pattern stays what it was
        return torch.cat([2 * h * 64 + torch.arange(64) for h in range(heads)])
    # student head h takes every second channel of one half of teacher head h // 2: 16 of its 64 channels
    return torch.cat([(h // 2) * 64 + (h % 2) * 32 + torch.arange(0, 32, 2) for h in range(2 * TEACHER_HEADS)])


def _select_block(t: dict[str, Tensor], p: str, heads: int) -> dict[str, Tensor]:
    head = _head_channels(heads)
    packed = torch.cat([part * TEACHER_WIDTH + head for part in range(3)])
    gain, ls1, ls2 = 2.0**0.5, t[p + "ls1.gamma"][::2], t[p + "ls2.gamma"][::2]
    out = {
        f"{p}{norm}.{kind}": t[f"{p}{norm}.{kind}"][::2] for norm in ("norm1", "norm2") for kind in ("weight", "bias")
    }
    return out | {
        p + "attn.qkv.weight": t[p + "attn.qkv.weight"][packed][:, ::2] * gain,
        p + "attn.qkv.bias": t[p + "attn.qkv.bias"][packed],
        p + "attn.proj.weight": t[p + "attn.proj.weight"][::2][:, head] * ls1[:, None] * gain,
        p + "attn.proj.bias": t[p + "attn.proj.bias"][::2] * ls1,
        p + "mlp.fc1.weight": t[p + "mlp.fc1.weight"][::2, ::2] * gain,
        p + "mlp.fc1.bias": t[p + "mlp.fc1.bias"][::2],
        p + "mlp.fc2.weight": t[p + "mlp.fc2.weight"][::2, ::2] * ls2[:, None] * gain,
        p + "mlp.fc2.bias": t[p + "mlp.fc2.bias"][::2] * ls2,
    }


def write_selected(teacher: Path, out: Path, config: StudentConfig) -> str:
    """Writes a student without a head whose weights are selected out of a teacher.

    Args:
        teacher: safetensors of vit_small_patch14_dinov2.
        out: student file to write.
        config: a student for features.

    Returns:
        sha256 of the file, hex.

    Raises:
        CheckpointError: unusable weights, or a student of another shape.
        OutputError: the file cannot be written.
    """
    file = read_weights_file(teacher)
    student = build_student(config)
    student.load_state_dict(select_weights(find_tensors(file.content)[1], config))
    spec = ModelSpec(
        name="selected",
        task=Task.FEATURES,
        labels=(),
        preprocess=PreprocessSpec(height=config.input_hw[0], width=config.input_hw[1]),
        origin=f"weights selected out of a DINOv2 ViT-S/14 ({file.sha256[:12]}), arXiv 2311.18823; no training",
    )
    return save_student(out, student, spec, torch.float32, {"teacher": file.sha256})


__all__ = ["TEACHER_GRID", "TEACHER_HEADS", "TEACHER_WIDTH", "select_weights", "write_selected"]
