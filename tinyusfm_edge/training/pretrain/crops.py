"""Several crops of each image, for the self-distillation.

Two large ones and some small ones, each from a seed of its own. It does not know models.

Shapes: B images, G large crops, S small crops, HW their sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tinyusfm_edge.data.images import ImagePool
from tinyusfm_edge.training.pretrain.config import DistillConfig
from tinyusfm_edge.training.pretrain.dino import GLOBAL_CROPS
from tinyusfm_edge.training.pretrain.views import ViewConfig, draw_crops
from tinyusfm_edge.training.trainer.loop import Draw, stable_seed


def draw_multi_crop(pool: ImagePool, draws: Sequence[Draw], config: DistillConfig) -> dict[str, Tensor]:
    """Crops of drawn images.

    With ``variants`` set each image has so many fixed sets of them.

    Args:
        pool: images.
        draws: which, each with its seed.
        config: ranges and sizes.

    Returns:
        ``global`` BGHW and, where there are any, ``local`` BSHW; brightness 0..1.
    """
    dino = config.dino
    pixels = [pool.pixels_NSS[draw.index] for draw in draws]
    seeds = [draw.seed for draw in draws]
    if config.variants:
        seeds = [stable_seed("crops", config.view_seed, d.index, d.seed % config.variants) for d in draws]
    large = replace(config.view, crop_area=dino.global_area)
    small = replace(config.view, crop_area=dino.local_area, image_size=dino.local_side(config.view.image_size))

    def crops(count: int, first: int, ranges: ViewConfig) -> Tensor:
        # count x (B, 1, H, W) -> (B, count, H, W)
        parts = [
            draw_crops(pixels, [stable_seed("crop", seed, first + index) for seed in seeds], ranges)
            for index in range(count)
        ]
        return torch.cat(parts, 1)

    found = {"global": crops(GLOBAL_CROPS, 0, large)}
    if dino.local_crops:
        found["local"] = crops(dino.local_crops, GLOBAL_CROPS, small)
    return found


__all__ = ["draw_multi_crop"]
