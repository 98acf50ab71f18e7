"""Augmentation: off means off, masks follow images, the same state gives the same batch."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyusfm_edge.training.adapt.augment import AugmentConfig, augment
from tinyusfm_edge.training.adapt.bedside import acoustic_shadows

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


def test_masks_follow_the_image() -> None:
    """The image is its own mask here, so it must stay so inside the moved frame."""
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


@pytest.mark.parametrize("name", ["shadow", "sides", "doppler", "bars", "screen"])
def test_what_happens_at_the_bedside_changes_the_image_and_keeps_it_in_range(name: str) -> None:
    image, mask = batch(16)
    seen, moved = augment(image, mask, replace(STILL, **{name: 1.0}), seeded())  # type: ignore[arg-type]
    assert seen.shape == image.shape and float(seen.min()) >= 0 and float(seen.max()) <= 1
    assert ((seen - image).abs().amax((1, 2, 3)) > 0.05).float().mean() > 0.7
    if name in ("bars", "screen"):
        assert (moved - mask).abs().amax((1, 2, 3)).min() > 0.5, "the mask moves with the image"
    else:
        torch.testing.assert_close(moved, mask, atol=1e-5, rtol=0)


def test_shadows_run_down_and_leave_the_rest_alone() -> None:
    flat, mask = torch.full((64, 64), 0.5), torch.zeros(64, 64)
    for seed in range(20):
        shaded = acoustic_shadows(flat, mask, seeded(seed))
        dark = shaded < 0.4
        assert dark.any() and not dark.all()
        assert dark[-1].sum() >= dark[0].sum()


def test_any_rotation_keeps_every_sample_a_rigid_copy_up_to_mirror_and_scale() -> None:
    """A square's corners stay a rectangle: no angle turns an image into a shear."""
    for seed in range(40):
        rows, cols = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
        disc = (((rows - 47.5) ** 2 + (cols - 47.5) ** 2) < 20**2).float()[None, None]
        config = replace(STILL, geometry=1.0, rotate_deg=180.0, scale=(1.0, 1.0), aspect=1.0, shift=0.0)
        moved = augment(disc, disc, config, seeded(seed))[1]
        assert float((moved - disc).abs().mean()) < 0.02, f"seed {seed}"


def test_halved_ranges_are_all_nearer_to_nothing() -> None:
    bedside = {name: 0.5 for name in ("shadow", "sides", "doppler", "bars", "screen")}
    full = AugmentConfig(**bedside)  # type: ignore[arg-type]
    half = full.halved()
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
