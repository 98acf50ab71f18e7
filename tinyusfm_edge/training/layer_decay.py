"""Parameter groups with layer-wise learning rates that really act (methods.md 1.7, defects 1 and 2).

Each group carries its own ``scale``; ``set_learning_rate`` multiplies the schedule's value by it at every step, so a
warm-up cannot flatten the groups and there is exactly one schedule. Depth is read off the student's own names: the stem
is layer 0, block i layer i + 1, all else (final norm, neck, heads, adapters) the last. It does not know the recipe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_BLOCK = re.compile(r"^backbone\.blocks\.(\d+)\.")
_STEM = ("backbone.patch_embed.", "backbone.cls_token", "backbone.pos_embed")
_NO_DECAY = ("cls_token", "pos_embed")


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter: 0 for the stem, 1..depth for blocks, depth + 1 for the rest.

    Args:
        name: the parameter's name in a student.
        depth: blocks of the student.
    """
    block = _BLOCK.match(name)
    if block:
        return int(block.group(1)) + 1
    return 0 if name.startswith(_STEM) else depth + 1


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, depth: int, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimiser, by layer and by whether weight decay acts.

    Args:
        named: names as in a student, and parameters; frozen ones are left out.
        depth: blocks of the student.
        layer_decay: factor on the learning rate from one layer to the one below, in (0, 1]; 1 switches it off.
        weight_decay: on matrices and kernels; never on vectors, positions or the class token.

    Returns:
        Groups with ``params``, ``weight_decay``, ``scale`` and ``layer``, lowest layer first.
    """
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not name.endswith(_NO_DECAY)
            found.setdefault((layer_of(name, depth), decays), []).append(parameter)
    return [
        {
            "params": params,
            "weight_decay": weight_decay if decays else 0.0,
            "scale": layer_decay ** (depth + 1 - layer),
            "layer": layer,
        }
        for (layer, decays), params in sorted(found.items(), key=lambda item: item[0])
    ]


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Gives every group the schedule's rate times its own scale (1 where it has none)."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def warmup_cosine(step: int, *, steps: int, warmup: int, peak: float, floor: float = 0.01) -> float:
    """Learning rate of a step: linear to the peak, then a half cosine to ``floor`` of it at the last step.

    Args:
        step: 0-based.
        steps: of the whole run.
        warmup: steps of the linear part.
        peak: largest rate.
        floor: share of the peak that is left at the end.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


__all__ = ["layer_of", "parameter_groups", "set_learning_rate", "warmup_cosine"]
