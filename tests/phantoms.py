"""Phantoms that many tests look at: each is drawn once, and nobody can change it."""

from __future__ import annotations

from functools import lru_cache

from tinyusfm_runtime.phantom import Phantom, make_phantom


@lru_cache(maxsize=256)
def phantom(seed: int, *, height: int = 270, width: int = 400) -> Phantom:
    """A phantom with arrays that cannot be written to."""
    made = make_phantom(seed, height=height, width=width)
    made.frame.pixels.flags.writeable = made.mask_HW.flags.writeable = False
    return made
