"""Layer-wise learning rates: a scale for each parameter by its depth.

They really act (methods.md 1.7, defects 1 and 2).

The loop multiplies its one schedule by a group's scale at every step, so a warm-up cannot flatten the groups. Depth is
read off the student's own names: the stem is layer 0, block i layer i + 1, all else (final norm, neck, heads, adapters)
the last. It does not know the recipe or the optimiser.

Layers count 0 (stem), 1 .. depth (blocks), depth + 1 (heads): a scale is layer_decay^(depth + 1 - layer).
"""

from __future__ import annotations

import re

_BLOCK = re.compile(r"(?:^|\.)backbone\.blocks\.(\d+)\.")
_STEM = re.compile(r"(?:^|\.)backbone\.(?:patch_embed\.|cls_token$|pos_embed$)")


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter.

    0 for the stem, 1..depth for blocks, depth + 1 for the rest.

    Args:
        name: the parameter's name in a student, with anything in front of ``backbone.``.
        depth: blocks of the student.
    """
    block = _BLOCK.search(name)
    if block:
        return int(block.group(1)) + 1
    return 0 if _STEM.search(name) else depth + 1


def layer_scale(name: str, *, depth: int, layer_decay: float) -> float:
    """Factor on the learning rate of a parameter.

    Args:
        name: the parameter's name in a student.
        depth: blocks of the student.
        layer_decay: factor from one layer to the one below, in (0, 1]; 1 switches it off.

    Returns:
        ``layer_decay`` to the power of the layers above it: 1 for heads.
    """
    return layer_decay ** (depth + 1 - layer_of(name, depth))


__all__ = ["layer_of", "layer_scale"]
