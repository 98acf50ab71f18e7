"""Relation distillation: attention should look where the teacher's does.

The last attention of the student (MAE-Lite, TinyMIM).

MAE-Lite compares attention logits of the last block through a 1x1 convolution over heads; TinyMIM found the softmax the
better target. Here the student's logits go through such a convolution, so head counts may differ, and are compared with
the teacher's attention by KL. It needs the network of the teacher, not a bank of its features, and equal grids.

Shapes: B batch, H heads, N tokens (class token first), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyusfm_edge.models.encoder import EncoderAttention
from tinyusfm_edge.models.student import Attention


def attention_logits(attention: Attention | EncoderAttention, x_BND: Tensor) -> Tensor:
    """Scaled products of queries and keys, BHNN, before the softmax.

    Args:
        attention: of a block.
        x_BND: its input, normed.
    """
    width, heads = x_BND.shape[-1], attention.heads
    bias: Tensor | None = attention.qkv.bias
    if isinstance(attention, EncoderAttention) and attention.only_qv:
        # such teachers have no bias on the keys: zeros in their place, (3 D,)
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias])
    # only queries and keys: the first 2 D rows, (B, N, 2 D)
    both = nn.functional.linear(x_BND, attention.qkv.weight[: 2 * width], None if bias is None else bias[: 2 * width])
    # (B, N, 2, H, d) -> two of (B, H, N, d)
    q, k = both.unflatten(2, (2, heads, width // heads)).permute(2, 0, 3, 1, 4)
    return (q * (width // heads) ** -0.5) @ k.transpose(-1, -2)


class RelationLoss(nn.Module):
    """KL between the teacher's attention and the student's.

    The student's is seen through a convolution over heads.
    """

    def __init__(self, student_heads: int, teacher_heads: int) -> None:
        super().__init__()
        self.adapt = nn.Conv2d(student_heads, teacher_heads, 1)

    def forward(self, student_BHNN: Tensor, teacher_BHNN: Tensor) -> Tensor:
        """Mean over images, heads and queries of KL(teacher || student).

        Args:
            student_BHNN: logits of the student's attention.
            teacher_BHNN: logits of the teacher's, of the same tokens; no gradient flows to it.
        """
        # over the keys, the last axis
        wanted = teacher_BHNN.detach().float().log_softmax(-1)
        # (B, student's heads, N, N) -> (B, teacher's heads, N, N): heads have no common order
        found = self.adapt(student_BHNN).float().log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean()


__all__ = ["RelationLoss", "attention_logits"]
