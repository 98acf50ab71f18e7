"""Balance of losses: each is divided by its running mean.

So no constant has to be guessed.

A reconstruction loss can be twenty times a feature loss at the start and another multiple later; a fixed weight is
right at one moment of one run. The means are buffers, so a resumed run goes on with them, and they are averaged over
processes. It does not know the losses.

Shapes: every term is a scalar, a mean over samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

DECAY = 0.98
"""Of the running mean: about the last fifty steps."""


class Balance(nn.Module):
    """Adds losses up, each relative to its usual size."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in self.names:
            self.register_buffer(f"mean_{name}", torch.zeros(()))

    def forward(self, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        """``sum weight * term / running mean of |term|``; a single term is taken as it is.

        Args:
            terms: every loss by name, a mean over samples.
            weights: what each weighs beside the others.
        """
        if len(terms) == 1:
            ((name, term),) = terms.items()
            return weights[name] * term
        if self.training:
            self._follow(terms)
        parts = [weights[name] * term / self._mean(name) for name, term in terms.items()]
        return torch.stack(parts).sum()

    def _mean(self, name: str) -> Tensor:
        mean: Tensor = getattr(self, f"mean_{name}")
        return torch.where(mean > 0, mean, torch.ones_like(mean))

    @torch.no_grad()
    def _follow(self, terms: Mapping[str, Tensor]) -> None:
        # (terms,): the size of each, without gradient
        sizes = torch.stack([term.detach().float().abs() for term in terms.values()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # all processes must divide by the same numbers, or their gradients would not add up
            torch.distributed.all_reduce(sizes)
            sizes = sizes / torch.distributed.get_world_size()
        for name, size in zip(terms, sizes, strict=True):
            mean: Tensor = getattr(self, f"mean_{name}")
            mean.copy_(torch.where(mean > 0, DECAY * mean + (1 - DECAY) * size, size))


__all__ = ["DECAY", "Balance"]
