"""Balance of losses, so that no constant has to be guessed.

A reconstruction loss can be twenty times a feature loss at the start and another multiple later; a fixed weight is
right at one moment of one run. And a loss of equal size can pull many times as hard: an absolute error pulls as much
when it is nearly 0. So each loss is measured by its gradient at the tokens that all losses share (after GradNorm, Chen
et al., ICML 2018, without its training rates), or by its size. The running means are buffers, so a resumed run goes on
with them, and they are averaged over processes. It does not know the losses.

Shapes: every term is a scalar, a mean over samples; what it was made of are tokens of any shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

DECAY = 0.98
"""Of the running mean: about the last fifty steps."""


class Balance(nn.Module):
    """Adds losses up, the first as it is and the others relative to it."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for name in self.names:
            self.register_buffer(f"mean_{name}", torch.zeros(()))

    def forward(
        self,
        terms: Mapping[str, Tensor],
        weights: Mapping[str, float],
        tokens: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> Tensor:
        """``sum weight * term * (first mean / its mean)``.

        So a single term is taken as it is. A mean is the running one of the norm of a term's gradient at its tokens, or
        of its size.

        Args:
            terms: every loss by name, a mean over samples.
            weights: what each weighs beside the others: how hard it pulls, or how large it is.
            tokens: what each term was computed from, part of its graph; None balances sizes.
        """
        if len(terms) > 1 and self.training:
            self._follow(terms, tokens)
        first = self._mean(next(iter(terms)))
        parts = [weights[name] * term * (first / self._mean(name)) for name, term in terms.items()]
        return torch.stack(parts).sum()

    def _mean(self, name: str) -> Tensor:
        mean: Tensor = getattr(self, f"mean_{name}")
        return torch.where(mean > 0, mean, torch.ones_like(mean))

    @torch.no_grad()
    def _follow(self, terms: Mapping[str, Tensor], tokens: Mapping[str, Sequence[Tensor]] | None) -> None:
        # (terms,): the size of each, or the square of how hard it pulls, which adds up over samples
        sizes = torch.stack(
            [
                term.detach().float().abs() if tokens is None else pull2(term, tokens[name])
                for name, term in terms.items()
            ]
        )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # all processes must divide by the same numbers, or their gradients would not add up
            torch.distributed.all_reduce(sizes)
            sizes = sizes / torch.distributed.get_world_size()
        for name, size in zip(terms, sizes if tokens is None else sizes.sqrt(), strict=True):
            mean: Tensor = getattr(self, f"mean_{name}")
            mean.copy_(torch.where(mean > 0, DECAY * mean + (1 - DECAY) * size, size))


def pull2(term: Tensor, tokens: Sequence[Tensor]) -> Tensor:
    """Squared norm of a loss's gradient at the tokens it was made of, float32.

    The graph stays as it is.

    Args:
        term: a scalar.
        tokens: part of its graph; the way back ends there, so it costs a projection or a head.
    """
    found = torch.autograd.grad(term, list(tokens), retain_graph=True)
    return torch.stack([gradient.float().square().sum() for gradient in found]).sum()


__all__ = ["DECAY", "Balance", "pull2"]
