"""A classifier with early exits as a chain of modules: stem and blocks to the first exit, to the next, to the end.

Static graphs cannot branch cheaply, so a device runs one stage after another and stops when an answer is sure enough
(methods.md 7). The stages share the student's own modules: training the one trains the other. It does not decide when
to stop (tinyusfm_runtime/early_exit.py does) and does not know export.

Shapes: B batch, N tokens, D width, K classes; NCHW pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinyusfm_edge.models.student import ClassificationStudent, ExitHead
from tinyusfm_runtime.errors import InputError


class ExitStage(nn.Module):
    """One link of the chain.

    The first takes a normalised picture NCHW, the others the tokens BND of the one before. All but the last give
    (tokens BND, logits BK); the last gives logits BK alone.
    """

    def __init__(self, student: ClassificationStudent, first: int, last: int) -> None:
        super().__init__()
        self.first_block, self.last_block = first, last
        self.stem = _Stem(student) if first == 1 else nn.Identity()
        self.blocks = nn.ModuleList(student.backbone.blocks[first - 1 : last])
        self.is_last = last == student.config.depth
        self.exit: nn.Module = _Final(student) if self.is_last else student.exits[str(last)]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Picture or tokens -> tokens and logits, or logits."""
        tokens = self.stem(x)
        for block in self.blocks:
            tokens = block(tokens)
        logits = self.exit(tokens)
        return logits if self.is_last else (tokens, logits)


class _Stem(nn.Module):
    """Patch embedding, class token and positions, without the blocks that ``Backbone.embed`` would bring along."""

    def __init__(self, student: ClassificationStudent) -> None:
        super().__init__()
        self.patch_embed = student.backbone.patch_embed
        self.cls_token, self.pos_embed = student.backbone.cls_token, student.backbone.pos_embed

    def forward(self, image_NCHW: Tensor) -> Tensor:
        x = self.patch_embed(image_NCHW)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed


class _Final(nn.Module):
    """The head at the end, as an exit."""

    def __init__(self, student: ClassificationStudent) -> None:
        super().__init__()
        self.norm, self.head = student.fc_norm, student.head

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return self.head(self.norm(tokens_BND[:, 1:].mean(1)))


def split_stages(student: ClassificationStudent) -> list[ExitStage]:
    """The chain of a student: with exits (6, 9) stem and blocks 1-6, blocks 7-9, blocks 10-12.

    Raises:
        InputError: the student has no exits.
    """
    if not isinstance(student, ClassificationStudent) or not student.config.exits:
        raise InputError("the student has no early exits: adapt one with --exits 6,9")
    ends = [*student.config.exits, student.config.depth]
    starts = [1, *(end + 1 for end in ends[:-1])]
    return [ExitStage(student, first, last) for first, last in zip(starts, ends, strict=True)]


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


__all__ = ["ExitStage", "all_exits", "exit_logits", "split_stages"]
