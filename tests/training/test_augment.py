"""Augmentation: off means off, masks follow pictures, the same state gives the same batch."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyusfm_edge.training.augment import AugmentConfig, augment

STILL = AugmentConfig(
    geometry=0.0, gamma=(1.0, 1.0), contrast=(1.0, 1.0), gain=0.0, ramp=0.0, noise=0.0, blur=0.0, erase=0.0
)


def batch(size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, cols = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    centres = torch.rand(size, 2, generator=generator) * 16 + 16
    mask = torch.stack([(((rows - r) / 12) ** 2 + ((cols - c) / 8) ** 2 <= 1).float() for r, c in centres])[:, None]
    return 0.2 + 0.6 * mask, mask


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nothing_happens_when_everything_is_off() -> None:
    image, mask = batch()
    moved, moved_mask = augment(image, mask, STILL, seeded())
    torch.testing.assert_close(moved, image, atol=1e-5, rtol=0)
    torch.testing.assert_close(moved_mask, mask, atol=1e-5, rtol=0)


def test_masks_follow_the_picture() -> None:
    """The picture is its own mask here, so it must stay so inside the moved frame."""
    image, mask = batch(32)
    moved, moved_mask = augment(image, mask, replace(STILL, geometry=1.0), seeded())
    inside = augment(torch.ones_like(image), mask, replace(STILL, geometry=1.0), seeded())[0] > 0.999
    torch.testing.assert_close(moved[inside], (0.2 + 0.6 * moved_mask)[inside], atol=1e-3, rtol=0)
    assert (moved_mask - mask).abs().amax((1, 2, 3)).min() > 0.5, "every sample moved"


def test_a_mask_left_behind_would_be_seen() -> None:
    image, mask = batch(32)
    moved, _ = augment(image, mask, replace(STILL, geometry=1.0), seeded())
    assert (moved - (0.2 + 0.6 * mask)).abs().max() > 0.3


def test_brightness_leaves_the_mask_alone_and_stays_in_range() -> None:
    image, mask = batch()
    moved, same = augment(image, mask, replace(AugmentConfig(), geometry=0.0), seeded())
    torch.testing.assert_close(same, mask, atol=1e-5, rtol=0)
    assert moved.min() >= 0.0 and moved.max() <= 1.0
    assert (moved - image).abs().mean() > 0.02


@pytest.mark.parametrize(
    "change",
    [
        {"gamma": (2.0, 2.0)},
        {"contrast": (0.5, 0.5)},
        {"gain": 0.5},
        {"ramp": 1.0},
        {"noise": 0.2},
        {"blur": 1.0},
        {"erase": 1.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_range_acts(change: dict[str, object]) -> None:
    image, mask = batch(32)
    moved, _ = augment(image, mask, replace(STILL, **change), seeded())  # type: ignore[arg-type]
    assert (moved - image).abs().max() > 0.05


def test_halved_ranges_are_all_nearer_to_nothing() -> None:
    full, half = AugmentConfig(), AugmentConfig().halved()
    none = replace(STILL, rotate_deg=0.0, shift=0.0, aspect=1.0, scale=(1.0, 1.0))
    for field in fields(AugmentConfig):
        values = [np.ravel(getattr(config, field.name)) for config in (full, half, none)]
        assert all(abs(h - n) < abs(f - n) for f, h, n in zip(*values, strict=True)), field.name


def test_same_state_same_batch() -> None:
    first = augment(*batch(), AugmentConfig(), seeded(3))
    again = augment(*batch(), AugmentConfig(), seeded(3))
    other = augment(*batch(), AugmentConfig(), seeded(4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
