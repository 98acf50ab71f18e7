"""What a student learns from an adapted teacher besides the labels.

Its answers, its tokens, its patch embeddings.

``logits`` and ``features`` are task-specific distillation (methods.md 5), ``csf`` and ``patches`` are TransKD
(methods.md 4). Teacher tokens are normalised without parameters first, and each channel to mean 0 and standard
deviation 1 over the training images: raw ViT tokens have a few huge channels, and most of the rest is the same in
every image, which would be all that a distance or a cosine sees (our choice). The teacher sees the very image the
student sees and stays in evaluation mode. It does not know data or labels.

Shapes: B batch, N tokens, D width; NCHW images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.models.early_exit import exit_logits
from tinyusfm_edge.models.student import TAPS, ClassificationStudent, SegmentationStudent
from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.lora import TaskTeacher
from tinyusfm_edge.training.adapt.losses import feature_distillation, logit_distillation
from tinyusfm_edge.training.adapt.sister import SisterTeacher
from tinyusfm_edge.training.adapt.transkd import EmbeddingAssistant, GlobalLocalMixer, TransKd
from tinyusfm_edge.training.pretrain.standard import measure_standards
from tinyusfm_edge.training.pretrain.teacher_bank import plain_norm

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentPass:
    """What one forward pass of a student showed.

    Attributes:
        logits: of the head at the end.
        early: logits of the early exits, in order.
        tokens: patch tokens BND after the tapped blocks.
        grid_hw: rows and columns of patches.
        levels: smoothed maps of a mask head, finest first; empty for other models.
        kept_BV: patches that were looked at, or None for all; the tokens of others are 0.
    """

    logits: Tensor
    early: list[Tensor]
    tokens: list[Tensor]
    grid_hw: tuple[int, int] = (0, 0)
    levels: list[Tensor] = field(default_factory=list)
    kept_BV: Tensor | None = None


def observe(model: nn.Module, image_NCHW: Tensor, *, kept_BV: Tensor | None = None) -> StudentPass:
    """One forward pass with everything that losses look at.

    A model that is no student gives its logits alone.

    Args:
        model: a student, or another model.
        image_NCHW: normalised.
        kept_BV: patches that a mask student looks at, or None for all.
    """
    if isinstance(model, SegmentationStudent):
        # four of (B, 1 + N, D), or (B, 1 + V, D) where patches are dropped
        taps = model.backbone.taps(image_NCHW, kept_BV=kept_BV)
        if kept_BV is not None:
            # back to (B, 1 + N, D), zeros in the gaps, since the pyramid needs the whole grid
            taps = model.scattered(taps, kept_BV)
        # four maps, finest first
        levels = model.head.smoothed(model.levels(taps))
        return StudentPass(
            logits=model.enlarge(model.head.fuse(levels)),
            early=[],
            tokens=[t[:, 1:] for t in taps],
            grid_hw=model.backbone.grid_hw,
            levels=levels,
            kept_BV=kept_BV,
        )
    if isinstance(model, ClassificationStudent):
        # blocks from 0: those of the exits, counted from 1 in the settings, and the last
        ends = [*(block - 1 for block in model.config.exits), model.config.depth - 1]
        wanted = tuple(sorted({*ends, *TAPS}))
        # one pass gives the tokens of exits and taps alike
        found = dict(zip(wanted, model.backbone.taps(image_NCHW, wanted), strict=False))
        answers = exit_logits(model, [found[index] for index in ends])
        tokens = [found[index][:, 1:] for index in TAPS if index in found]
        grid = model.backbone.grid_hw
        return StudentPass(logits=answers[-1], early=answers[:-1], tokens=tokens, grid_hw=grid)
    return StudentPass(logits=model(image_NCHW), early=[], tokens=[])


class Guide(nn.Module):
    """The distillation terms of a batch; its projections are trained and thrown away."""

    def __init__(self, teacher: TaskTeacher | SisterTeacher, config: AdaptConfig) -> None:
        super().__init__()
        self.config, self.kinds = config, frozenset(config.kd)
        self.teacher = teacher.requires_grad_(False).eval()
        width = config.student.width
        for stage in range(len(TAPS)):
            self.register_buffer(f"mean_{stage}", torch.zeros(teacher.width))
            self.register_buffer(f"sd_{stage}", torch.ones(teacher.width))
        if "features" in self.kinds:
            self.project = nn.ModuleList(nn.Linear(width, teacher.width) for _ in TAPS)
        if "glmixer" in self.kinds:
            self.mixer = GlobalLocalMixer(width, teacher.width)
        if "assistant" in self.kinds:
            self.assistant = EmbeddingAssistant(width, teacher.width)
        if self.kinds & {"csf", "patches"}:
            self.transkd = TransKd(width, teacher.width, len(TAPS))
            if "csf" not in self.kinds:
                self.transkd.fusions.requires_grad_(False)
            if "patches" not in self.kinds:
                self.transkd.align.requires_grad_(False)

    @torch.no_grad()
    def standardise(self, images_B3HW: Iterable[Tensor]) -> None:
        """Measures the teacher's channels on images.

        From then on its tokens are relative to that.

        Args:
            images_B3HW: normalised images, batch by batch; at least one.
        """
        self.teacher.eval()
        found = measure_standards(
            [plain_norm(tokens).cpu() for tokens in self.teacher.seen(images)[1]] for images in images_B3HW
        )
        for stage, standard in enumerate(found):
            getattr(self, f"mean_{stage}").copy_(standard.mean_D)
            getattr(self, f"sd_{stage}").copy_(standard.sd_D)

    def _standardised(self, raw_BND: list[Tensor]) -> list[Tensor]:
        return [
            # each token normed, then each channel by its mean and deviation over training images
            (plain_norm(tokens) - getattr(self, f"mean_{stage}")) / getattr(self, f"sd_{stage}")
            for stage, tokens in enumerate(raw_BND)
        ]

    def train(self, mode: bool = True) -> Self:
        """As usual, but the teacher stays in evaluation mode.

        Its statistics are not those of this batch.
        """
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, seen: StudentPass, model: nn.Module, image_NCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the terms, and each by name.

        Args:
            seen: the student's pass over the image.
            model: the student, for its patch embedding.
            image_NCHW: normalised.
        """
        with torch.no_grad():
            logits, raw = self.teacher.seen(image_NCHW)
            tokens = self._standardised(raw)
        terms: dict[str, Tensor] = {}
        if "logits" in self.kinds:
            terms["kd_logits"] = self.config.kd_logits * logit_distillation(
                seen.logits.float(), logits.float(), self.config.temperature
            )
        if "features" in self.kinds:
            # (B, N, D) -> (B, V, D) on both sides
            kept = [[_kept(x, seen.kept_BV) for x in side] for side in (seen.tokens, tokens)]
            pairs = zip(self.project, *kept, strict=True)
            cosines = [feature_distillation(linear(mine).float(), theirs.float()) for linear, mine, theirs in pairs]
            terms["kd_features"] = self.config.kd_features * torch.stack(cosines).mean()
        if "csf" in self.kinds:
            # (B, N, D) -> (B, D, h, w) on both sides
            maps = _maps(seen.tokens, seen.grid_hw), _maps(tokens, seen.grid_hw)
            terms["kd_csf"] = self.config.kd_csf * self.transkd.context(*maps)
        if "patches" in self.kinds:
            with torch.no_grad():
                # (B, N, teacher's width), before positions
                theirs = self.teacher.patches(image_NCHW)
            mine = model.backbone.patch_embed(image_NCHW)  # type: ignore[union-attr,operator]
            terms["kd_patches"] = self.transkd.patches(mine, F.layer_norm(theirs, theirs.shape[-1:]))
        if "glmixer" in self.kinds:
            terms["kd_glmixer"] = F.mse_loss(self.mixer(seen.tokens[-1]).float(), tokens[-1].detach())
        if "assistant" in self.kinds:
            with torch.no_grad():
                theirs = plain_norm(self.teacher.patches(image_NCHW))
            own = model.backbone.patch_embed(image_NCHW)  # type: ignore[union-attr,operator]
            terms["kd_assistant"] = F.mse_loss(self.assistant(own, image_NCHW).float(), theirs)
        return torch.stack(list(terms.values())).sum(), terms


def _kept(tokens_BND: Tensor, kept_BV: Tensor | None) -> Tensor:
    if kept_BV is None:
        return tokens_BND
    return tokens_BND.gather(1, kept_BV[..., None].expand(-1, -1, tokens_BND.shape[-1]))


def _maps(tokens_BND: list[Tensor], grid_hw: tuple[int, int]) -> list[Tensor]:
    return [x.transpose(1, 2).unflatten(2, grid_hw) for x in tokens_BND]


def exits_loss(early: list[Tensor], last: Tensor, target_B: Tensor, loss: nn.Module, weight: float) -> Tensor:
    """Loss of a classifier with early exits.

    sum_j j L_j / sum_j j (PABEE), and each exit's KL to the last answer.

    Args:
        early: logits of the exits, in order.
        last: logits of the head at the end.
        target_B: true classes.
        loss: the supervised loss of one exit.
        weight: of the KL terms (their mean); the last answer is a fixed target there.
    """
    answers = [*early, last]
    # later exits weigh more: exit j by j, 1 + 2 + ... + n = n (n + 1) / 2
    each = torch.stack([j * loss(answer, target_B) for j, answer in enumerate(answers, 1)])
    weighted = each.sum() / (len(answers) * (len(answers) + 1) / 2)
    # ``logit_distillation`` detaches its teacher: the last answer is not pulled down to the early ones
    kl = torch.stack([logit_distillation(answer.float(), last.float(), 1.0) for answer in early]).mean()
    return weighted + weight * kl


__all__ = ["Guide", "StudentPass", "exits_loss", "observe"]
