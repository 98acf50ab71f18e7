"""Self-distillation (DINO): a student learns from the moving average of itself.

DINO (Caron et al., ICCV 2021, arXiv 2104.14294): several crops of an image go through the student, the two large ones
through its teacher. For every pair of different crops the student's softmax follows the teacher's,
``L = mean over pairs of -sum_k p_t[k] log p_s[k]`` with ``p_t = softmax((t - c) / T_t)`` and ``p_s = softmax(s / T_s)``
(equations 1 to 3). The teacher is ``m teacher + (1 - m) student`` after every step, m from .996 to 1 along a cosine;
the centre is ``c <- .9 c + .1 mean of the teacher's outputs`` (equation 4). Centring alone leads to equal outputs,
sharpening alone to one output: together they balance. Re-implemented from the paper: not the authors' code.

Ours: crops, flips and gamma of views.py are the only augmentation; four small crops instead of eight; fewer outputs.

It does not know data, and nothing is taught from outside.

Shapes: B images, G = 2 global crops, S small crops, HW their sides, D width, K outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.models.encoder import resize_positions
from tinyusfm_edge.models.student import FeatureStudent, build_student
from tinyusfm_edge.training.pretrain.config import DistillConfig
from tinyusfm_edge.training.pretrain.views import as_input

GLOBAL_CROPS = 2
"""Large crops an image, which student and teacher see."""


class ProjectionHead(nn.Module):
    """Three layers, a unit sphere, and K unit prototypes.

    Section 3.1 of the source, its weight norm fixed at 1.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, outputs: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(outputs, bottleneck))

    def forward(self, class_BD: Tensor, *, still: bool = False) -> Tensor:
        """Class tokens -> cosines with the prototypes, BK.

        Args:
            class_BD: after the final norm.
            still: the prototypes get a gradient of 0.
        """
        # 0 times the parameter keeps its gradient there, which several processes ask for
        rows_KD: Tensor = self.prototypes.detach() + 0 * self.prototypes if still else self.prototypes
        on_sphere = F.normalize(self.mlp(class_BD).float(), dim=-1, eps=1e-6)
        return F.linear(on_sphere, F.normalize(rows_KD.float(), dim=-1, eps=1e-6))


class SelfTaught(nn.Module):
    """Backbone and projection head: crops of any side -> outputs."""

    def __init__(self, config: DistillConfig) -> None:
        super().__init__()
        student = build_student(config.built_student)
        assert isinstance(student, FeatureStudent)
        dino = config.dino
        self.net = student
        self.head = ProjectionHead(config.student.width, dino.hidden, dino.bottleneck, dino.outputs)

    def forward(self, image_B1HW: Tensor, *, still: bool = False) -> Tensor:
        """Brightness 0..1 -> outputs BK before any temperature.

        The position table is resampled to small crops, as in the source.
        """
        backbone = self.net.backbone
        # (B, P, D) patches of this crop's own grid
        patches = backbone.patch_embed(as_input(image_B1HW))
        grid = (image_B1HW.shape[-2] // 16, image_B1HW.shape[-1] // 16)
        table: Tensor = backbone.pos_embed
        if grid != tuple(backbone.grid_hw):
            table = resize_positions(table, grid, 1, antialias=False)
        x = torch.cat([backbone.cls_token.expand(len(patches), -1, -1), patches], 1) + table
        for block in backbone.blocks:
            x = block(x)
        outputs: Tensor = self.head(backbone.norm(x)[:, 0], still=still)
        return outputs


def as_buffers(module: nn.Module) -> nn.Module:
    """Turns all parameters of a module into buffers.

    They are saved with a run, moved with it and never trained.
    """
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                del part._parameters[name]
                part.register_buffer(name, value.detach().clone())
    return module


class DinoObjective(nn.Module):
    """Student, teacher and centre; ``forward`` gives the loss.

    The teacher follows at the start of the next step's ``forward``: the engine knows nothing of teachers, and a run
    that is taken up goes on with the same.
    """

    def __init__(self, config: DistillConfig, steps: int = 1) -> None:
        super().__init__()
        self.config, self.steps = config, max(1, steps)
        self.pupil = SelfTaught(config)
        self.teacher = as_buffers(copy.deepcopy(self.pupil))
        self.centre: Tensor
        self.calls: Tensor
        self.register_buffer("centre", torch.zeros(config.dino.outputs))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @property
    def student(self) -> FeatureStudent:
        """The network that gradients reach."""
        return self.pupil.net

    @property
    def result(self) -> FeatureStudent:
        """The network that the student file holds."""
        chosen = self.teacher if self.config.dino.saved == "teacher" else self.pupil
        assert isinstance(chosen, SelfTaught)
        return chosen.net

    @property
    def step(self) -> int:
        """Optimiser steps that were begun before this one."""
        return int(self.calls) // self.config.accumulate

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and scalars of a batch.

        Args:
            batch: ``global`` BGHW and, where there are small crops, ``local`` BSHW, brightness 0..1.
        """
        if self.training:
            self._follow()
        still = self.step < self.config.dino.freeze_last * self.steps
        # crops one after the other, (G B, K) and (S B, K)
        said = [self.pupil(by_crop(batch["global"]), still=still)]
        if "local" in batch:
            said.append(self.pupil(by_crop(batch["local"]), still=still))
        size = len(batch["global"])
        # (G + S, B, K)
        student_CBK = torch.cat(said).unflatten(0, (-1, size))
        with torch.no_grad():
            raw_GBK = self.teacher(by_crop(batch["global"])).unflatten(0, (GLOBAL_CROPS, size))
            target_GBK = ((raw_GBK - self.centre) / self.teacher_temperature).softmax(-1)
        loss = cross_entropy(student_CBK / self.config.dino.student_temperature, target_GBK)
        scalars = {"dino": loss.detach(), **measured(target_GBK.flatten(0, 1)), "centre": self.centre.norm()}
        if self.training:
            self._recentre(raw_GBK)
            self.calls += 1
        return loss, scalars

    @property
    def teacher_temperature(self) -> float:
        """Of this step: a line over the warm-up, then constant."""
        dino = self.config.dino
        done = min(1.0, self.step / max(1.0, dino.temperature_warmup * self.steps))
        return dino.teacher_temperature + (dino.last_teacher_temperature - dino.teacher_temperature) * done

    @torch.no_grad()
    def _follow(self) -> None:
        """The teacher's step after the student's.

        A copy before the first, whatever the student was started from.
        """
        if int(self.calls) % self.config.accumulate:
            return
        share = 1.0 if self.step == 0 else 1 - teacher_momentum(self.config.dino.momentum, self.step - 1, self.steps)
        own = self.pupil.state_dict()
        for name, value in self.teacher.state_dict().items():
            value.lerp_(own[name].to(value.dtype), share)

    @torch.no_grad()
    def _recentre(self, raw_GBK: Tensor) -> None:
        # (K,) mean over crops and images
        mean = raw_GBK.float().mean((0, 1))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # one centre for all processes
            torch.distributed.all_reduce(mean)
            mean = mean / torch.distributed.get_world_size()
        self.centre.lerp_(mean, 1 - self.config.dino.centre_momentum)


def by_crop(crops_BCHW: Tensor) -> Tensor:
    """Crops of each image -> all first crops, then all second ones: (C B) 1HW."""
    return crops_BCHW.transpose(0, 1).flatten(0, 1)[:, None]


def teacher_momentum(first: float, step: int, steps: int) -> float:
    """Share of the teacher that stays after a step.

    ``1 - (1 - first) (1 + cos(pi step / steps)) / 2``: from ``first`` to 1.

    Args:
        first: at step 0.
        step: from 0.
        steps: of the run.
    """
    return 1 - (1 - first) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))


def cross_entropy(logits_CBK: Tensor, target_GBK: Tensor) -> Tensor:
    """``-sum_k p_t log p_s``, a mean over pairs of different crops and over images.

    Args:
        logits_CBK: of the student, global crops first, divided by its temperature.
        target_GBK: the teacher's softmax.
    """
    log_CBK = logits_CBK.float().log_softmax(-1)
    # (G, C): each of the teacher's crops with each of the student's, mean over images
    pairs = -torch.einsum("gbk,cbk->gc", target_GBK.float(), log_CBK) / logits_CBK.shape[1]
    # a crop is not compared with itself
    other = ~torch.eye(*pairs.shape, dtype=torch.bool, device=pairs.device)
    return pairs[other].mean()


def measured(target_NK: Tensor) -> dict[str, Tensor]:
    """How much the teacher's answers tell.

    ``teacher_entropy``: mean entropy of an answer as a share of log K; 1 is equal outputs, 0 is one output.
    ``information``: entropy of the mean answer less the mean entropy, as a share of log min(K, N); 0 where every
    image is answered alike.

    Args:
        target_NK: the teacher's softmax of N crops.
    """
    count, outputs = target_NK.shape
    each = _entropy(target_NK).mean()
    information = (_entropy(target_NK.mean(0)) - each).clamp_min(0)
    return {
        "teacher_entropy": each / math.log(outputs),
        "information": information / math.log(max(2, min(outputs, count))),
    }


def _entropy(probability_K: Tensor) -> Tensor:
    return -(probability_K * probability_K.clamp_min(1e-12).log()).sum(-1)


def collapsed(scalars: Mapping[str, float], below: float) -> str:
    """A line where a self-distillation has collapsed: images get the same output.

    Empty where it has not.

    Args:
        scalars: the last ones of a run.
        below: information under which it has.
    """
    known, entropy = scalars.get("information"), scalars.get("teacher_entropy")
    if known is None or entropy is None or known >= below:
        return ""
    kind = "equal in all outputs" if entropy > 0.5 else "one output alone"
    return (
        f"the self-distillation has collapsed: every image is answered alike, {kind} (information {known:.4f}, entropy "
        f"{entropy:.4f}); lower the learning rate or dino.teacher_temperature, or take more steps or images"
    )


__all__ = [
    "GLOBAL_CROPS",
    "DinoObjective",
    "ProjectionHead",
    "SelfTaught",
    "as_buffers",
    "by_crop",
    "collapsed",
    "cross_entropy",
    "measured",
    "teacher_momentum",
]
