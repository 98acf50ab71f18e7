"""Consistency-driven dynamic distillation (methods.md 1.11).

The losses and the model that is trained.

A frozen teacher sees an image with patches masked and again with frequencies removed. Where its tokens agree between
the two, its knowledge is taken to be about the image and not about the mask, and the student, which sees the crop and
the same two views of it, is pulled by that much towards the teacher's answer to the clean crop. Beside that it
rebuilds what was taken away, in the domain it was taken from. Re-implementation: not the authors' code;
hyper-parameters ours.

It does not know where images come from or how steps are taken.

Shapes: B batch, P patches, D width, L stages, 1HW images, hw patch grid.
F = W/2 + 1 columns of ``rfft2``; K bands; V patches that the student keeps where tokens are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.models.student import FeatureStudent, build_student
from tinyusfm_edge.training.pretrain.adaptive import AdaptiveMask
from tinyusfm_edge.training.pretrain.balance import Balance
from tinyusfm_edge.training.pretrain.config import DistillConfig
from tinyusfm_edge.training.pretrain.masking import PATCH, pixels_of, removed_frequencies
from tinyusfm_edge.training.pretrain.relation import RelationLoss, attention_logits
from tinyusfm_edge.training.pretrain.standard import Standard, identity
from tinyusfm_edge.training.pretrain.teacher_bank import TeacherFeatures
from tinyusfm_edge.training.pretrain.views import Views, as_input, masked

GREY_MEAN, GREY_STD = 0.449, 0.226
"""Means of ImageNet's three: the units in which grey images are rebuilt."""
MEAN_MARGIN = 0.98
"""A feature loss above this share of the mean predictor's is no better than it."""


def consistency(spatial_BPD: Tensor, frequency_BPD: Tensor, floor: float = 0.0) -> Tensor:
    """Weight of each token: how far the teacher says the same under both masks.

    Args:
        spatial_BPD: teacher tokens of the spatially masked view, normalised (``plain_norm``).
        frequency_BPD: of the frequency masked view.
        floor: smallest weight.

    Returns:
        ``clip(relu(cos), floor, 1)``, BP, detached; 1 for equal tokens.
    """
    # (B, P): one number per token; negative agreement is none, hence the clamp at 0
    cosine = F.cosine_similarity(spatial_BPD.float(), frequency_BPD.float(), dim=-1)
    return cosine.clamp(min=max(0.0, floor), max=1.0).detach()


def even_out(weight_BP: Tensor, visible_BP: Tensor) -> Tensor:
    """Weights that tell visible tokens apart and say nothing of the hidden ones.

    The teacher's answer to a hidden patch differs from that to a visible one whatever the image shows, so a cosine
    compared across both is a detector of the mask. Each hidden token gets the mean of its image's visible ones.

    Args:
        weight_BP: by ``consistency``.
        visible_BP: bool, patches that the spatial mask left.
    """
    # (B, P) 1 where the student saw the patch
    seen = visible_BP.float()
    # (B, 1): mean weight of an image's visible tokens
    mean_B1 = (weight_BP * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1.0)
    return torch.where(visible_BP, weight_BP, mean_B1)


def correlation(left_BP: Tensor, right_BP: Tensor) -> Tensor:
    """Pearson's correlation over all tokens of a batch.

    0 where one of them does not vary.
    """
    a, b = (x.float().flatten() - x.float().mean() for x in (left_BP, right_BP))
    size = (a.square().mean() * b.square().mean()).sqrt()
    return torch.where(size > 1e-8, (a * b).mean() / size.clamp_min(1e-8), torch.zeros_like(size))


def weighted_distance(
    student_BPD: Tensor, target_BPD: Tensor, weight_BP: Tensor, *, beta: float, dynamic_scale: bool
) -> Tensor:
    """Smooth L1 between tokens, weighted inside each image.

    Averaged with weights inside each image, then over images.

    Args:
        student_BPD: projected student tokens.
        target_BPD: normalised teacher tokens.
        weight_BP: 0..1.
        beta: of the smooth L1.
        dynamic_scale: multiply each image's mean by its mean weight.

    Returns:
        A scalar.
    """
    # (B, P): mean over the D channels of a token
    distance = F.smooth_l1_loss(student_BPD.float(), target_BPD.float(), beta=beta, reduction="none").mean(-1)
    # (B,): a weighted mean, so an image with small weights counts no less ...
    each = (weight_BP * distance).sum(1) / weight_BP.sum(1).clamp_min(1e-6)
    # ... unless the image's own mean weight is put back
    return (each * weight_BP.mean(1) if dynamic_scale else each).mean()


def spatial_loss(rebuilt_B1HW: Tensor, target_B1HW: Tensor, mask_Bhw: Tensor) -> Tensor:
    """L1 over masked pixels, averaged inside each image, then over images."""
    # (B, h, w) -> (B, 1, H, W)
    hidden = pixels_of(mask_Bhw).float()
    each = ((rebuilt_B1HW.float() - target_B1HW).abs() * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3)).clamp_min(1.0)
    return each.mean()


def frequency_loss(rebuilt_B1HW: Tensor, target_B1HW: Tensor, removed_B1HF: Tensor) -> Tensor:
    """L1 between log magnitudes of transforms, over removed frequencies only.

    The value is log(1 + magnitude) of the unnormalised transforms.

    Coefficients of ``rfft2`` that stand for two of the full transform count once; that changes no band's share by more
    than the two axes' columns.
    """
    # (B, 1, H, F) magnitudes; the logarithm keeps the largest, lowest frequencies from deciding alone
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
        """Patch tokens -> grey image B1HW."""
        grid = round(tokens_BPD.shape[1] ** 0.5)
        # (B, P, D) -> (B, D, h, w)
        square = tokens_BPD.transpose(1, 2).unflatten(2, (grid, grid))
        # (B, 256, h, w) -> (B, 1, 16 h, 16 w): the 256 channels of a patch are its pixels
        return F.pixel_shuffle(self.proj(square), PATCH)


class DistillObjective(nn.Module):
    """Student, projections and pixel heads; ``forward`` gives the loss.

    The teacher is no part of the state.

    What standardises the targets is: a resumed run goes on with the same.
    """

    _teacher: TeacherFeatures | None

    def __init__(
        self,
        config: DistillConfig,
        teacher_widths: tuple[int, ...] = (),
        teacher: TeacherFeatures | None = None,
        standards: Sequence[Standard] = (),
        steps: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        student = build_student(config.built_student)
        assert isinstance(student, FeatureStudent)
        self.student = student
        # past nn.Module, so that the teacher is no submodule: it is neither trained nor saved
        object.__setattr__(self, "_teacher", teacher)
        if config.needs_teacher:
            self.projections = nn.ModuleList(nn.Linear(config.student.width, width) for width in teacher_widths)
            for stage, standard in enumerate(standards or [identity(width) for width in teacher_widths]):
                # buffers: saved with the run and moved with the module, but not trained
                self.register_buffer(f"target_mean_{stage}", standard.mean_D.clone())
                self.register_buffer(f"target_sd_{stage}", standard.sd_D.clone())
        self.heads = nn.ModuleDict(
            {v: PixelHead(config.student.width) for v in config.views if v != "clean" and config.reconstruct}
        )
        self.adaptive: AdaptiveMask | None = None
        if config.masks == "adaptive" and config.needs_teacher:
            patches = self.student.backbone.num_patches
            self.adaptive = AdaptiveMask(patches, config.view.mask.spatial_ratio, steps)
        if config.lambda_relation:
            assert teacher is not None, "relations need the teacher itself"
            self.relation = RelationLoss(config.student.heads, teacher.heads)
        names = (["kd"] if config.needs_teacher else []) + list(self.heads)
        names += ["relation"] if config.lambda_relation else []
        self.balance = Balance(names if config.balance != "fixed" and len(names) > 1 else [])
        # the final norm stands in front of the pixel heads; without them it would have no gradient
        self.student.backbone.norm.requires_grad_(bool(self.heads))
        if not self.heads and config.layers[-1] < config.student.depth:
            self.student.backbone.blocks[config.layers[-1] :].requires_grad_(False)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of a batch.

        Args:
            batch: ``image`` B1HW, ``mask`` Bhw, ``bands`` BK, ``kept`` BV where tokens are dropped, and ``teacher``
                where a bank is used.
        """
        config = self.config
        views = Views(image_B1HW=batch["image"], mask_Bhw=batch["mask"], bands_BK=batch["bands"])
        tokens = self._teacher_tokens(batch, views) if config.needs_teacher else {}
        if self.adaptive is not None:
            grid = views.mask_Bhw.shape[1:]
            # the mask follows the deepest stage of the teacher on the clean view: (B, P) -> (B, h, w)
            views = replace(views, mask_Bhw=self.adaptive(tokens["clean"][-1]).unflatten(1, grid))
        by_view = self._student_tokens(views, batch.get("kept"))
        scalars: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        # what each term is made of
        at: dict[str, list[Tensor]] = {}
        weights: dict[str, float] = {"kd": config.lambda_kd}
        if config.needs_teacher:
            terms["kd"] = self._feature_loss(by_view, tokens, views.mask_Bhw, batch.get("kept"), scalars)
            at["kd"] = [by_view[kind][layer - 1] for kind in config.views for layer in config.layers]
        for kind in self.heads:
            # tokens of the last block (B, P, D) -> image (B, 1, H, W)
            at[kind] = [by_view[kind][config.student.depth - 1]]
            rebuilt = self.heads[kind](self.student.backbone.norm(at[kind][0]))
            terms[kind] = self._rebuilt_loss(kind, rebuilt, views, scalars)
            weights[kind] = config.lambda_spatial if kind == "spatial" else config.lambda_frequency
        if config.lambda_relation:
            terms["relation"], at["relation"] = self._relation_loss(views)
            weights["relation"] = config.lambda_relation
            scalars["relation"] = terms["relation"].detach()
        if self.balance.names:
            loss: Tensor = self.balance(terms, weights, at if config.balance == "gradient" else None)
            return loss, scalars
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum(), scalars

    def _relation_loss(self, views: Views) -> tuple[Tensor, list[Tensor]]:
        """Attention of the last block, student and teacher on the clean crop.

        Beside the loss, the tokens it is made of.
        """
        backbone, teacher = self.student.backbone, self._teacher
        assert teacher is not None
        before = backbone.taps(as_input(views.image_B1HW), (len(backbone.blocks) - 2,))[0]
        last: Any = backbone.blocks[-1]
        # (B, heads, 1 + P, 1 + P), before the softmax
        mine = attention_logits(last.attn, last.norm1(before))
        loss: Tensor = self.relation(mine, teacher.attention(views.image_B1HW))
        return loss, [before]

    def _student_tokens(self, views: Views, kept_BV: Tensor | None) -> dict[str, dict[int, Tensor]]:
        """View -> block, from 0 -> patch tokens."""
        config, size = self.config, len(views.image_B1HW)
        # one batch of all views: views x B images in a single pass
        images = [masked(views, kind, config.view.mask) for kind in config.views]
        last = {config.student.depth - 1} if self.heads else set()
        indices = tuple(sorted({layer - 1 for layer in config.layers} | last))
        # every view keeps the same patches
        every = None if kept_BV is None else kept_BV.repeat(len(images), 1)
        taps = self.student.backbone.taps(as_input(torch.cat(images)), indices, kept_BV=every)
        return {
            # (views B, 1 + P, D) -> per view (B, P, D), the class token left out
            kind: {index: tap[i * size : (i + 1) * size, 1:] for index, tap in zip(indices, taps, strict=True)}
            for i, kind in enumerate(config.views)
        }

    def _teacher_tokens(self, batch: dict[str, Any], views: Views) -> dict[str, list[Tensor]]:
        """View -> tokens of each stage, standardised where the settings say so."""
        found: dict[str, list[Tensor]] = batch.get("teacher", {})
        if not found:
            teacher = self._teacher
            assert teacher is not None, "without a bank a teacher must be given"
            teacher.to(views.image_B1HW.device)
            mask = self.config.view.mask
            found = {kind: teacher(masked(views, kind, mask)) for kind in self.config.teacher_views}
        if not self.config.standardise:
            return found
        return {kind: [self._standard(i)(x) for i, x in enumerate(stages)] for kind, stages in found.items()}

    def _standard(self, stage: int) -> Standard:
        return Standard(mean_D=getattr(self, f"target_mean_{stage}"), sd_D=getattr(self, f"target_sd_{stage}"))

    def _feature_loss(
        self,
        by_view: dict[str, dict[int, Tensor]],
        teacher: dict[str, list[Tensor]],
        mask_Bhw: Tensor,
        kept_BV: Tensor | None,
        scalars: dict[str, Tensor],
    ) -> Tensor:
        """The sum over views, the mean over stages.

        Beside it what a predictor of the mean token would score.
        """
        config = self.config
        terms, of_mean = [], []
        for stage, layer in enumerate(config.layers):
            # one weight per token and stage, the same for all views
            weight_BP = self._weights(teacher, stage, mask_Bhw, scalars)
            # the predictor of the mean: 0 where targets are standardised, else the pool's mean
            mean_D = self._standard(stage).mean_D
            constant_D = torch.zeros_like(mean_D) if config.standardise else mean_D
            for kind in config.views:
                target = teacher["clean" if config.targets == "clean" else kind][stage]
                weight = torch.ones_like(target[..., 0]).float() if weight_BP is None else weight_BP
                if kept_BV is not None:
                    # (B, P, D) -> (B, V, D): only what the student looked at is compared
                    target = target.gather(1, kept_BV[..., None].expand(-1, -1, target.shape[-1]))
                    weight = weight.gather(1, kept_BV)
                # student width -> teacher width, (B, P or V, D)
                projected = self.projections[stage](by_view[kind][layer - 1])
                if (
                    self.adaptive is not None
                    and self.training
                    and kind == "spatial"
                    and stage == len(config.layers) - 1
                ):
                    # the student's error at each place, of the deepest stage under the spatial mask alone
                    self.adaptive.remember((projected.detach() - target).square().mean(-1))
                how: dict[str, Any] = {"beta": config.beta, "dynamic_scale": config.dynamic_scale}
                # one scalar per stage and view
                terms.append(weighted_distance(projected, target, weight, **how))
                with torch.no_grad():
                    # the same distance for a constant: what a student scores that has learnt nothing
                    of_mean.append(weighted_distance(constant_D.expand_as(projected), target, weight, **how))
        kd = torch.stack(terms).sum() / len(config.layers)
        scalars["kd"] = kd.detach()
        scalars["kd_of_mean"] = torch.stack(of_mean).sum() / len(config.layers)
        return kd

    def _weights(
        self, teacher: dict[str, list[Tensor]], stage: int, mask_Bhw: Tensor, scalars: dict[str, Tensor]
    ) -> Tensor | None:
        """Weights BP of a stage, or None for equal ones.

        How far they only tell the mask is logged.
        """
        config, layer = self.config, self.config.layers[stage]
        if config.weights == "uniform":
            return None
        # the teacher sees the same image under two masks: where it agrees with itself, its token is trusted
        weight = consistency(teacher["spatial"][stage], teacher["frequency"][stage], config.weight_floor)
        # (B, P)
        visible = ~mask_Bhw.flatten(1)
        scalars[f"mask_correlation_raw/{layer}"] = correlation(weight, visible)
        if config.weight_place == "visible":
            weight = even_out(weight, visible)
        scalars[f"mask_correlation/{layer}"] = correlation(weight, visible)
        scalars[f"weight_mean/{layer}"] = weight.mean()
        scalars[f"weight_spread/{layer}"] = weight.std()
        return weight

    def _rebuilt_loss(self, kind: str, rebuilt: Tensor, views: Views, scalars: dict[str, Tensor]) -> Tensor:
        config = self.config
        # rebuilt in ImageNet's units, so that the losses of all views have one scale
        target = (views.image_B1HW - GREY_MEAN) / GREY_STD
        if kind == "spatial":
            loss = spatial_loss(rebuilt, target, views.mask_Bhw)
        else:
            # (B, 1, H, F)
            removed = removed_frequencies(config.view.mask, config.view.image_size, views.bands_BK)
            loss = frequency_loss(rebuilt, target, removed)
        scalars[f"rebuild_{kind}"] = loss.detach()
        return loss


def no_better_than_mean(scalars: Mapping[str, float]) -> str:
    """A line where a run's feature loss is that of predicting the mean token.

    Everywhere the mean; empty where the loss is below.

    Args:
        scalars: the last ones of a run.
    """
    kd, of_mean = scalars.get("kd"), scalars.get("kd_of_mean")
    if kd is None or of_mean is None or kd < MEAN_MARGIN * of_mean:
        return ""
    return (
        f"the student is no better than a predictor of the mean token (feature loss {kd:.4f}, of the mean "
        f"{of_mean:.4f}): it has learnt nothing of the teacher; take more steps or a higher learning rate"
    )


def inactive_stages(scalars: dict[str, float], below: float) -> list[str]:
    """Stages whose weights hardly differ between tokens, as lines for the user.

    Weighing does nothing there.

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
    "MEAN_MARGIN",
    "DistillObjective",
    "PixelHead",
    "consistency",
    "correlation",
    "even_out",
    "frequency_loss",
    "inactive_stages",
    "no_better_than_mean",
    "spatial_loss",
    "weighted_distance",
]
