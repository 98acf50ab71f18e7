"""The synthetic transfer set: seeded, in range, mask and image move together, style keeps the phase."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_edge.training.adapt.synthetic import SyntheticConfig, swap_style, synthesise
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.phantom import make_phantom

PHANTOM = make_phantom(3, height=64, width=64)
STYLE = make_phantom(4, height=64, width=64).frame.pixels
STILL = SyntheticConfig(attenuation=0.0, shadow=0.0, speckle=0.0, style=0.0)


@given(st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_a_seed_gives_the_same_image_in_range(seed: int) -> None:
    first = synthesise(PHANTOM.frame.pixels, PHANTOM.mask_HW, STYLE, seed)
    second = synthesise(PHANTOM.frame.pixels, PHANTOM.mask_HW, STYLE, seed)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert first[0].dtype == np.uint8 and set(np.unique(wide(first[1]))) <= {0, 1}


def test_seeds_differ() -> None:
    a, b = (synthesise(PHANTOM.frame.pixels, PHANTOM.mask_HW, STYLE, seed)[0] for seed in (1, 2))
    assert (a != b).mean() > 0.5


@pytest.mark.parametrize("seed", range(4))
def test_mask_and_image_move_together(seed: int) -> None:
    mask = PHANTOM.mask_HW
    image, moved = synthesise(mask * np.uint8(255), mask, STYLE, seed, STILL)
    both = ((image > 127) & (moved > 0)).sum()
    assert 2 * both / ((image > 127).sum() + moved.sum()) > 0.97
    assert (moved != mask).any(), "it moved at all"


def test_style_keeps_the_phase_and_is_real() -> None:
    image, style = PHANTOM.frame.pixels / 255.0, STYLE / 255.0
    np.testing.assert_allclose(swap_style(image, style, 0.0, 0.05), image, atol=1e-5)
    whole = swap_style(image, style, 1.0, 0.05)
    assert np.isrealobj(whole)
    assert whole.mean() == pytest.approx(style.mean(), rel=1e-3), "the mean is frequency 0"
    high = np.s_[20:28, 20:28]
    for function in (np.abs, np.angle):
        np.testing.assert_allclose(
            function(np.fft.fft2(whole))[high], function(np.fft.fft2(image))[high], rtol=1e-2, atol=1e-2
        )
