"""Smoothing over time: steadier where masks flicker, held for a moment, forgotten after a jump."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.live.smoothing import Temporal, TemporalOptions, flicker
from tinyusfm_runtime.numerics.measure import Measurement
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.results import Prediction, Timings

PLACE = Placement(crop=(0, 0, 32, 32), box=(0, 0, 32, 32), spacing_mm=(1.0, 1.0), frame_size=(32, 32))
TICK_NS = 30_000_000


def said(mask: np.ndarray | None, hc_mm: float | None = None, *, valid: bool = True) -> Prediction:
    """A prediction with this mask and reading."""
    return Prediction(
        seq=0, mask_HW=mask, placement=PLACE, scores=None,
        measurements=() if hc_mm is None else (Measurement(found=True, hc_mm=hc_mm),),
        engine="none", target="none", precision="fp32", verified=True, valid=valid,
        timings=Timings(preprocess_ms=0, infer_ms=0, postprocess_ms=0, total_ms=0), t_recv_ns=None, age_ms=None,
        auxiliary={},
    )  # fmt: skip


def disc(radius: float, label: int = 1) -> np.ndarray:
    rows, cols = np.mgrid[:32, :32]
    return (np.hypot(rows - 16, cols - 16) < radius).astype(np.uint8) * np.uint8(label)


def test_a_flickering_mask_becomes_steady_and_both_figures_are_told() -> None:
    temporal = Temporal()
    readings = [temporal.add(said(disc(10 if step % 2 else 6)), step * TICK_NS) for step in range(40)]
    assert readings[0].flicker is None and readings[0].flicker_smoothed is None
    before = float(np.mean([reading.flicker for reading in readings[1:]]))
    after = float(np.mean([reading.flicker_smoothed for reading in readings[1:]]))
    assert before > 0.2 and after < 0.2 * before


def test_without_smoothing_nothing_changes() -> None:
    temporal, rng = Temporal(TemporalOptions(weight=1.0)), np.random.default_rng(3)
    for step in range(10):
        mask = rng.integers(0, 3, (32, 32)).astype(np.uint8)
        reading = temporal.add(said(mask), step * TICK_NS)
        np.testing.assert_array_equal(reading.mask_HW, mask)
        assert reading.flicker == reading.flicker_smoothed


def test_a_lasting_change_gets_through() -> None:
    temporal = Temporal()
    for step in range(10):
        temporal.add(said(disc(6)), step * TICK_NS)
    for step in range(10, 20):
        reading = temporal.add(said(disc(12)), step * TICK_NS)
    np.testing.assert_array_equal(reading.mask_HW, disc(12))


def test_labels_that_appear_later_find_room() -> None:
    temporal = Temporal()
    temporal.add(said(disc(6)), 0)
    for step in range(1, 10):
        reading = temporal.add(said(disc(6, label=2)), step * TICK_NS)
    np.testing.assert_array_equal(reading.mask_HW, disc(6, label=2))


def test_a_measurement_is_held_for_a_moment_and_said_to_be() -> None:
    temporal = Temporal(TemporalOptions(hold_ms=100, median_of=3))
    for step, hc_mm in enumerate([200.0, 230.0, 202.0]):
        reading = temporal.add(said(disc(6), hc_mm), step * TICK_NS)
    assert reading.hc_mm == 202.0 and not reading.held
    held = temporal.add(said(disc(6)), 3 * TICK_NS)
    assert held.hc_mm == 202.0 and held.held and held.held_ms == pytest.approx(30)
    for step in range(4, 8):
        gone = temporal.add(said(disc(6)), step * TICK_NS)
    assert gone.hc_mm is None and not gone.held


def test_a_missing_answer_shows_no_old_mask() -> None:
    temporal = Temporal()
    temporal.add(said(disc(6), 200.0), 0)
    assert temporal.add(None, TICK_NS).mask_HW is None
    assert temporal.add(said(disc(6), valid=False), 2 * TICK_NS).mask_HW is None
    assert temporal.add(None, 3 * TICK_NS).hc_mm == 200.0


def test_a_jump_forgets_the_past() -> None:
    for change in ("pause", "crop"):
        temporal = Temporal()
        for step in range(10):
            temporal.add(said(disc(6), 200.0), step * TICK_NS)
        later, now_ns = said(disc(12), 300.0), 10 * TICK_NS
        if change == "pause":
            now_ns += 10**9
        else:
            later = replace(later, placement=replace(PLACE, crop=(1, 1, 31, 31)))
        reading = temporal.add(later, now_ns)
        np.testing.assert_array_equal(reading.mask_HW, disc(12))
        assert reading.hc_mm == 300.0 and reading.flicker is None


def test_a_reading_owns_its_mask_and_the_prediction_stays() -> None:
    temporal, mask = Temporal(), disc(6)
    first = temporal.add(said(mask), 0)
    assert first.mask_HW is not None
    kept = first.mask_HW.copy()
    for step in range(1, 6):
        temporal.add(said(disc(12)), step * TICK_NS)
    np.testing.assert_array_equal(first.mask_HW, kept)
    np.testing.assert_array_equal(mask, disc(6))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_flicker_is_a_distance_from_0_to_1(one: int, other: int) -> None:
    a, b = (np.random.default_rng(seed).integers(0, 3, (9, 9)).astype(np.uint8) for seed in (one, other))
    assert 0 <= flicker(a, b) <= 1 and flicker(a, b) == flicker(b, a) and flicker(a, a) == 0


def test_flicker_of_nothing_and_of_everything() -> None:
    none = np.zeros((4, 4), np.uint8)
    assert flicker(none, none) == 0 and flicker(none, none + np.uint8(1)) == 1


def test_options_have_ranges() -> None:
    with pytest.raises(InputError, match="temporal options"):
        TemporalOptions(weight=0)
