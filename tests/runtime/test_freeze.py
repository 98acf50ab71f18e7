"""Same pixels again, and the time between frames, each with what must not fool it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyusfm_runtime.live.freeze import FramePeriod, StillImage


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 80), dtype=np.uint8)


def test_the_same_pixels_are_counted_and_one_changed_pixel_is_seen() -> None:
    still, here = StillImage(), image(1)
    assert not still.see(here)
    assert still.see(here.copy()) and still.see(here) and still.run == 2
    moved = here.copy()
    moved[1, 1] ^= 1  # a pixel that the first, coarse look does not cover
    assert not still.see(moved) and still.run == 0
    assert not still.see(here) and still.see(here)


def test_one_buffer_filled_again_and_again_is_no_freeze() -> None:
    still, buffer = StillImage(), image(1)
    for seed in range(2, 6):
        assert not still.see(buffer)
        buffer[:] = image(seed)


def test_another_size_is_another_image() -> None:
    still = StillImage()
    assert not still.see(np.zeros((64, 80), np.uint8)) and not still.see(np.zeros((32, 80), np.uint8))
    assert not still.see(np.zeros((32, 80, 3), np.uint8)) and still.see(np.zeros((32, 80, 3), np.uint8))


def arrivals(*times_ms: float) -> FramePeriod:
    period = FramePeriod()
    for t in times_ms:
        period.arrived(int(t * 1e6))
    return period


def test_it_finds_the_period_of_a_steady_stream() -> None:
    assert not arrivals(0, 20, 40).known and arrivals(0, 20, 40).ms == pytest.approx(66.7, abs=0.1)
    assert arrivals(*range(0, 400, 20)).ms == pytest.approx(20)


def test_a_stall_and_hiccups_do_not_move_it() -> None:
    steady = list(range(0, 640, 20))
    assert arrivals(*steady, 5620, 5640, 5660).ms == pytest.approx(20)
    assert arrivals(*range(0, 300, 20), 360, *range(380, 680, 20)).ms == pytest.approx(20)


def test_bursts_do_not_make_it_nothing() -> None:
    times = [burst * 100 + place * 0.2 for burst in range(20) for place in range(3)]
    assert 20 < arrivals(*times).ms < 40, "three frames every 100 ms"


def test_a_source_that_became_slow_is_followed() -> None:
    assert arrivals(*range(0, 400, 20), *range(1000, 9000, 500)).ms == pytest.approx(500)


def test_the_next_frame_is_expected_a_period_after_the_last_one() -> None:
    period = arrivals(*(100 + 40 * number for number in range(10)))
    last_ns = round((100 + 40 * 9) * 1e6)
    assert period.spare_ms(last_ns + 10_000_000) == pytest.approx(30.0)
    assert period.spare_ms(last_ns + 60_000_000) == pytest.approx(-20.0), "it is late"
    assert period.spare_ms(last_ns + 90_000_000) == math.inf, "none came for two periods"
    assert arrivals(0.0, 40.0).spare_ms(0) == math.inf, "too few frames to expect one"


def test_a_declared_period_is_kept() -> None:
    period = FramePeriod(declared_ms=33)
    for t in range(0, 1000, 10):
        period.arrived(t * 1_000_000)
    assert period.ms == 33 and period.known


@given(st.floats(5, 200), st.lists(st.floats(-0.3, 0.3), min_size=20, max_size=60))
def test_jitter_averages_out(period_ms: float, jitter: list[float]) -> None:
    times = [(i + shift) * period_ms for i, shift in enumerate(jitter)]
    assert arrivals(*times).ms == pytest.approx(period_ms, rel=0.25)
