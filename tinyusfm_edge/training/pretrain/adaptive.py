"""Masks that follow the images and the student.

Hard and telling patches are hidden more often.

After OpenUS (arXiv 2511.11510). A patch's score mixes what the teacher finds salient with what the student still gets
wrong at that place; the share of masked patches that is chosen by score grows over the run, the rest is random. Where
the source takes attention from its teacher, this takes the size of the teacher's standardised tokens, which a bank of
features keeps (our choice). It does not know networks.

Shapes: B batch, P patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FIRST, LAST = 0.1, 0.9
"""Share of the mask that is chosen by score, and weight of the teacher in the score, at the start and at the end."""
MEMORY = 0.7
"""Of the student's loss at each place from step to step."""


class AdaptiveMask(nn.Module):
    """Chooses masks.

    Remembers the student's loss at every place and how far the run is.
    """

    def __init__(self, num_patches: int, ratio: float, steps: int) -> None:
        super().__init__()
        self.ratio, self.steps = ratio, max(1, steps)
        self.place_loss: Tensor
        self.step: Tensor
        self.register_buffer("place_loss", torch.zeros(num_patches))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0..1."""
        return min(1.0, int(self.step) / self.steps)

    def forward(self, tokens_BPD: Tensor) -> Tensor:
        """Which patches are hidden, bool BP.

        Args:
            tokens_BPD: the teacher's standardised tokens of the clean images.
        """
        # (B, P) 0..1: squared length of a standardised token, large where it is unlike the mean
        salient = _unit(tokens_BPD.float().square().mean(-1))
        # from the student's loss to the teacher's saliency, along half a cosine
        mix = FIRST + (LAST - FIRST) * 0.5 * (1 - math.cos(math.pi * self.progress))
        # ``place_loss`` is (P,), one number per place over all images
        score_BP = mix * salient + (1 - mix) * _unit(self.place_loss.expand_as(salient))
        return choose_masked(score_BP, self.ratio, FIRST + (LAST - FIRST) * self.progress)

    @torch.no_grad()
    def remember(self, loss_BP: Tensor) -> None:
        """Takes in a step's loss of each token."""
        # (B, P) -> (P,)
        mean = loss_BP.detach().float().mean(0)
        self.place_loss.copy_(mean if int(self.step) == 0 else MEMORY * self.place_loss + (1 - MEMORY) * mean)
        self.step += 1


def choose_masked(score_BP: Tensor, ratio: float, share: float) -> Tensor:
    """Hides the same number of patches in every image.

    A share of them by score, the others at random.

    Args:
        score_BP: higher is hidden first.
        ratio: of patches that are hidden.
        share: of the hidden ones that are chosen by score.

    Returns:
        bool BP.
    """
    # patches to hide per image, ``guided`` of them by score
    count = math.ceil(ratio * score_BP.shape[1])
    guided = round(share * count)
    random = torch.rand_like(score_BP)
    # (B, guided)
    by_score = score_BP.argsort(1, descending=True)[:, :guided]
    # what is chosen by score comes first, then whatever the dice say
    order = random.scatter(1, by_score, 2.0).argsort(1, descending=True)[:, :count]
    return torch.zeros_like(score_BP, dtype=torch.bool).scatter(1, order, True)


def _unit(values_BP: Tensor) -> Tensor:
    low, high = values_BP.amin(1, keepdim=True), values_BP.amax(1, keepdim=True)
    return (values_BP - low) / (high - low).clamp_min(1e-8)


__all__ = ["FIRST", "LAST", "MEMORY", "AdaptiveMask", "choose_masked"]
