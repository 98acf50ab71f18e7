"""What one adaptation step minimises, and the samples it sees.

The engine's ``Task`` for masks and classes.

The objective holds the network under ``model``, so weights of a run carry that prefix. Every sample is augmented by a
seed of its own, so that a batch is the same whatever the number of processes. It does not know tables or run folders.

Shapes: B batch, 1HW images and masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.models.student import FpnHead, SegmentationStudent
from tinyusfm_edge.training.adapt.augment import AugmentConfig, augment
from tinyusfm_edge.training.adapt.config import AdaptConfig
from tinyusfm_edge.training.adapt.guide import Guide, StudentPass, exits_loss, observe
from tinyusfm_edge.training.adapt.layer_decay import layer_scale
from tinyusfm_edge.training.adapt.task import TaskData, TaskLoss, UnlabelledPool
from tinyusfm_edge.training.trainer.loop import Draw, ParameterGroup, plain_groups
from tinyusfm_export.verify.reference import normalise
from tinyusfm_runtime.spec import PreprocessSpec


class AdaptObjective(nn.Module):
    """The loss of a batch under a net: labels, early exits, and what a teacher adds."""

    def __init__(self, model: nn.Module, loss: TaskLoss, spec: PreprocessSpec, guide: Guide | None = None) -> None:
        super().__init__()
        self.model, self.loss, self.spec, self.guide = model, loss, spec, guide
        self.exits_kl, self.deep, self.drop_tokens = loss.exits_kl, 0.0, 0.0
        if isinstance(model, SegmentationStudent):
            self.deep, self.drop_tokens = loss.deep, loss.drop_tokens
        if self.deep:
            self.aids = nn.ModuleList(nn.Conv2d(FpnHead.channels, 1, 1) for _ in range(2))

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, and its parts by name.

        The batch has ``image`` (0..1), ``target`` and ``labelled``.
        """
        # (B, 3, H, W): three equal channels
        image = normalise(batch["image"] * 255.0, self.spec)
        kept = None
        if self.drop_tokens and self.training:
            assert isinstance(self.model, SegmentationStudent)
            # None in about half of the batches, else (B, V)
            kept = draw_kept(len(image), self.model.backbone.num_patches, self.drop_tokens)
        # one pass; every loss below looks at its parts
        seen = observe(self.model, image, kept_BV=kept)
        parts = {"task": self._task(seen, batch["target"], batch["labelled"])}
        if self.deep:
            parts["deep"] = self.deep * self._deep(seen, batch["target"], batch["labelled"])
        if self.guide is not None:
            parts |= self.guide(seen, self.model, image)[1]
        return torch.stack(list(parts.values())).sum(), parts if len(parts) > 1 else {}

    def _deep(self, seen: StudentPass, target: Tensor, labelled_B: Tensor) -> Tensor:
        """Mean loss of the head's two finest maps, each at its own size.

        0 where a part of a batch has no labels.
        """
        losses = []
        for aid, level in zip(self.aids, seen.levels[:2], strict=True):
            # (B, 1, h_i, w_i): a 1x1 classifier that is thrown away after training
            logits = aid(level)
            if not labelled_B.any():
                # a zero that depends on the weights, so that every process has gradients to exchange
                losses.append(0.0 * logits.sum())
                continue
            # the mask as shares of each small pixel, 0..1
            small = F.interpolate(target[labelled_B], size=level.shape[-2:], mode="area")
            losses.append(self.loss(logits[labelled_B], small))
        return torch.stack(losses).mean()

    def _task(self, seen: StudentPass, target: Tensor, labelled_B: Tensor) -> Tensor:
        """Mean over the labelled samples; 0 where a part of a batch has none."""
        if not labelled_B.any():
            return 0.0 * seen.logits.sum()
        logits, truth = seen.logits[labelled_B], target[labelled_B]
        if seen.early:
            return exits_loss([early[labelled_B] for early in seen.early], logits, truth, self.loss, self.exits_kl)
        loss: Tensor = self.loss(logits, truth)
        return loss


def draw_kept(batch: int, num_patches: int, largest_drop: float) -> Tensor | None:
    """Patches that a batch keeps, BV int64 ascending.

    Up to a share is dropped; half of the batches keep all.
    """
    # uniform in -1..1, cut at 0: half of the batches drop nothing
    drop = max(0.0, float(torch.rand(())) * 2 - 1) * largest_drop
    count = max(1, round(num_patches * (1 - drop)))
    if count == num_patches:
        return None
    # each image its own patches, ascending so that positions stay in order
    return torch.stack([torch.randperm(num_patches)[:count].sort().values for _ in range(batch)])


class AdaptTask:
    """Labelled images, and others where the recipe asks for them.

    Others: phantoms, negatives and transfer images.
    """

    def __init__(self, config: AdaptConfig, data: TaskData, objective: AdaptObjective) -> None:
        self.config, self.data, self._objective = config, data, objective
        small = data.train.small
        often = [config.repeat_small if small is not None and bool(small[i]) else 1 for i in range(len(data.train))]
        self._order = [index for index, times in enumerate(often) for _ in range(times)]

    @property
    def objective(self) -> AdaptObjective:
        """The module that is trained."""
        return self._objective

    def groups(self) -> list[ParameterGroup]:
        """Parameters by layer-wise scale and weight decay."""
        depth, decay = self.config.student.depth, self.config.layer_decay
        return plain_groups(
            self._objective, self.config.weight_decay, partial(layer_scale, depth=depth, layer_decay=decay)
        )

    def __len__(self) -> int:
        """Labelled images, each as often as it comes in an epoch."""
        return len(self._order)

    def batch(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Augmented images 0..1 and targets of these samples."""
        parts = [self._sample(draw) for draw in draws]
        return {
            "image": torch.cat([part[0] for part in parts]),
            "target": torch.cat([part[1] for part in parts]),
            "labelled": torch.tensor([part[2] for part in parts]),
        }

    def _sample(self, draw: Draw) -> tuple[Tensor, Tensor, bool]:
        generator = torch.Generator().manual_seed(draw.seed)
        pool, index = self._choose(draw, generator)
        # (1, 1, H, W) 0..1
        image = pool.images_SHW[index][None, None].float() / 255.0
        segment = self.config.student.task == "segment"
        mask = pool.targets[index][None, None].float() / 255.0 if segment else torch.zeros_like(image)
        image, mask = augment(image, mask, self._ranges(draw), generator)
        return image, mask if segment else pool.targets[index][None], pool is not self.data.transfer

    def _choose(self, draw: Draw, generator: torch.Generator) -> tuple[UnlabelledPool, int]:
        phantoms, transfer = self.data.phantoms, self.data.transfer
        if transfer is not None and float(torch.rand((), generator=generator)) < self.config.transfer_share:
            return transfer, int(torch.randint(len(transfer), (), generator=generator))
        if phantoms is not None and float(torch.rand((), generator=generator)) < self.config.phantom_share:
            return phantoms, int(torch.randint(len(phantoms), (), generator=generator))
        negatives = self.data.negatives
        if negatives is not None and float(torch.rand((), generator=generator)) < self.config.negative_share:
            return negatives, int(torch.randint(len(negatives), (), generator=generator))
        return self.data.train, self._order[draw.index]

    def _ranges(self, draw: Draw) -> AugmentConfig:
        start = self.config.polish_from
        polish = start is not None and draw.position // self.config.batch >= start
        return self.config.augment.halved() if polish else self.config.augment


__all__ = ["AdaptObjective", "AdaptTask", "draw_kept"]
