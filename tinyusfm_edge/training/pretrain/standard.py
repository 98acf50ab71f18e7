"""Standardised targets: each teacher channel's mean and deviation.

Mean and standard deviation over a pool of images.

After a LayerNorm without parameters a few channels of a ViT still hold most of the energy, and most of that is the same
in every image: a student that predicts the mean token scores half of what there is. Standardised per channel, what is
left is what differs between tokens (after PHI-S, Ranzinger et al. 2024, without the rotation). It does not know where
tokens come from.

Shapes: D teacher width, BPD tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALLEST_SD = 1e-3
"""Channels that hardly vary are divided by no less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Standard:
    """Mean and standard deviation of a stage's channels.

    Attributes:
        mean_D: float32.
        sd_D: float32, above 0.
    """

    mean_D: Tensor
    sd_D: Tensor

    def __call__(self, tokens_BPD: Tensor) -> Tensor:
        """Tokens with mean 0 and standard deviation 1 over the pool."""
        return (tokens_BPD.float() - self.mean_D.to(tokens_BPD.device)) / self.sd_D.to(tokens_BPD.device)


def identity(width: int) -> Standard:
    """A standard that changes nothing."""
    return Standard(mean_D=torch.zeros(width), sd_D=torch.ones(width))


def measure_standards(batches: Iterable[Sequence[Tensor]]) -> list[Standard]:
    """Mean and standard deviation of every stage's channels, in float64.

    Args:
        batches: tokens BPD of each stage, batch by batch; at least one.

    Returns:
        One standard a stage.
    """
    count = 0
    sums: list[np.ndarray] = []
    squares: list[np.ndarray] = []
    for stages in batches:
        # (B P, D) per stage
        flat = [tokens.reshape(-1, tokens.shape[-1]).double().numpy() for tokens in stages]
        if not sums:
            sums, squares = ([np.zeros(x.shape[1]) for x in flat] for _ in range(2))
        count += len(flat[0])
        for total, square, x in zip(sums, squares, flat, strict=True):
            total += x.sum(0)
            # sums and sums of squares: one pass, nothing is kept
            square += np.square(x).sum(0)
    found = []
    for total, square in zip(sums, squares, strict=True):
        mean = total / count
        # rounding may leave a variance just below 0
        sd = np.sqrt(np.maximum(square / count - mean**2, SMALLEST_SD**2))
        found.append(Standard(mean_D=torch.from_numpy(mean).float(), sd_D=torch.from_numpy(sd).float()))
    return found


__all__ = ["SMALLEST_SD", "Standard", "identity", "measure_standards"]
