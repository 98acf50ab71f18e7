"""Warped training frames as a transfer set, which a diffusion model must beat.

The pairs are those of ``synthesise``. Shapes: N pairs, T training frames, SS rows and columns.
"""

from __future__ import annotations

import numpy as np

from tinyusfm_edge.training.adapt.synthetic import synthesise

WARP_SEED = 11
"""Keeps the choice of frames apart from other uses of a seed."""


def warped_pairs(images_TSS: np.ndarray, masks_TSS: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training frames and their masks, bent, shaded and speckled again.

    Args:
        images_TSS: uint8, at least one.
        masks_TSS: uint8 0/1.
        count: how many pairs, at least one.
        seed: of everything.

    Returns:
        uint8 images NSS and uint8 0/1 masks NSS.
    """
    rng = np.random.default_rng([seed, WARP_SEED])
    pairs = []
    for number in range(count):
        own, style = (int(index) for index in rng.integers(0, len(images_TSS), 2))
        pairs.append(synthesise(images_TSS[own], masks_TSS[own], images_TSS[style], seed + number))
    images, masks = zip(*pairs, strict=True)
    return np.stack(images), np.stack(masks)


__all__ = ["WARP_SEED", "warped_pairs"]
