"""What a student learns from an adapted teacher besides the labels: its answers, its tokens, its patch embeddings.

``logits`` and ``features`` are task-specific distillation (methods.md 5), ``csf`` and ``patches`` are TransKD
(methods.md 4). Teacher tokens are normalised without parameters first, since raw ViT tokens have a few huge channels
that would be all a squared distance sees (our choice). The teacher sees the very picture the student sees and stays
in evaluation mode. It does not know data or labels.

Shapes: B batch, N tokens, D width; NCHW pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.models.early_exit import exit_logits
from tinyusfm_edge.models.student import TAPS, ClassificationStudent, SegmentationStudent
from tinyusfm_edge.training.adapt_config import AdaptConfig
from tinyusfm_edge.training.lora import TaskTeacher
from tinyusfm_edge.training.losses import feature_distillation, logit_distillation
from tinyusfm_edge.training.transkd import TransKd

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentPass:
    """What one forward pass of a student showed.

    Attributes:
        logits: of the head at the end.
        early: logits of the early exits, in order.
        tokens: patch tokens BND after the tapped blocks.
    """

    logits: Tensor
    early: list[Tensor]
    tokens: list[Tensor]


def observe(model: nn.Module, image_NCHW: Tensor) -> StudentPass:
    """One forward pass with everything that losses look at; a net that is no student gives its logits alone."""
    if isinstance(model, SegmentationStudent):
        taps = model.backbone.taps(image_NCHW)
        return StudentPass(logits=model.decode(taps), early=[], tokens=[t[:, 1:] for t in taps])
    if isinstance(model, ClassificationStudent):
        ends = [*(block - 1 for block in model.config.exits), model.config.depth - 1]
        wanted = tuple(sorted({*ends, *TAPS}))
        found = dict(zip(wanted, model.backbone.taps(image_NCHW, wanted), strict=False))
        answers = exit_logits(model, [found[index] for index in ends])
        tokens = [found[index][:, 1:] for index in TAPS if index in found]
        return StudentPass(logits=answers[-1], early=answers[:-1], tokens=tokens)
    return StudentPass(logits=model(image_NCHW), early=[], tokens=[])


class Guide(nn.Module):
    """The distillation terms of a batch; its projections are trained and thrown away."""

    def __init__(self, teacher: TaskTeacher, config: AdaptConfig) -> None:
        super().__init__()
        self.config, self.kinds = config, frozenset(config.kd)
        self.teacher = teacher.requires_grad_(False).eval()
        width = config.student.width
        if "features" in self.kinds:
            self.project = nn.ModuleList(nn.Linear(width, teacher.width) for _ in TAPS)
        if self.kinds & {"csf", "patches"}:
            self.transkd = TransKd(width, teacher.width, len(TAPS))
            if "csf" not in self.kinds:
                self.transkd.fusions.requires_grad_(False)
            if "patches" not in self.kinds:
                self.transkd.align.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As usual, but the teacher stays in evaluation mode: its statistics are not this batch's."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, seen: StudentPass, model: nn.Module, image_NCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the terms, and each by name.

        Args:
            seen: the student's pass over the picture.
            model: the student, for its patch embedding.
            image_NCHW: normalised.
        """
        with torch.no_grad():
            logits, raw = self.teacher.seen(image_NCHW)
        tokens = [F.layer_norm(x, x.shape[-1:]) for x in raw]
        terms: dict[str, Tensor] = {}
        if "logits" in self.kinds:
            terms["kd_logits"] = self.config.kd_logits * logit_distillation(
                seen.logits.float(), logits.float(), self.config.temperature
            )
        if "features" in self.kinds:
            pairs = zip(self.project, seen.tokens, tokens, strict=True)
            cosines = [feature_distillation(linear(mine).float(), theirs.float()) for linear, mine, theirs in pairs]
            terms["kd_features"] = self.config.kd_features * torch.stack(cosines).mean()
        if "csf" in self.kinds:
            terms["kd_csf"] = self.config.kd_csf * self.transkd.context(_maps(seen.tokens), _maps(tokens))
        if "patches" in self.kinds:
            with torch.no_grad():
                theirs = self.teacher.patches(image_NCHW)
            mine = model.backbone.patch_embed(image_NCHW)  # type: ignore[union-attr,operator]
            terms["kd_patches"] = self.transkd.patches(mine, F.layer_norm(theirs, theirs.shape[-1:]))
        return torch.stack(list(terms.values())).sum(), terms


def _maps(tokens_BND: list[Tensor]) -> list[Tensor]:
    side = round(tokens_BND[0].shape[1] ** 0.5)
    return [x.transpose(1, 2).unflatten(2, (side, side)) for x in tokens_BND]


def exits_loss(early: list[Tensor], last: Tensor, target_B: Tensor, loss: nn.Module, weight: float) -> Tensor:
    """Loss of a classifier with early exits: sum_j j L_j / sum_j j (PABEE), and each exit's KL to the last answer.

    Args:
        early: logits of the exits, in order.
        last: logits of the head at the end.
        target_B: true classes.
        loss: the supervised loss of one exit.
        weight: of the KL terms (their mean); the last answer is a fixed target there.
    """
    answers = [*early, last]
    each = torch.stack([j * loss(answer, target_B) for j, answer in enumerate(answers, 1)])
    weighted = each.sum() / (len(answers) * (len(answers) + 1) / 2)
    kl = torch.stack([logit_distillation(answer.float(), last.float(), 1.0) for answer in early]).mean()
    return weighted + weight * kl


__all__ = ["Guide", "StudentPass", "exits_loss", "observe"]
