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
from tinyusfm_edge.training.layer_decay import layer_scale
from tinyusfm_edge.training.loop import Draw, ParameterGroup, plain_groups
from tinyusfm_edge.training.task import Pool, TaskData, TaskLoss, normalise
from tinyusfm_runtime.spec import PreprocessSpec


class AdaptObjective(nn.Module):
    """The loss of a batch under a net."""

    def __init__(self, model: nn.Module, loss: TaskLoss, spec: PreprocessSpec) -> None:
        super().__init__()
        self.model, self.loss, self.spec = model, loss, spec

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch (``image`` 0..1 and ``target``), and scalars by name."""
        logits = self.model(normalise(batch["image"] * 255.0, self.spec))
        loss = self.loss(logits, batch["target"])
        return loss, {}


class AdaptTask:
    """Labelled pictures, and phantoms where the recipe asks for them, under an objective."""

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
        images, targets = [part[0] for part in parts], [part[1] for part in parts]
        return {"image": torch.cat(images), "target": torch.cat(targets)}

    def _sample(self, draw: Draw) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(draw.seed)
        pool, index = self._choose(draw, generator)
        image = pool.images_SHW[index][None, None].float() / 255.0
        segment = self.config.student.task == "segment"
        mask = pool.targets[index][None, None].float() if segment else torch.zeros_like(image)
        image, mask = augment(image, mask, self._ranges(draw), generator)
        return image, mask if segment else pool.targets[index][None]

    def _choose(self, draw: Draw, generator: torch.Generator) -> tuple[Pool, int]:
        phantoms = self.data.phantoms
        if phantoms is not None and float(torch.rand((), generator=generator)) < self.config.phantom_share:
            return phantoms, int(torch.randint(len(phantoms), (), generator=generator))
        return self.data.train, draw.index

    def _ranges(self, draw: Draw) -> AugmentConfig:
        start = self.config.polish_from
        polish = start is not None and draw.position // self.config.batch >= start
        return self.config.augment.halved() if polish else self.config.augment


__all__ = ["AdaptObjective", "AdaptTask"]
