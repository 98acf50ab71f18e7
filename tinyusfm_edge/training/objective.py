"""What one adaptation step minimises, and the samples it sees: the engine's ``Task`` for masks and classes.

The objective holds the net under ``model``, so weights of a run carry that prefix. Every sample is augmented by a seed
of its own, so that a batch is the same whatever the number of processes. It does not know tables or run folders.

Shapes: B batch, 1HW pictures and masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tinyusfm_edge.training.adapt_config import AdaptConfig
from tinyusfm_edge.training.augment import AugmentConfig, augment
from tinyusfm_edge.training.guide import Guide, StudentPass, exits_loss, observe
from tinyusfm_edge.training.layer_decay import layer_scale
from tinyusfm_edge.training.loop import Draw, ParameterGroup, plain_groups
from tinyusfm_edge.training.task import Pool, TaskData, TaskLoss, normalise
from tinyusfm_runtime.spec import PreprocessSpec


class AdaptObjective(nn.Module):
    """The loss of a batch under a net: labels, early exits, and what a teacher adds."""

    def __init__(self, model: nn.Module, loss: TaskLoss, spec: PreprocessSpec, guide: Guide | None = None) -> None:
        super().__init__()
        self.model, self.loss, self.spec, self.guide = model, loss, spec, guide
        self.exits_kl = loss.exits_kl

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch (``image`` 0..1, ``target``, ``labelled``), and its parts by name."""
        image = normalise(batch["image"] * 255.0, self.spec)
        seen = observe(self.model, image)
        parts = {"task": self._task(seen, batch["target"], batch["labelled"])}
        if self.guide is None:
            return parts["task"], {}
        guided, terms = self.guide(seen, self.model, image)
        return parts["task"] + guided, parts | terms

    def _task(self, seen: StudentPass, target: Tensor, labelled_B: Tensor) -> Tensor:
        """Mean over the labelled samples; 0 where a part of a batch has none."""
        if not labelled_B.any():
            return 0.0 * seen.logits.sum()
        logits, truth = seen.logits[labelled_B], target[labelled_B]
        if seen.early:
            return exits_loss([early[labelled_B] for early in seen.early], logits, truth, self.loss, self.exits_kl)
        loss: Tensor = self.loss(logits, truth)
        return loss


class AdaptTask:
    """Labelled pictures, and phantoms, negatives and transfer pictures where the recipe asks for them."""

    def __init__(self, config: AdaptConfig, data: TaskData, objective: AdaptObjective) -> None:
        self.config, self.data, self._objective = config, data, objective

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
        """Labelled pictures."""
        return len(self.data.train)

    def batch(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Augmented pictures 0..1 and targets of these samples."""
        parts = [self._sample(draw) for draw in draws]
        return {
            "image": torch.cat([part[0] for part in parts]),
            "target": torch.cat([part[1] for part in parts]),
            "labelled": torch.tensor([part[2] for part in parts]),
        }

    def _sample(self, draw: Draw) -> tuple[Tensor, Tensor, bool]:
        generator = torch.Generator().manual_seed(draw.seed)
        pool, index = self._choose(draw, generator)
        image = pool.images_SHW[index][None, None].float() / 255.0
        segment = self.config.student.task == "segment"
        mask = pool.targets[index][None, None].float() if segment else torch.zeros_like(image)
        image, mask = augment(image, mask, self._ranges(draw), generator)
        return image, mask if segment else pool.targets[index][None], pool is not self.data.transfer

    def _choose(self, draw: Draw, generator: torch.Generator) -> tuple[Pool, int]:
        phantoms, transfer = self.data.phantoms, self.data.transfer
        if transfer is not None and float(torch.rand((), generator=generator)) < self.config.transfer_share:
            return transfer, int(torch.randint(len(transfer), (), generator=generator))
        if phantoms is not None and float(torch.rand((), generator=generator)) < self.config.phantom_share:
            return phantoms, int(torch.randint(len(phantoms), (), generator=generator))
        negatives = self.data.negatives
        if negatives is not None and float(torch.rand((), generator=generator)) < self.config.negative_share:
            return negatives, int(torch.randint(len(negatives), (), generator=generator))
        return self.data.train, draw.index

    def _ranges(self, draw: Draw) -> AugmentConfig:
        start = self.config.polish_from
        polish = start is not None and draw.position // self.config.batch >= start
        return self.config.augment.halved() if polish else self.config.augment


__all__ = ["AdaptObjective", "AdaptTask"]
