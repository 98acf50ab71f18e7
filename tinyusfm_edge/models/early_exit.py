"""Answers of all exits of a classifier (methods.md 7).

For training and for choosing thresholds.

It does not decide when to stop (tinyusfm_runtime/early_exit.py does) and does not know export.

Shapes: E exits with the end, B batch, N tokens, D width, K classes; NCHW images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyusfm_edge.models.student import ClassificationStudent, ExitHead


def exit_logits(student: ClassificationStudent, tokens_BND: list[Tensor]) -> list[Tensor]:
    """Answers of every exit, the head at the end last.

    Args:
        student: a classifier.
        tokens_BND: tokens after each exit's block and after the last block, in order.
    """
    heads: list[nn.Module] = [head for head in student.exits.values() if isinstance(head, ExitHead)]
    early = [head(tokens) for head, tokens in zip(heads, tokens_BND[:-1], strict=True)]
    return [*early, student.classify(tokens_BND[-1])]


@torch.no_grad()
def all_exits(student: ClassificationStudent, image_NCHW: Tensor) -> Tensor:
    """Logits of every exit and of the head at the end, EBK."""
    blocks = (*(block - 1 for block in student.config.exits), student.config.depth - 1)
    return torch.stack(exit_logits(student, student.backbone.taps(image_NCHW, blocks)))


__all__ = ["all_exits", "exit_logits"]
