"""Consistency-driven dynamic distillation: the losses and the net that is trained (methods.md 1.11).

A frozen teacher sees a picture with patches masked and again with frequencies removed. Where its tokens agree between
the two, its knowledge is taken to be about the picture and not about the mask, and the student, which sees the same two
views, is pulled towards it by that much. Beside that it rebuilds what was taken away, in the domain it was taken from.
Re-implementation: not the authors' code; hyper-parameters ours.

It does not know where pictures come from or how steps are taken.

Shapes: B batch, P patches, D width, L stages, 1HW pictures, hw patch grid.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.models.student import FeatureStudent, build_student
from tinyusfm_edge.training.distill_config import DistillConfig
from tinyusfm_edge.training.masking import PATCH, pixels_of, removed_frequencies
from tinyusfm_edge.training.teacher_bank import TeacherFeatures
from tinyusfm_edge.training.views import Views, as_input, masked

GREY_MEAN, GREY_STD = 0.449, 0.226
"""Means of ImageNet's three: the units in which grey pictures are rebuilt."""


def consistency(spatial_BPD: Tensor, frequency_BPD: Tensor, floor: float = 0.0) -> Tensor:
    """Weight of each token: how far the teacher says the same under both masks.

    Args:
        spatial_BPD: teacher tokens of the spatially masked view, normalised (``plain_norm``).
        frequency_BPD: of the frequency masked view.
        floor: smallest weight.

    Returns:
        ``clip(relu(cos), floor, 1)``, BP, detached; 1 for equal tokens.
    """
    cosine = F.cosine_similarity(spatial_BPD.float(), frequency_BPD.float(), dim=-1)
    return cosine.clamp(min=max(0.0, floor), max=1.0).detach()


def weighted_distance(
    student_BPD: Tensor, target_BPD: Tensor, weight_BP: Tensor, *, beta: float, dynamic_scale: bool
) -> Tensor:
    """Smooth L1 between tokens, averaged with weights inside each picture, then over pictures.

    Args:
        student_BPD: projected student tokens.
        target_BPD: normalised teacher tokens.
        weight_BP: 0..1.
        beta: of the smooth L1.
        dynamic_scale: multiply each picture's mean by its mean weight.

    Returns:
        A scalar.
    """
    distance = F.smooth_l1_loss(student_BPD.float(), target_BPD.float(), beta=beta, reduction="none").mean(-1)
    each = (weight_BP * distance).sum(1) / weight_BP.sum(1).clamp_min(1e-6)
    return (each * weight_BP.mean(1) if dynamic_scale else each).mean()


def spatial_loss(rebuilt_B1HW: Tensor, target_B1HW: Tensor, mask_Bhw: Tensor) -> Tensor:
    """L1 over masked pixels, averaged inside each picture, then over pictures."""
    hidden = pixels_of(mask_Bhw).float()
    each = ((rebuilt_B1HW.float() - target_B1HW).abs() * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3)).clamp_min(1.0)
    return each.mean()


def frequency_loss(rebuilt_B1HW: Tensor, target_B1HW: Tensor, removed_B1HF: Tensor) -> Tensor:
    """L1 between log(1 + magnitude) of the unnormalised transforms, over removed frequencies only.

    Coefficients of ``rfft2`` that stand for two of the full transform count once; that changes no band's share by more
    than the two axes' columns.
    """
    left = torch.log1p(torch.fft.rfft2(rebuilt_B1HW.float()).abs())
    right = torch.log1p(torch.fft.rfft2(target_B1HW.float()).abs())
    gone = removed_B1HF.float()
    each = ((left - right).abs() * gone).sum((1, 2, 3)) / gone.sum((1, 2, 3)).clamp_min(1.0)
    return each.mean()


class PixelHead(nn.Module):
    """SimMIM's decoder: one 1x1 convolution and a pixel shuffle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, PATCH * PATCH, 1)

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        """Patch tokens -> grey picture B1HW."""
        grid = round(tokens_BPD.shape[1] ** 0.5)
        square = tokens_BPD.transpose(1, 2).unflatten(2, (grid, grid))
        return F.pixel_shuffle(self.proj(square), PATCH)


class DistillObjective(nn.Module):
    """Student, projections and pixel heads; ``forward`` gives the loss. The teacher is no part of the state."""

    def __init__(
        self, config: DistillConfig, teacher_widths: tuple[int, ...] = (), teacher: TeacherFeatures | None = None
    ) -> None:
        super().__init__()
        self.config = config
        student = build_student(config.built_student)
        assert isinstance(student, FeatureStudent)
        self.student = student
        self._teacher = [teacher]  # in a list, so that it is no submodule
        if config.needs_teacher:
            self.projections = nn.ModuleList(nn.Linear(config.student.width, width) for width in teacher_widths)
        self.heads = nn.ModuleDict(
            {v: PixelHead(config.student.width) for v in config.views if v != "clean" and config.reconstruct}
        )
        # the final norm stands in front of the pixel heads; without them it would have no gradient
        self.student.backbone.norm.requires_grad_(bool(self.heads))
        if not self.heads and config.layers[-1] < config.student.depth:
            self.student.backbone.blocks[config.layers[-1] :].requires_grad_(False)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of a batch.

        Args:
            batch: ``image`` B1HW, ``mask`` Bhw, ``bands`` BK, and ``teacher`` where a bank is used.
        """
        config = self.config
        views = Views(image_B1HW=batch["image"], mask_Bhw=batch["mask"], bands_BK=batch["bands"])
        pictures = {kind: masked(views, kind, config.view.mask) for kind in config.views}
        size = len(views.image_B1HW)
        student = self.student.backbone
        last = {config.student.depth - 1} if self.heads else set()
        indices = tuple(sorted({layer - 1 for layer in config.layers} | last))
        taps = student.taps(as_input(torch.cat(list(pictures.values()))), indices)
        by_view = {
            kind: {index: tap[i * size : (i + 1) * size, 1:] for index, tap in zip(indices, taps, strict=True)}
            for i, kind in enumerate(config.views)
        }
        loss = views.image_B1HW.new_zeros(())
        scalars: dict[str, Tensor] = {}
        if config.needs_teacher:
            kd = self._feature_loss(by_view, self._teacher_tokens(batch, pictures), scalars)
            loss = loss + config.lambda_kd * kd
        for kind in self.heads:
            rebuilt = self.heads[kind](student.norm(by_view[kind][config.student.depth - 1]))
            loss = loss + self._rebuilt_loss(kind, rebuilt, views, scalars)
        return loss, scalars

    def _teacher_tokens(self, batch: dict[str, Any], pictures: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        if "teacher" in batch:
            found: dict[str, list[Tensor]] = batch["teacher"]
            return found
        teacher = self._teacher[0]
        assert teacher is not None, "without a bank a teacher must be given"
        teacher.to(next(iter(pictures.values())).device)
        return {kind: teacher(picture) for kind, picture in pictures.items()}

    def _feature_loss(
        self, by_view: dict[str, dict[int, Tensor]], teacher: dict[str, list[Tensor]], scalars: dict[str, Tensor]
    ) -> Tensor:
        config = self.config
        terms = []
        for stage, layer in enumerate(config.layers):
            first = teacher[config.views[0]][stage]
            if config.weights == "consistency":
                weight = consistency(teacher["spatial"][stage], teacher["frequency"][stage], config.weight_floor)
                scalars[f"weight_mean/{layer}"] = weight.mean()
                scalars[f"weight_spread/{layer}"] = weight.std()
            else:
                weight = torch.ones(first.shape[:2], device=first.device)
            for kind in config.views:
                projected = self.projections[stage](by_view[kind][layer - 1])
                terms.append(
                    weighted_distance(
                        projected,
                        teacher[kind][stage],
                        weight,
                        beta=config.beta,
                        dynamic_scale=config.dynamic_scale,
                    )
                )
        # the sum over views, the mean over stages
        kd = torch.stack(terms).sum() / len(config.layers)
        scalars["kd"] = kd.detach()
        return kd

    def _rebuilt_loss(self, kind: str, rebuilt: Tensor, views: Views, scalars: dict[str, Tensor]) -> Tensor:
        config = self.config
        target = (views.image_B1HW - GREY_MEAN) / GREY_STD
        if kind == "spatial":
            loss, factor = spatial_loss(rebuilt, target, views.mask_Bhw), config.lambda_spatial
        else:
            removed = removed_frequencies(config.view.mask, config.view.image_size, views.bands_BK)
            loss, factor = frequency_loss(rebuilt, target, removed), config.lambda_frequency
        scalars[f"rebuild_{kind}"] = loss.detach()
        return factor * loss


def inactive_stages(scalars: dict[str, float], below: float) -> list[str]:
    """Stages whose weights hardly differ between tokens, so that weighing does nothing: lines for the user.

    Args:
        scalars: of a run.
        below: spread under which a stage counts as inactive.
    """
    return [
        f"mechanism inactive at block {name.rpartition('/')[2]}: the consistency weights spread by {value:.4f} only"
        for name, value in sorted(scalars.items())
        if name.startswith("weight_spread/") and value < below
    ]


__all__ = [
    "GREY_MEAN",
    "GREY_STD",
    "DistillObjective",
    "PixelHead",
    "consistency",
    "frequency_loss",
    "inactive_stages",
    "spatial_loss",
    "weighted_distance",
]
